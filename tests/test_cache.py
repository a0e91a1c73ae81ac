"""The invariants of the design, as properties over random prompts, plans and shapes. Uncompiled; see test_compiled."""

import pytest
import torch
from hypothesis import assume, event, given
from hypothesis import strategies as st

from hybridkv import BudgetError, Capacity, HybridCache, HybridConfig, Prefill, full_plan, hybrid_plan
from hybridkv.cache.capacity import bucket
from hybridkv.cache.dense import dense_slots
from hybridkv.cache.hybrid import LANE_TABLES, ROW_TABLES
from hybridkv.cache.sketch import encode, from_words
from tests.lab import (
    Bench,
    at,
    attention,
    check,
    chunks_of,
    configs,
    examples,
    fixed_of,
    frames_of,
    kinds,
    pages_read,
    plan_or_none,
    prompts,
    random_prefill,
    shapes,
    tail_of,
)


@examples(100)
@given(
    masks=st.lists(prompts(), min_size=1, max_size=3),
    config=configs,
    shape=shapes,
    layers=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    steps=st.integers(1, 40),
    seed=st.integers(0, 999),
)
def test_output_is_dense_attention_with_the_explicit_mask(masks, config, shape, layers, dtype, steps, seed):
    """From the first token to the last, over page borders, for batches of different lengths and plans."""
    heads, group, dim = shape
    assume(config.sketch_rank is None or config.sketch_rank <= dim)
    prefills = [
        random_prefill(config, layers, (heads, group, len(m), dim), m, seed + i, dtype) for i, m in enumerate(masks)
    ]
    plans = [plan_or_none(p) or full_plan(p) for p in prefills]
    event(kinds(plans))
    bench = Bench(prefills, plans, steps, seed)
    for _ in range(steps):
        check(bench.step(group))


@examples(60)
@given(mask=prompts(), config=configs, shape=shapes, steps=st.integers(1, 20), seed=st.integers(0, 999))
def test_everything_kept_is_full_attention(mask, config, shape, steps, seed):
    """Budget 1.0, and dynamic lanes that retrieve every chunk, see every token: prompt and generated."""
    heads, group, dim = shape
    assume(config.sketch_rank is None or config.sketch_rank <= dim)
    prefill = random_prefill(config, 2, (heads, group, len(mask), dim), mask, seed, torch.float32)
    plan = plan_or_none(prefill) or full_plan(prefill)
    if config.budget == 1:
        assert plan.whole.all()
    else:  # every lane may read all pages: what was planned as dynamic stays so, and retrieves them all
        plan.n_read[:] = plan.whole_pages
    bench = Bench([prefill], [plan], steps, seed)
    for _ in range(min(steps, config.page_size - int(plan.fill.max()))):  # until a dynamic lane closes a page
        check(bench.step(group))
        for layer in range(2):
            for lane in range(heads):
                assert len(bench.slot_of[layer][lane]) == len(bench.k[layer][lane])


