"""Every policy on one engine: the same budget, the same floors, and the tokens that its paper would keep."""

from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from demo.tiny_vlm import config as tiny_config
from demo.tiny_vlm import random_model
from hybridkv import BudgetError, Engine, HybridConfig, Prefill
from hybridkv.planning.plan import Costs, Plan, check_plan
from hybridkv.planning.policies import POLICIES, adakv, lookm, madakv, pyramidkv, quest, snapkv, sparsemm, streaming
from tests.lab import Bench, check, examples, head_profile, prompt, prompts, random_prefill

TOKENS = 800
MASK = torch.arange(TOKENS) < TOKENS - 20


def prefill(config: HybridConfig, layers: int = 4, heads: int = 2):
    return random_prefill(config, layers, (heads, 2, TOKENS, 16), MASK, 0, torch.float32)


def replace_config(record: Prefill, **changes) -> Prefill:
    """The same record under another configuration."""
    other = Prefill(record.prunable, replace(record.config, **changes))
    other.layers, other.like = list(record.layers), record.like
    return other


def kept(record: Prefill, plan: Plan, layer: int, head: int) -> set[int]:
    return set(plan.order(record, layer)[head, : int(plan.n_read[layer, head]) * plan.page_size].tolist())


@examples(60)
@given(
    st.sampled_from(sorted(POLICIES)), prompts(), st.sampled_from([0.3, 0.5, 0.8]), st.integers(0, 99), st.booleans()
)
def test_each_policy_obeys_the_budget_and_decodes_exactly_what_it_planned(name, mask, budget, seed, bounds):
    retrieval = "bound" if bounds or name == "quest" else "sketch"
    config = HybridConfig(budget=budget, strict=False, retrieval=retrieval, head_profile=head_profile(2, 2))
    record = random_prefill(config, 2, (2, 3, len(mask), 16), mask, seed, torch.float32)
    plan, costs = POLICIES[name](record), Costs.of(config, 16, torch.float32)
    full = len(mask) * 4 * 2 * 16 * 4
    if name != "full":
        with suppress(BudgetError):  # the budget can't be met: `plan` keeps the least that it may
            strict = replace_config(record, strict=True)
            least = POLICIES[name](strict)
            check_plan(least, strict)
            assert least.no_room or least.step_bytes(costs) <= budget * full
    bench = Bench([record], [plan], 18, seed)
    for _ in range(18):
        check(bench.step(3))


@pytest.mark.parametrize("name", sorted(set(POLICIES) - {"full"}))
def test_all_read_as_much_as_the_budget_allows(name):
    """To the page, and up to what longer tables were charged: no policy is handicapped by the engine."""
    retrieval = "bound" if name == "quest" else "sketch"
    config = HybridConfig(budget=0.3, retrieval=retrieval, head_profile=head_profile(4, 2))
    plan, costs = POLICIES[name](prefill(config)), Costs.of(config, 16, torch.float32)
    full = TOKENS * 8 * 2 * 16 * 4
    assert 0.3 * full - costs.page - 8 * (plan.whole_pages + 1) * costs.entry < plan.step_bytes(costs) <= 0.3 * full


def test_streaming_keeps_the_first_and_the_last():
    record = prefill(HybridConfig(budget=0.3))
    plan = streaming(record)
    for layer in range(4):
        recent = int(plan.n_read[layer, 0]) * 16 - 4
        assert kept(record, plan, layer, 0) == {0, 1, 2, 3, *range(TOKENS - recent, TOKENS)}


def test_snapkv_keeps_what_the_window_attends_to_most():
    config = HybridConfig(budget=0.3, pool=1)
    record = prefill(config)
    record.layers[1].mean_score[0, 100:150] = 5.0
    plan = snapkv(record)
    assert set(range(100, 150)) <= kept(record, plan, 1, 0) and not set(range(100, 150)) <= kept(record, plan, 1, 1)
    assert int(plan.n_read.max() - plan.n_read.min()) <= 1  # equal shares, to the page


def test_lookm_does_not_pool_and_snapkv_does():
    config = HybridConfig(budget=0.3, pool=15)
    record = prefill(config)
    for layer in record.layers:
        layer.mean_score.zero_()
        layer.mean_score[:, 400] = 1.0
        layer.mean_score[:, 500:780] = 0.5  # more than the budget holds
    assert {393, 400, 407} <= kept(record, snapkv(record), 0, 0)
    unpooled = kept(record, lookm(record), 0, 0)
    assert 400 in unpooled and not {399, 401} & unpooled


