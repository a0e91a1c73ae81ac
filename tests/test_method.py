"""The decisions, one by one: profile, classify, budget, prune, retrieve. Each against its slow, obvious twin."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybridkv import BudgetError, HybridConfig, Prefill, full_plan, hybrid_plan
from hybridkv.cache.bounds import bound_scores
from hybridkv.cache.exact import ExactKeys
from hybridkv.cache.retrieve import by_threshold, select, summed_at_once, summed_by_chunk
from hybridkv.cache.sketch import (
    encode,
    fit_sketch,
    from_words,
    pack_sketch,
    sketch_scores,
    to_words,
    token_scores,
    written_out,
)
from hybridkv.planning.budget import allocate, split
from hybridkv.planning.classify import classify, highest, jaccard_overlap, overlap, ranks, settled_share
from hybridkv.planning.head_profile import HeadProfile
from hybridkv.planning.plan import Costs
from hybridkv.planning.prefill import window_rows
from hybridkv.planning.prune import keep_order, pooled, tile_order
from hybridkv.planning.variants import VARIANTS, movement
from tests.lab import configs, examples, prompts, random_prefill, shapes

# profile


@examples(100)
@given(mask=prompts(200), config=configs, shape=shapes, pictured=st.booleans(), seed=st.integers(0, 99))
def test_profile_is_what_dense_attention_says(mask, config, shape, pictured, seed):
    heads, group, dim = shape
    generator = torch.Generator().manual_seed(seed)
    tokens = len(mask)
    q, k, v = (torch.randn(1, n, tokens, dim, generator=generator) for n in (heads * group, heads, heads))
    start = mask.tolist().index(True)
    length = [*mask[start:].tolist(), False].index(False)
    spans = [(start, 1, 1, length)] * pictured  # the first run of context is a picture, or text like any other
    prefill = Prefill(mask, config, spans=spans)
    out = prefill[0](q, k, v)
    weights = (
        (q @ k.repeat_interleave(group, 1).mT * dim**-0.5)
        .masked_fill(torch.ones(tokens, tokens).triu(1).bool(), float("-inf"))
        .softmax(-1)
    )
    torch.testing.assert_close(out, weights @ v.repeat_interleave(group, 1))

    prunable = prefill.prunable
    assert not prunable[: config.sinks].any() and not prunable[max(0, tokens - config.recent) :].any()
    assert (prunable <= mask).all()
    seen = [t for t in range(tokens) if not prunable[t] and prunable[:t].any()][-config.window :]
    assert window_rows(prunable, config.window).tolist() == seen
    layer = prefill.layers[0]
    window = weights[0].view(heads, group, tokens, tokens)[:, :, seen]  # (H, G, W, T)
    if seen:
        torch.testing.assert_close(layer.score, window.amax((1, 2)))
        torch.testing.assert_close(layer.mean_score, window.mean((1, 2)))
        torch.testing.assert_close(layer.context_mass, window[..., prunable].sum(-1).mean((1, 2)))
    else:
        assert not layer.score.any() and not layer.context_mass.any()
    text = [t for t in range(tokens) if prunable[t] and not (pictured and start <= t < start + length)]
    rows = torch.tensor(text[-config.window :] + seen, dtype=torch.long)
    far = prunable & (rows[:, None] - torch.arange(tokens) >= config.window)  # (W, T)
    surest = (weights[0][:, rows] * far).view(heads, group, -1)
    torch.testing.assert_close(layer.focus, surest.amax(-1).mean(1) if len(rows) else torch.zeros(heads))
    same = torch.stack([jaccard_overlap(w.mean(0)[:, prunable], 0.1) for w in window])
    torch.testing.assert_close(overlap(prefill)[0], same)


def test_overlap_of_known_sets():
    p = torch.tensor([[9.0, 8, 0, 0, 0, 0], [9, 0, 8, 0, 0, 0], [0, 0, 0, 0, 9, 8]])  # top pairs {0,1}, {0,2}, {4,5}
    assert jaccard_overlap(p, 2 / 6) == pytest.approx((1 / 3 + 0 + 0) / 3)
    assert jaccard_overlap(p[:1], 0.5) == 1
    assert jaccard_overlap(p[:, :0], 0.5) == 1


def test_without_a_mask_the_end_of_the_prompt_is_the_question():
    config = HybridConfig(window=10, sinks=2, recent=5)
    prefill = random_prefill(config, 1, (1, 1, 100, 8), None, 0, torch.float32)
    assert prefill.prunable.nonzero()[:, 0].tolist() == list(range(2, 90))


def test_prefill_refuses_what_it_can_not_record():
    q, k = torch.randn(1, 4, 30, 8), torch.randn(1, 2, 30, 8)
    cases = [
        (0, (q, k, k[:, :, :5]), "one sequence"),
        (0, (q.repeat(2, 1, 1, 1), k.repeat(2, 1, 1, 1), k.repeat(2, 1, 1, 1)), "one sequence"),
        (0, (q[:, :3], k, k), "dividing"),
        (1, (q, k, k), "layer 1 called after 0"),
    ]
    for layer, qkv, message in cases:
        with pytest.raises(ValueError, match=message):
            Prefill(None, HybridConfig())[layer](*qkv)
    with pytest.raises(ValueError, match="prunable has shape"):
        Prefill(torch.ones(7, dtype=torch.bool), HybridConfig())[0](q, k, k)


# classify


def test_the_highest_share_of_heads():
    focus = torch.tensor([[0.05, 0.1], [0.7, 0.02]])
    for share, expected in (
        (0.5, [[False, True], [True, False]]),
        (0.25, [[False, False], [True, False]]),
        (0.1, [[False, False], [True, False]]),  # one at least
        (0.0, [[False, False], [False, False]]),
    ):
        assert highest(focus, share).tolist() == expected


def test_movement_and_what_is_settled():
    mass = torch.tensor([[0.1, 0.9], [0.8, 0.9]])
    same = torch.tensor([[0.1, 0.9], [0.2, 0.1]])  # (little context), (stays), (moves), (moves more)
    assert highest(movement(mass, same), 0.5).tolist() == [[False, False], [True, True]]
    assert highest(movement(mass, same), 0.25).tolist() == [[False, False], [False, True]]
    assert (settled_share(mass, same) < 0.9).tolist() == [[False, False], [True, True]]
    assert settled_share(mass, same)[1, 1] == pytest.approx(1 - 0.9 * 0.9)


@examples(100)
@given(st.integers(1, 6), st.integers(1, 8), st.floats(0, 1), st.integers(0, 99), st.booleans())
def test_share_is_met_exactly_whatever_the_scores(layers, heads, share, seed, ties):
    score = torch.rand(layers, heads, generator=torch.Generator().manual_seed(seed))
    score = score.round() if ties else score
    chosen = highest(score, share)
    assert int(chosen.sum()) == (max(1, round(share * layers * heads)) if share else 0)
    if chosen.any() and not chosen.all():
        assert score[chosen].min() >= score[~chosen].max()
    assert sorted(ranks(score).flatten().tolist()) == list(range(layers * heads))


def test_classifiers_look_at_what_they_say():
    """On a prompt whose heads differ in all statistics, each makes those dynamic that its own one names."""
    profile = HeadProfile(need := torch.rand(3, 4, generator=torch.Generator().manual_seed(1)), need)
    config = HybridConfig(budget=0.5, dynamic_share=0.25, head_profile=profile)
    prefill = random_prefill(config, 3, (4, 2, 300, 16), torch.arange(300) < 260, 0, torch.float32)
    focus, mass = (torch.stack([getattr(p, name) for p in prefill.layers]) for name in ("focus", "context_mass"))
    expected = {
        "focus": focus >= focus.flatten().topk(3).values.min(),
        "profile": need >= need.flatten().topk(3).values.min(),
        "threshold": settled_share(mass, overlap(prefill)) < config.threshold,
    }
    for name, dynamic in expected.items():
        prefill.config = replace(config, classifier=name)
        assert torch.equal(classify(prefill, torch.ones(3).bool()), dynamic), name
    prefill.config = config
    reverse = VARIANTS["classifier=reversed"](prefill)
    assert torch.equal(reverse.dynamic, focus <= focus.flatten().topk(3, largest=False).values.max())
    assert torch.equal(VARIANTS["classifier=ranks"](prefill).dynamic, highest(movement(mass, overlap(prefill)), 0.25))
    random = VARIANTS["classifier=random"](prefill).dynamic
    assert int(random.sum()) == 3 and torch.equal(random, VARIANTS["classifier=random"](prefill).dynamic)
    weighted = VARIANTS["head_weight=context"](prefill)
    assert torch.equal(weighted.dynamic, expected["focus"])
    static = ~weighted.dynamic[0]
    assert weighted.n_read[0, static][mass[0, static].argmax()] == weighted.n_read[0, static].max()


# budget


@st.composite
def splits(draw):
    n = draw(st.integers(1, 30))
    floor = torch.tensor(draw(st.lists(st.integers(0, 9), min_size=n, max_size=n)))
    cap = floor + torch.tensor(draw(st.lists(st.integers(0, 99), min_size=n, max_size=n)))
    weight = torch.tensor(draw(st.lists(st.floats(0.01, 100), min_size=n, max_size=n)))
    return draw(st.integers(int(floor.sum()), int(cap.sum()) + 10)), weight, floor, cap


@examples(300)
@given(splits())
def test_split_is_exact_within_bounds_and_proportional(case):
    total, weight, floor, cap = case
    pages = split(total, weight, floor, cap)
    assert int(pages.sum()) == min(total, int(cap.sum()))
    assert (pages >= floor).all() and (pages <= cap).all()
    free = (pages > floor) & (pages < cap)
    if free.sum() > 1:  # between the bounds, shares follow the weights up to one page
        level = pages[free].double() / weight[free].double()
        page = 1 / weight[free].double()
        assert ((level - page)[:, None] <= (level + page)[None, :] + 1e-6).all()


def test_split_refuses_less_than_the_floors():
    with pytest.raises(BudgetError, match="can't hold floors"):
        split(3, torch.ones(2), torch.tensor([2, 2]), torch.tensor([9, 9]))


@examples(100)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 999), st.sampled_from([0.5, 1.0, 2.0]))
def test_allocation_is_exact_at_every_level(layers, heads, seed, dynamic_weight):
    generator = torch.Generator().manual_seed(seed)
    floor = torch.randint(0, 4, (layers, heads), generator=generator)
    cap = floor + torch.randint(0, 40, (layers, heads), generator=generator)
    dynamic = torch.rand(layers, heads, generator=generator) < 0.5
    total = int(torch.randint(int(floor.sum()), int(cap.sum()) + 3, (), generator=generator))
    pages = allocate(total, dynamic, torch.ones(layers, heads), floor, cap, dynamic_weight)
    assert int(pages.sum()) == min(total, int(cap.sum()))
    assert (pages >= floor).all() and (pages <= cap).all()


def test_dynamic_weight_divides_between_the_types():
    dynamic = torch.tensor([[True, False], [False, True]])
    free = torch.zeros(2, 2, dtype=torch.long), torch.full((2, 2), 1000)
    assert allocate(120, dynamic, torch.ones(2, 2), *free, 2.0).tolist() == [[40, 20], [20, 40]]


@pytest.mark.parametrize("budget", [0.1, 0.2, 0.5])
def test_the_budget_is_spent_to_the_page(budget):
    """At most one page, and what tables were charged too much, is left of the budget."""
    config = HybridConfig(budget=budget, dynamic_share=0.5)
    prefill = random_prefill(config, 4, (4, 2, 2000, 32), torch.arange(2000) < 1960, 0, torch.float32)
    plan, costs = hybrid_plan(prefill), Costs.of(config, 32, torch.float32)
    full = 2000 * 16 * 2 * 32 * 4
    tables = 16 * (plan.whole_pages + 1) * costs.entry
    assert budget * full - costs.page - tables < plan.step_bytes(costs) <= budget * full


def test_an_impossible_budget_says_what_is_possible():
    config = HybridConfig(budget=0.1)
    prefill = random_prefill(config, 2, (2, 2, 300, 32), torch.arange(300) < 200, 0, torch.float32)
    with pytest.raises(BudgetError, match=r"104 of the 300 prompt tokens .* takes (0\.\d+)") as error:
        hybrid_plan(prefill)
    least = float(str(error.value).split("takes ")[1].split()[0])
    enough = HybridConfig(budget=least)
    plan = hybrid_plan(random_prefill(enough, 2, (2, 2, 300, 32), torch.arange(300) < 200, 0, torch.float32))
    assert plan.dynamic.any() and plan.step_bytes(Costs.of(enough, 32, torch.float32)) <= least * 300 * 4 * 2 * 32 * 4
    short = HybridConfig(budget=least - 0.01)
    with pytest.raises(BudgetError):  # it is really the least, to the percent that it is rounded to
        hybrid_plan(random_prefill(short, 2, (2, 2, 300, 32), torch.arange(300) < 200, 0, torch.float32))


def test_a_budget_that_is_not_strict_keeps_what_must_be_kept_and_no_more():
    config = HybridConfig(budget=0.1, strict=False)
    prefill = random_prefill(config, 2, (2, 2, 300, 32), torch.arange(300) < 200, 0, torch.float32)
    plan = hybrid_plan(prefill)
    assert (plan.n_read[~plan.dynamic] == plan.always_pages).all() and (plan.n_retrieve[plan.dynamic] == 1).all()
    nothing = random_prefill(config, 1, (1, 1, 50, 8), torch.zeros(50, dtype=torch.bool), 0, torch.float32)
    assert hybrid_plan(nothing).whole.all()
    roomy = HybridConfig(budget=0.6, strict=False)
    prefill = random_prefill(roomy, 2, (2, 2, 300, 32), torch.arange(300) < 200, 0, torch.float32)
    assert hybrid_plan(prefill).step_bytes(Costs.of(roomy, 32, torch.float32)) <= 0.6 * 300 * 4 * 2 * 32 * 4


@pytest.mark.parametrize("strict", [True, False])
def test_where_nothing_can_be_saved_the_full_cache_is_the_answer(strict):
    """No budget below 1 could be met, and none above is allowed."""
    config = HybridConfig(strict=strict)
    prefill = random_prefill(config, 1, (1, 1, 50, 8), torch.zeros(50, dtype=torch.bool), 0, torch.float32)
    plan = hybrid_plan(prefill)
    assert plan.no_room and plan.whole.all() and not plan.dynamic.any()
    assert full_plan(prefill).whole.all() and not full_plan(prefill).no_room


@pytest.mark.parametrize(
    "wrong",
    [
        dict(budget=0), dict(budget=1.1), dict(page_size=8), dict(page_size=48),
        dict(dynamic_share=1.5), dict(threshold=-1), dict(dynamic_weight=0), dict(sketch_rank=0), dict(sketch_rank=6),
        dict(window=0), dict(pool=4), dict(pool_weight=0), dict(pool_side=2), dict(sinks=-1),
        dict(classifier="guess"), dict(score="sum"), dict(retrieval="all"), dict(group="sum"),
    ],
    ids=str,
)  # fmt: skip
def test_configurations_that_make_no_sense(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        HybridConfig(**wrong)


def test_a_sketch_can_not_have_more_dimensions_than_the_keys():
    with pytest.raises(ValueError, match="sketch_rank of 64 is above head_dim 32"):
        HybridConfig(sketch_rank=64).rank(32)


# prune


def test_kept_tokens_are_those_the_text_points_at_with_their_neighbours():
    score = torch.tensor([[0.0, 0.9, 0.1, 0.0, 0.0, 0.0, 0.8, 0.0, 1.0]])
    prunable = torch.tensor([False] + [True] * 7 + [False])
    assert keep_order(score, prunable)[0].tolist()[:4] == [0, 8, 1, 6]
    near = pooled(score.masked_fill(~prunable, 0), 3)
    assert set(keep_order(near, prunable)[0, :4].tolist()) == {0, 8, 1, 2}  # 1, and 2 beside it; 8 lends nothing
    assert pooled(score, 3)[0].tolist() == pytest.approx([0.9, 0.9, 0.9, 0.1, 0.0, 0.8, 0.8, 1.0, 1.0])


@examples(100)
@given(st.integers(1, 40), st.sampled_from([1, 3, 15]), st.sampled_from([0.1, 0.5, 1.0]), st.integers(0, 99))
def test_neighbours_in_text_count_by_their_weight(tokens, width, weight, seed):
    score = torch.rand(2, tokens, generator=torch.Generator().manual_seed(seed))
    out = pooled(score, width, weight)
    for head, t in np.ndindex(2, tokens):
        near = score[head, max(0, t - width // 2) : t + width // 2 + 1]
        assert out[head, t] == max(score[head, t], weight * near.max())
    assert torch.equal(score, torch.rand(2, tokens, generator=torch.Generator().manual_seed(seed)))  # not written to


@examples(100)
@given(st.integers(1, 2), st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 3, 5]), st.integers(0, 99))
def test_pictures_are_pooled_along_both_sides(t, h, w, side, seed):
    score = torch.rand(2, 5 + t * h * w + 3, generator=torch.Generator().manual_seed(seed))
    out = pooled(score, 3, side=side, spans=[(5, t, h, w)])
    reach = side // 2
    for head, f, r, c in np.ndindex(2, t, h, w):
        picture = score[head, 5 : 5 + t * h * w].view(t, h, w)[f]
        near = picture[max(0, r - reach) : r + reach + 1, max(0, c - reach) : c + reach + 1]
        assert out[head, 5 + (f * h + r) * w + c] == near.max()
    assert torch.equal(out[:, :4], pooled(score, 3)[:, :4])


# retrieve


@examples(100)
@given(st.integers(1, 2), st.integers(1, 12), st.integers(1, 12), st.sampled_from([16, 32, 64]), st.integers(0, 6))
def test_tiles_hold_neighbours_and_every_token_once(t, h, w, page_size, text):
    prunable = torch.ones(text + t * h * w + 3, dtype=torch.bool)
    prunable[: text // 2] = False
    order = tile_order(prunable, [(text, t, h, w)], page_size)
    assert sorted(order.tolist()) == prunable.nonzero()[:, 0].tolist()
    high = {16: 4, 32: 4, 64: 8}[page_size]
    wide = page_size // high
    tiles = [
        text + (f * h + r) * w + c
        for f in range(t)
        for R in range(0, h, high)
        for C in range(0, w, wide)
        for r in range(R, min(R + high, h))
        for c in range(C, min(C + wide, w))
    ]
    inside = [i for i in order.tolist() if text <= i < text + t * h * w]
    assert inside == tiles


@examples(100)
@given(st.integers(1, 3), st.integers(20, 200), st.sampled_from([8, 32]), st.integers(0, 99))
def test_a_full_rank_sketch_is_a_rotation(lanes, tokens, dim, seed):
    """With all dimensions only int8 rounding is lost: half a step in each coordinate."""
    k = torch.randn(lanes, tokens, dim, generator=torch.Generator().manual_seed(seed))
    basis, offset, step = fit_sketch(k, dim)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(dim).expand(lanes, -1, -1), atol=1e-4, rtol=0)
    z = encode(k, basis, offset, step)
    assert z.dtype == torch.int8 and int(z.abs().max()) == 127
    back = z * step[:, None] + offset[:, None]
    assert ((back - k @ basis).abs() <= step[:, None] * 0.5001 + 1e-5).all()


def test_words_hold_four_bytes():
    z = torch.randint(-128, 128, (5, 3, 12)).to(torch.int8)
    words = to_words(z)
    assert words.shape == (5, 3, 3) and words.dtype == torch.int32
    assert torch.equal(words, z.contiguous().view(torch.int32))  # on a little-endian machine: the bytes as they lie
    for j in range(4):
        assert torch.equal(from_words(words, j), z[..., j::4].float())


@examples(100)
@given(st.integers(1, 4), st.integers(1, 7), st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_sums_written_out_are_those_of_the_matmul(lanes, group, chunks, n_words, seed):
    generator = torch.Generator().manual_seed(seed)
    rank = 4 * n_words
    q = torch.randn(lanes, group, rank, generator=generator)
    z = torch.randint(-127, 128, (lanes, chunks, 16, rank), generator=generator).to(torch.int8)
    sketch = pack_sketch(z.flatten(0, 2), 16)  # (lanes * chunks, words, 16)
    table = torch.arange(lanes * chunks).view(lanes, chunks)
    # Sums of `rank` products, each at most 127 |q|, in another order.
    bound = 2 * rank**2 * torch.finfo(torch.float32).eps * 127 * float(q.abs().max())
    torch.testing.assert_close(token_scores(q, sketch, table), written_out(q, sketch, table), atol=bound, rtol=0)
    # In half precision, as on GPUs: one rounding of a sum of `rank` products.
    half, rounded = q.half(), q.half().float()
    bound = rank * torch.finfo(torch.float16).eps * 127 * float(q.abs().max())
    scores = token_scores(half, sketch, table)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, token_scores(rounded, sketch, table), atol=bound, rtol=0)


@examples(100)
@given(st.integers(1, 4), st.integers(1, 7), st.integers(1, 12), st.sampled_from([16, 32]), st.integers(0, 99))
def test_sketch_scores_are_the_attention_mass_of_the_sketched_keys(lanes, group, chunks, page_size, seed):
    generator = torch.Generator().manual_seed(seed)
    dim, rank, tokens = 16, 8, chunks * page_size
    q = torch.randn(lanes, group, dim, generator=generator)
    k = torch.randn(lanes, tokens, dim, generator=generator)
    basis, offset, step = fit_sketch(k, rank)
    z = encode(k, basis, offset, step)
    pool = torch.zeros(1 + lanes * chunks, rank // 4, page_size, dtype=torch.int32)
    table = torch.randperm(lanes * chunks, generator=generator).view(lanes, chunks) + 1
    for lane in range(lanes):
        pool[table[lane]] = pack_sketch(z[lane], page_size)
    valid = torch.randint(0, chunks + 1, (lanes,), generator=generator)
    scores = sketch_scores(q, pool, table, valid, basis, step)

    approximate = (z * step[:, None] + offset[:, None]) @ basis.mT  # (L, T, D)
    for lane in range(lanes):
        n = int(valid[lane])
        assert (scores[lane, n:] == -1).all()
        if n:
            weights = (q[lane] @ approximate[lane, : n * page_size].T * dim**-0.5).softmax(-1)
            mass = weights.view(group, n, page_size).sum(-1).mean(0)
            torch.testing.assert_close(scores[lane, :n], mass, atol=1e-5, rtol=1e-4)
            assert select(scores, valid.clamp(max=1), 1)[lane].tolist() == [int(scores[lane].argmax())]


@examples(100)
@given(st.integers(1, 4), st.integers(1, 7), st.integers(1, 12), st.integers(0, 99))
def test_bounds_are_above_every_exact_score(lanes, group, chunks, seed):
    """Before the softmax over chunks, Quest's score is at least that of the chunk's best key."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(lanes, group, 8, generator=generator)
    k = torch.randn(lanes, chunks, 16, 8, generator=generator)
    low, high = (torch.cat((torch.zeros(1, 8), t.reshape(-1, 8))) for t in (k.amin(2), k.amax(2)))
    table = torch.arange(lanes * chunks).view(lanes, chunks) + 1
    scores = bound_scores(q, low, high, table, torch.full((lanes,), chunks))
    sides = torch.maximum(q[:, :, None] * k.amin(2)[:, None], q[:, :, None] * k.amax(2)[:, None]).sum(-1) * 8**-0.5
    best = (q[:, :, None, None] * k[:, None]).sum(-1).amax(-1) * 8**-0.5  # (L, G, C)
    assert (sides >= best - 1e-5).all()
    torch.testing.assert_close(scores, sides.softmax(-1).mean(1))