@examples(100)
@given(mask=prompts(), config=configs, shape=shapes, seed=st.integers(0, 999))
def test_error_is_bounded_by_the_mass_left_out(mask, config, shape, seed):
    """If the tokens left out hold attention mass m, the output moves by at most 2 m max|v|."""
    heads, group, dim = shape
    assume(config.sketch_rank is None or config.sketch_rank <= dim)
    prefill = random_prefill(config, 1, (heads, group, len(mask), dim), mask, seed, torch.float32)
    plan = plan_or_none(prefill)
    assume(plan is not None)
    bench = Bench([prefill], [plan], 1, seed)
    ((_, kept, _),) = bench.step(group)
    q = torch.randn(1, heads * group, 1, dim, generator=torch.Generator().manual_seed(seed))  # the bench's first draw
    for lane in range(heads):
        k, v = bench.k[0][lane], bench.v[0][lane]
        query = q.view(-1, group, dim)[lane]
        full = attention(query, k, v)
        slots = bench.slot_of[0][lane]
        bench.cache._to_read(*at(bench.cache, 0), q.view(-1, group, dim))
        read = pages_read(bench.cache, 0, q.view(-1, group, dim))[lane]
        seen = [t for t, s in slots.items() if s // config.page_size in read]
        weights = torch.softmax(query.double() @ k.double().T * dim**-0.5, -1)
        left_out = 1 - weights[:, seen].sum(-1)
        moved = (kept[lane] - full).abs().amax(-1)
        assert (moved <= 2 * left_out * v.double().abs().max() + 1e-9).all()


@examples(60)
@given(
    masks=st.lists(prompts(), min_size=1, max_size=3),
    config=configs,
    shape=shapes,
    steps=st.integers(0, 50),
    seed=st.integers(0, 99),
)
def test_no_slot_has_two_owners(masks, config, shape, steps, seed):
    """Each page in use belongs to one lane, as a chunk, a fixed page or a tail; the null page to none."""
    heads, group, dim = shape
    assume(config.sketch_rank is None or config.sketch_rank <= dim)
    prefills = [random_prefill(config, 2, (heads, group, len(m), dim), m, seed, torch.float32) for m in masks]
    plans = [plan_or_none(p) or full_plan(p) for p in prefills]
    cache = HybridCache(Capacity.of(plans, steps), len(masks), prefills[0])
    cache.load(prefills, plans, steps)
    active = torch.ones(len(masks), dtype=torch.bool)
    for step in range(steps + 1):
        pages, retrieved = [], []
        for layer in range(2):
            for lane in range(len(masks) * heads):
                pages += [tail_of(cache, layer, lane), *fixed_of(cache, layer, lane), *frames_of(cache, layer, lane)]
                retrieved += chunks_of(cache, layer, lane)
        assert len({*pages, *retrieved}) == len(pages) + len(retrieved)
        host, store = cache.capacity.n_pages * cache.capacity.host, cache.capacity.n_store
        assert all(host < p < host + store for p in retrieved)
        assert 0 not in pages and max(cache.tail.max(), *pages) < cache.capacity.n_pages + host + store
        assert (cache.fill < config.page_size).all()
        if step < steps:
            cache.advance(active)


@examples(100)
@given(mask=prompts(400), config=configs, shape=shapes, layers=st.integers(1, 4), seed=st.integers(0, 999))
def test_budget_is_never_exceeded_and_floors_hold(mask, config, shape, layers, seed):
    heads, group, dim = shape
    assume(config.sketch_rank is None or config.sketch_rank <= dim)
    prefill = random_prefill(config, layers, (heads, group, len(mask), dim), mask, seed, torch.float32)
    always = (~prefill.prunable).nonzero()[:, 0].tolist()
    try:
        plan = hybrid_plan(prefill)
    except BudgetError as error:
        assert "can't be met" in str(error)
        return
    bench = Bench([prefill], [plan], 1, seed)
    cost = bench.cache.count_bytes()
    if config.budget < 1 and not plan.no_room:
        assert cost.step <= cost.budget <= config.budget * cost.full
    assert cost.resident <= cost.allocated
    for layer in range(layers):
        for lane in range(heads):
            assert set(always) <= set(bench.slot_of[layer][lane])  # sinks, question and recent tokens are there
            whole = plan.whole[layer, lane]
            if whole or plan.dynamic[layer, lane]:
                assert len(bench.slot_of[layer][lane]) == len(mask)  # nothing is dropped
            else:
                assert len(bench.slot_of[layer][lane]) == int(plan.n_read[layer, lane]) * config.page_size
    # Always-kept tokens are never left to retrieval.
    for layer, lane in plan.dynamic.nonzero().tolist():
        chunks = set(chunks_of(bench.cache, layer, lane))
        chunks.add(tail_of(bench.cache, layer, lane))
        assert all(bench.slot_of[layer][lane][t] // config.page_size not in chunks for t in always)


@examples(25)
@given(
    masks=st.lists(prompts(), min_size=2, max_size=3),
    config=configs,
    shape=shapes,
    seed=st.integers(0, 99),
    steps=st.integers(1, 25),
)
def test_a_batch_is_each_sequence_alone(masks, config, shape, seed, steps):
    heads, group, dim = shape
    assume(config.sketch_rank is None or config.sketch_rank <= dim)

    def prefill(i: int) -> Prefill:
        return random_prefill(config, 2, (heads, group, len(masks[i]), dim), masks[i], seed + i, torch.float32)

    plans = [plan_or_none(prefill(i)) or full_plan(prefill(i)) for i in range(len(masks))]
    together = Bench([prefill(i) for i in range(len(masks))], plans, steps, seed)
    alone = [Bench([prefill(i)], [plans[i]], steps, seed) for i in range(len(masks))]
    draws = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for layer in range(2):
            q, k, v = (torch.randn(len(masks), n, 1, dim, generator=draws) for n in (heads * group, heads, heads))
            out = together.cache[layer](q, k, v)
            for i, single in enumerate(alone):
                # The same numbers in the same order; only how many share a call differs.
                torch.testing.assert_close(
                    out[i : i + 1], single.cache[layer](q[i : i + 1], k[i : i + 1], v[i : i + 1])
                )
        together.cache.advance(torch.ones(len(masks), dtype=torch.bool))
        for single in alone:
            single.cache.advance(torch.ones(1, dtype=torch.bool))


@examples(60)
@given(masks=st.lists(prompts(), min_size=1, max_size=3), config=configs, shape=shapes, steps=st.integers(0, 40))
def test_every_byte_is_accounted_for(masks, config, shape, steps):
    """Resident, new and spare bytes add up to the tensors that the cache holds; a step's to what its tables list."""
    heads, group, dim = shape
    assume(config.retrieval != "exact")  # the oracle holds more than it is charged for, by design
    assume(config.sketch_rank is None or config.sketch_rank <= dim)
    prefills = [random_prefill(config, 2, (heads, group, len(m), dim), m, 0, torch.float32) for m in masks]
    plans = [plan_or_none(p) or full_plan(p) for p in prefills]
    cache = HybridCache(Capacity.of(plans, 40), len(masks), prefills[0])
    cache.load(prefills, plans, 40)
    assert cache.count_bytes().step == listed_bytes(cache)
    for _ in range(steps):
        cache.advance(torch.ones(len(masks), dtype=torch.bool))
    cost, costs = cache.count_bytes(), cache.costs
    host = {"store.keys", "store.values"}
    held = sum(t.nbytes for name, t in cache.named_buffers() if name not in host)
    assert cost.allocated == held == cache.capacity.device_bytes(costs, cache.row.shape[1])
    assert cost.host == sum(t.nbytes for name, t in cache.named_buffers() if name in host)
    mine, full = Capacity.of(plans, None), cache.capacity
    room = (full.n_pages - mine.n_pages) * (costs.page + full.host * costs.entry)
    room += (full.n_store - mine.n_store) * costs.summary
    assert cost.allocated == cost.resident + room and cost.new <= room
    assert cost.full == sum(2 * len(m) * 2 * heads * dim * 4 for m in masks)


def listed_bytes(cache: HybridCache) -> int:
    """What the next step reads, counted from its tables and the tensors they point into."""
    host = cache.capacity.host
    pages = int((cache.n_full + (cache.fill > 0)).sum() + cache.n_retrieve.sum() * (not host))  # a tail is read whole
    read = pages * cache.costs.page
    dynamic = int((cache.row > 0).sum())
    entries = len(LANE_TABLES) * cache.tail.numel() + (len(ROW_TABLES) + 2 * host) * dynamic  # with the second run
    entries += int(cache.n_retrieve.sum()) * host  # what the frames hold
    read += entries * cache.tail.itemsize
    per_chunk = ("sketch", "low", "high")
    for name, tensor in cache.summary.named_buffers():
        if name in per_chunk:
            read += int(cache.n_chunks.sum()) * tensor.nbytes // cache.capacity.n_store
        else:
            read += dynamic * tensor[0].nbytes if dynamic else 0
    return read


def test_an_ended_sequence_takes_no_more_pages():
    config = HybridConfig(budget=0.5)
    mask = torch.arange(200) < 190
    prefills = [random_prefill(config, 2, (2, 2, 200, 16), mask, i, torch.float32) for i in range(2)]
    bench = Bench(prefills, [hybrid_plan(p) for p in prefills], 100)
    before = bench.cache.tail.clone()
    for _ in range(100):
        bench.cache.advance(torch.tensor([True, False]))
    assert (bench.cache.tail[:, :2] != before[:, :2]).all()
    assert (bench.cache.tail[:, 2:] == before[:, 2:]).all()


def test_generated_pages_become_retrievable_for_dynamic_lanes_and_fixed_for_static_ones():
    config = HybridConfig(budget=0.5, recent=0)
    mask = torch.arange(256) < 240
    prefill = random_prefill(config, 2, (2, 2, 256, 16), mask, 0, torch.float32)
    plan = hybrid_plan(prefill)
    bench = Bench([prefill], [plan], 64)
    for _ in range(33):
        check(bench.step(2))
    dynamic = plan.dynamic
    assert dynamic.any() and not dynamic.all()
    for layer, lane in dynamic.nonzero().tolist():
        assert len(chunks_of(bench.cache, layer, lane)) == plan.lane_chunks + 2
    assert (bench.cache.n_full == (plan.n_fixed + ~dynamic * 2)).all()
    cost = bench.cache.count_bytes()
    assert cost.new == 3 * 4 * bench.cache.costs.page + int(dynamic.sum()) * 3 * bench.cache.costs.summary


@examples(40)
@given(
    mask=prompts(),
    shape=shapes,
    retrieval=st.sampled_from(["sketch", "bound", "exact"]),
    store=st.sampled_from(["device", "host"]),
    steps=st.integers(0, 40),
)
def test_summaries_are_those_of_the_keys_they_stand_for(mask, shape, retrieval, store, steps):
    """For prompt and generated tokens, in full chunks and in the tail, after any number of appended tokens."""
    heads, group, dim = shape
    config = HybridConfig(budget=0.5, dynamic_share=1.0, retrieval=retrieval, store=store)
    prefill = random_prefill(config, 2, (heads, group, len(mask), dim), mask, 0, torch.float32)
    plan = plan_or_none(prefill)
    assume(plan is not None and plan.dynamic.any())
    bench = Bench([prefill], [plan], steps)
    for _ in range(steps):
        bench.step(group)
    cache, size = bench.cache, config.page_size
    assert cache[0] and cache[1]  # the next step sums up the last token
    for layer, lane in plan.dynamic.nonzero().tolist():
        row, fill, tail = int(cache.row[layer, lane]), int(cache.fill[layer, lane]), tail_of(cache, layer, lane)
        row += cache.retrieving.tolist().index(layer) * cache.capacity.rows - 1
        token_at = {slot: token for token, slot in bench.slot_of[layer][lane].items()}
        full = [(page, size) for page in chunks_of(cache, layer, lane)]
        for page, count in [*full, (tail, fill)]:
            if not count:
                continue
            k = bench.k[layer][lane][[token_at[page * size + i] for i in range(count)]]  # (count, D)
            page -= cache.capacity.host * cache.capacity.n_pages
            if retrieval == "bound":
                assert torch.equal(cache.summary.low[page], k.amin(0))
                assert torch.equal(cache.summary.high[page], k.amax(0))
            elif retrieval == "exact":
                assert torch.equal(cache.summary.keys[page * size : page * size + count], k)
            else:
                parts = (t[row : row + 1] for t in (cache.summary.basis, cache.summary.offset, cache.summary.step))
                words = cache.summary.sketch.view(-1, cache.summary.words, size)[page, :, :count].T
                z = torch.stack([from_words(words, j) for j in range(4)], -1).flatten(1)
                # One step of int8 either way: products of other shapes may round differently at the middle.
                assert int((z.int() - encode(k[None], *parts)[0].int()).abs().max()) <= 1


@pytest.mark.parametrize("store", ["device", "host"])
def test_loading_another_prompt_replaces_the_first(store):
    config = HybridConfig(budget=0.5, store=store)
    shapes = [(2, 2, 300, 16), (2, 2, 260, 16)]
    first, second = (
        random_prefill(config, 2, s, torch.arange(s[2]) < s[2] - 20, i, torch.float32) for i, s in enumerate(shapes)
    )
    bench = Bench([first], [hybrid_plan(first)], 40)
    for _ in range(20):
        bench.step(2)
    plan = hybrid_plan(second)
    fresh = Bench([random_prefill(config, 2, shapes[1], torch.arange(260) < 240, 1, torch.float32)], [plan], 40)
    bench.cache.load([second], [plan], 40)
    for layer in range(2):
        q, k, v = (torch.randn(1, n, 1, 16) for n in (4, 2, 2))
        torch.testing.assert_close(bench.cache[layer](q, k, v), fresh.cache[layer](q, k, v))


def test_load_frees_the_dense_tensors_and_checks_its_arguments():
    config = HybridConfig(budget=0.5)
    prefill = random_prefill(config, 1, (2, 1, 200, 16), torch.arange(200) < 180, 0, torch.float32)
    plan = hybrid_plan(prefill)
    cache = HybridCache(Capacity.of([plan], 8), 1, prefill)
    with pytest.raises(ValueError, match="for 1 sequences got 2"):
        cache.load([prefill, prefill], [plan, plan], 8)
    with pytest.raises(ValueError, match="do not go with"):
        cache.load([prefill, prefill], [plan], 8)
    with pytest.raises(ValueError, match="do not fit"):
        cache.load([prefill], [plan], 5000)
    cache.load([prefill], [plan], 8)
    assert prefill.layers == [None]


@given(st.integers(1, 10**7))
def test_bucket_wastes_at_most_an_eighth(n):
    assert n <= bucket(n) <= n * 9 / 8 + 1
    assert bucket(bucket(n)) == bucket(n)


@given(st.integers(1, 10**7))
def test_the_full_cache_that_ours_is_compared_with_reads_hardly_more_than_its_tokens(n):
    assert n <= dense_slots(n) <= n * 65 / 64 + 15 and dense_slots(n) % 16 == 0
    assert dense_slots(dense_slots(n)) == dense_slots(n)