@pytest.mark.parametrize("weight", [0.3, 1.0])
@pytest.mark.parametrize("name", ["hybridkv", "snapkv", "adakv", "madakv", "pyramidkv", "sparsemm"])
def test_neighbours_weigh_less_in_our_static_heads_and_as_much_in_policies_of_the_literature(name, weight):
    record = prefill(HybridConfig(budget=0.3, pool_weight=weight, head_profile=head_profile(4, 2)))
    for layer in record.layers:
        for score in (layer.score, layer.mean_score):
            score.zero_()
            score[:, 400] = 1.0
            score[:, 500:780] = 0.5  # more than the budget holds, and more than a neighbour is worth at 0.3
    plan = POLICIES[name](record)
    layer, head = (~plan.dynamic).nonzero()[0].tolist()
    reach = 0 if name == "hybridkv" and weight == 0.3 else 7
    assert kept(record, plan, layer, head) & set(range(380, 420)) == set(range(400 - reach, 401 + reach))


def test_pyramidkv_gives_the_first_layers_more():
    pages = pyramidkv(prefill(HybridConfig(budget=0.3))).n_read.sum(1)
    assert pages.tolist() == sorted(pages.tolist(), reverse=True) and pages[0] > 3 * pages[-1]


def test_adakv_gives_a_head_that_spreads_more_than_one_that_does_not():
    record = prefill(HybridConfig(budget=0.3, pool=1))
    for layer in record.layers:
        layer.mean_score[0] = 1.0  # this head's tokens are all among the layer's best
    pages = adakv(record).n_read
    assert (pages[:, 0] > 3 * pages[:, 1]).all() and (pages[:, 1] >= 2).all()


def test_madakv_gives_more_to_heads_that_look_at_pictures_and_layers_that_look_at_much_of_them():
    record = prefill(HybridConfig(budget=0.3))
    record.spans = [(200, 1, 20, 20)]
    for i, layer in enumerate(record.layers):
        layer.mean_score.fill_(0.0)
        layer.mean_score[0, 0] = 1.0  # text: this head has no use for pictures
        layer.mean_score[1, 200 : 200 + (400 if i == 2 else 8)] = 1 / (400 if i == 2 else 8)
    pages = madakv(record).n_read
    assert (pages[[0, 1, 3], 1] >= 2 * pages[[0, 1, 3], 0]).all()  # layer 2 has all that it can use
    others = pages.sum(1)[[0, 1, 3]]
    assert pages[2].sum() > 3 * others.max() and others.max() - others.min() <= 1
    assert {*range(200, 208)} <= kept(record, madakv(record), 0, 1)


def test_madakv_without_attention_shares_equally():
    record = prefill(HybridConfig(budget=0.3))
    for layer in record.layers:
        layer.mean_score.zero_()
    pages = madakv(record).n_read
    assert pages.max() - pages.min() <= 1


def test_sparsemm_gives_more_to_heads_that_look_at_pictures():
    profile = head_profile(4, 2)
    visual = profile.visual
    pages = sparsemm(prefill(HybridConfig(budget=0.4, head_profile=profile))).n_read
    assert (pages.flatten()[visual.flatten().argsort()].diff() >= 0).all() and pages.max() > pages.min()
    with pytest.raises(ValueError, match=r"hybridkv\.calibrate"):
        sparsemm(prefill(HybridConfig(budget=0.4)))


def test_quest_drops_nothing():
    plan = quest(prefill(HybridConfig(budget=0.3, retrieval="bound")))
    assert plan.dynamic.all() and (plan.n_retrieve > 0).all()


@pytest.fixture(scope="module")
def model():
    return random_model(tiny_config(layers=2, hidden_size=96, heads=6, kv_heads=2, head_dim=16, tie=False))


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_engines_run_every_policy(model, name):
    engine = Engine(model, HybridConfig(budget=0.4, head_profile=head_profile(2, 2)), name, compile=False)
    (result,) = engine.generate([prompt(500, 0)], 20)
    assert len(result.token_ids) == 20
    assert engine.stats.dynamic_heads == {"hybridkv": 1, "quest": 4}.get(name, 0)


@pytest.mark.compiles
def test_quest_compiled_is_quest_uncompiled(model):
    prompts = [prompt(500, 0), prompt(400, 1)]
    expected = Engine(model, HybridConfig(budget=0.4), "quest", compile=False).generate(prompts, 40)
    actual = Engine(model, HybridConfig(budget=0.4), "quest").generate(prompts, 40)
    assert [r.token_ids for r in actual] == [r.token_ids for r in expected]


def test_a_policy_of_ones_own(model):
    """A function from a record to a plan is all it takes."""
    engine = Engine(model, HybridConfig(budget=0.4), lambda record: streaming(record), compile=False)
    named = Engine(model, HybridConfig(budget=0.4), "streaming", compile=False)
    assert engine.generate([prompt(500, 0)], 10)[0].token_ids == named.generate([prompt(500, 0)], 10)[0].token_ids