def test_the_sketch_finds_most_of_the_attention():
    """A tenth of the chunks, chosen by a sketch of a quarter of the dimensions, against the best tenth."""
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.logspace(0, -1.5, 64)  # the variance of real keys falls fast over their principal directions
    k = (torch.randn(4000, 64, generator=generator) * spectrum @ torch.randn(64, 64, generator=generator))[None]
    q = torch.randn(1, 50, 64, generator=generator) * 0.5
    basis, offset, step = fit_sketch(k, 16)
    pool, table = pack_sketch(encode(k, basis, offset, step)[0], 16), torch.arange(250)[None]
    exact = (q[0] @ k[0].T * 64**-0.5).softmax(-1).view(50, 250, 16).sum(-1)
    found = best = 0.0
    all25 = torch.tensor([25])
    for i in range(50):
        mass = sketch_scores(q[:, i : i + 1], pool, table, torch.tensor([250]), basis, step)
        chosen = select(mass, all25, 25)[0]
        found += float(exact[i, chosen].sum())
        best += float(exact[i].topk(25).values.sum())
    assert best > 2 * 50 * 0.1  # attention is not spread evenly: a random tenth would find a tenth
    assert found > 0.9 * best


@st.composite
def masses(draw) -> tuple[torch.Tensor, torch.Tensor]:
    """Masses (R, C) of a kind that real ones can be, -1 where there is no chunk, and how many (R,) are wanted."""
    rows, columns, seed = draw(st.integers(1, 4)), draw(st.integers(1, 200)), draw(st.integers(0, 10**6))
    generator = torch.Generator().manual_seed(seed)
    mass = torch.rand(rows, columns, generator=generator)
    match draw(st.sampled_from(["uniform", "equal", "one-hot", "subnormal", "softmax", "steep", "odd"])):
        case "equal":
            mass = torch.full((rows, columns), 1 / columns)
        case "one-hot":
            mass = torch.zeros(rows, columns).scatter(1, (mass[:, :1] * columns).long(), 1.0)
        case "subnormal":
            mass = mass * 1e-42
        case "softmax":
            mass = (20 * mass).softmax(-1)
        case "steep":
            mass = mass ** draw(st.sampled_from([2, 30, 200]))
        case "odd":
            mass[mass < 0.2] = float("nan")
            mass[mass > 0.9] = float("inf")
    valid = torch.tensor(draw(st.lists(st.integers(0, columns), min_size=rows, max_size=rows)))
    mass = mass.to(draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])))
    wanted = torch.tensor([draw(st.integers(0, n)) for n in valid.tolist()])
    return mass.masked_fill(torch.arange(columns) >= valid[:, None], -1.0), wanted


@examples(300)
@given(masses(), st.integers(0, 3))
def test_what_is_chosen_without_a_sort_is_within_a_percent_of_the_best(case, spare):
    """Exactly as many as wanted, none twice, only real chunks, the first of equal ones; no mass far below the best."""
    mass, wanted = case
    found = by_threshold(mass, wanted, int(wanted.max()) + spare)
    for row, k, columns in zip(mass.float(), wanted.tolist(), found, strict=True):
        chosen = columns[:k].tolist()
        assert chosen == sorted(set(chosen)) and (row[chosen] != -1).all()
        assert not columns[k:].any()
        if not k:
            continue
        value = row.nan_to_num(0.0)  # NaN counts as nothing
        best, got = value.topk(k).values, value[chosen].sort(descending=True).values
        tiny = torch.finfo(torch.float32).tiny  # below it, floats have fewer digits
        assert (got >= best * (1 - 1 / 128) - tiny)[best.isfinite()].all() and (got.isinf() == best.isinf()).all()
        left = [c for c in range(len(row)) if row[c] != -1 and c not in chosen]
        worst = int(min(chosen, key=lambda c: (value[c], -c)))
        assert all(c > worst for c in left if value[c] == value[worst])


def test_both_ways_of_summing_scores_give_the_same_shares():
    """Chunks that are not valid come to nothing in both. Scores up to 50, so each of three roundings is within 2e-6."""
    score = 100 * torch.rand(3, 7, 11, 16) - 50
    score[:, :, 8:] = -1e30
    one, other = (weight / weight.sum(-1, keepdim=True) for weight in (summed_at_once(score), summed_by_chunk(score)))
    torch.testing.assert_close(one, other, rtol=2e-5, atol=0)
    assert not other[:, :, 8:].any()


@pytest.mark.parametrize("group", ["mean", "max"])
def test_exact_scores_are_the_attention_on_each_chunk(group):
    """Two lanes with pages in another order, against a softmax over their own keys."""
    q, k = torch.randn(2, 3, 8), torch.randn(2, 48, 8)
    pages = [torch.tensor([5, 2, 7]), torch.tensor([1, 6, 3])]
    summary = ExactKeys(8, 3, 8, HybridConfig(retrieval="exact", group=group), k)
    summary.pack(k, pages, torch.tensor([1, 2]), 3)
    chunks = torch.cat([torch.stack(pages), torch.tensor([[4], [4]])], 1)  # a last column that is not valid
    scores = summary.scores(q, chunks, torch.tensor([3, 2]), torch.tensor([1, 2]))
    for lane, valid in enumerate((3, 2)):
        share = (q[lane] @ k[lane, : valid * 16].T / 8**0.5).softmax(-1).view(3, valid, 16).sum(-1)  # (G, chunks)
        expected = share.mean(0) if group == "mean" else share.amax(0)
        torch.testing.assert_close(scores[lane, :valid], expected)
        assert (scores[lane, valid:] == -1).all()
