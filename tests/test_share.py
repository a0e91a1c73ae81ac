"""Questions about one reading, with the store on the host: they read one store, and answer as each does alone."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, event, given
from hypothesis import strategies as st
from torch import Tensor

from demo.tiny_vlm import config as tiny_config
from demo.tiny_vlm import random_model
from hybridkv import Capacity, Engine, HybridCache, HybridConfig, Prefill, Question, Reading
from hybridkv.cache.capacity import FINE, bucket
from hybridkv.planning.share import share
from tests.lab import Bench, check, examples, head_profile, plan_or_none
from tests.test_reading import CLOSE, Watched, answers, asked, same_plans
from tests.test_store import poison

HEADS = (2, 2)  # layers, KV heads
READ = 300


@pytest.fixture(scope="module")
def model():
    raw = tiny_config(layers=2, hidden_size=96, heads=6, kv_heads=2, head_dim=16, tie=False)
    return random_model(raw).double()


def config(**chosen) -> HybridConfig:
    known = dict(head_profile=head_profile(*HEADS), retrieving_layers=0.5)
    given = dict(budget=0.6, strict=False, store="host", stickiness=1.0) | known
    return HybridConfig(**given | chosen)


def questions(n: int, longer: int = 7) -> list:
    """About the same first tokens, each so many tokens longer than the one before."""
    prompts = [asked(330 + longer * i, 0, i, READ) for i in range(n)]
    return [replace(p, prunable=p.prunable & (torch.arange(len(p.prunable)) < READ - 10)) for p in prompts]


def shared_pages(cache: HybridCache) -> Tensor:
    """Which pages of the store more than one lane reads, (pages,) bool."""
    readers = torch.zeros(cache.capacity.n_store)
    for first, _, n in cache.runs.view(-1, 3).tolist():
        readers[first : first + n] = 1
    return readers > 0


def read_together(seed: int, lengths: list[int], context: int, heads: int, chosen: HybridConfig) -> tuple[list, list]:
    """Records of questions of so many tokens about one context of random keys, and the questions."""
    generator, layers, group, dim = torch.Generator().manual_seed(seed), 2, 2, 16
    ids = torch.arange(context + max(lengths))
    reading = Reading(ids[: context - 8], [], [], [], ids[:0], "")  # the last of the context is read with each question
    sizes = [heads * group, heads, heads]
    before = [[torch.randn(1, n, context, dim, generator=generator) for n in sizes] for _ in range(layers)]
    prefills, asked_of = [], []
    for length in lengths:
        prefill = Prefill(torch.arange(context + length) < context, chosen)
        for layer in range(layers):
            after = [torch.randn(1, n, length, dim, generator=generator) for n in sizes]
            prefill[layer](*(torch.cat(both, 2) for both in zip(before[layer], after, strict=True)))
        prefills.append(prefill)
        asked_of.append(Question(SimpleNamespace(input_ids=ids[: context + length]), reading))
    return prefills, asked_of


@examples(20)
@given(
    lengths=st.lists(st.integers(20, 60), min_size=2, max_size=3),
    context=st.integers(150, 500),
    heads=st.sampled_from([1, 2, 3]),
    retrieval=st.sampled_from(["sketch", "bound", "exact"]),
    budget=st.sampled_from([0.4, 0.6]),
    steps=st.integers(1, 40),
    seed=st.integers(0, 999),
)
def test_lanes_that_share_read_what_is_theirs(lengths, context, heads, retrieval, budget, steps, seed):
    """Each lane's attention is that over its own tokens; what nobody reads is NaN; what is shared stays as it was."""
    chosen = HybridConfig(budget=budget, dynamic_share=0.5, dynamic_weight=0.4, store="host", retrieval=retrieval)
    prefills, asked_of = read_together(seed, lengths, context, heads, replace(chosen, keep_new=40))
    plans = [plan_or_none(prefill) for prefill in prefills]
    assume(all(plan is not None and plan.dynamic.any() for plan in plans))
    shared = share(plans, asked_of)
    readers = torch.stack([plan.dynamic for plan in plans]).sum(0)
    alike = len({plan.settled_chunks for plan in plans}) == 1
    if alike and all(plan.lane_chunks >= plan.settled_chunks for plan in plans):
        assert sum(int((plan.shares >= 0).sum()) for plan in shared) == int((readers - 1).clamp(min=0).sum())
    bench = Bench(prefills, shared, steps, seed)
    cache, size = bench.cache, chosen.page_size
    slots = shared_pages(cache).repeat_interleave(size)
    before = [tensor[0, 0, slots].clone() for tensor in (cache.store.keys, cache.store.values)]
    poison(cache)
    for _ in range(steps):
        check(bench.step(2))
        poison(cache)
    for was, tensor in zip(before, (cache.store.keys, cache.store.values), strict=True):
        assert torch.equal(was, tensor[0, 0, slots])
    event(f"shares {bool(slots.any())}, same heads {bool((readers % len(plans) == 0).all())}")


@pytest.mark.parametrize("retrieval", ["sketch", "bound", "exact"])
def test_a_batch_is_each_alone(model, retrieval):
    engine = Watched(model, config(retrieval=retrieval))
    given = questions(3)
    reading = engine.read(given[0], tokens=READ)
    alone, plans, logits = [], [], []
    for question in given:
        ids, plan, first = answers(engine, [Question(question, reading)], 40)
        alone, plans, logits = alone + ids, plans + plan, [*logits, first]
    together, same, close = answers(engine, [Question(question, reading) for question in given], 40)
    assert together == alone
    same_plans(same, plans)
    torch.testing.assert_close(close, torch.cat(logits), **CLOSE)
    assert shared_pages(engine.cache).any() and int(engine.cache.fetched.sum()) > 0
    again = answers(engine, [Question(question, reading) for question in given[::-1]], 40)[0]
    assert again == alone[::-1]


def test_host_bytes_are_counted_once(model):
    """Settled chunks of a head once, and for each question what comes behind them."""
    engine, given = Watched(model, config()), questions(4)
    reading = engine.read(given[0], tokens=READ)
    engine.ask(reading, given, 20)
    plans, found = engine.plans, engine.stats.bytes
    lanes = int(plans[0].dynamic.sum())
    assert lanes and all(torch.equal(plan.dynamic, plans[0].dynamic) for plan in plans)
    settled = plans[0].settled_chunks
    filled = [
        lanes * (plan.lane_chunks + int(plan.tokens % 16 > 0) - settled * (b > 0)) for b, plan in enumerate(plans)
    ]
    wanted = [
        lanes * (plan.lane_chunks + (plan.tokens % 16 + 20) // 16 + 1 - settled * (b > 0))
        for b, plan in enumerate(plans)
    ]
    pages = sum(bucket(n + 1, FINE) for n in filled) + bucket(sum(wanted) - sum(filled))
    assert found.host == pages * engine.cache.costs.page
    apart = Capacity.of(plans, 20)
    assert found.host < apart.host_bytes(engine.cache.costs) / 2
    assert found.resident < Capacity.of(plans, None).device_bytes(engine.cache.costs, 8) <= 0.6 * found.full


def test_what_is_not_the_same_is_not_shared(model):
    engine, given = Watched(model, config()), questions(2)
    one, other = (engine.read(given[0], tokens=READ) for _ in range(2))
    ask = [Question(given[0], one), Question(given[1], one)]
    answers(engine, ask, 2)
    plans = engine.plans
    assert (share(plans, ask)[1].shares >= 0).any() and share(plans, ask)[0].owner is None

    def shared(plans: list, prompts: list) -> bool:
        return any(bool((plan.shares >= 0).any()) for plan in share(plans, prompts))

    assert not shared(plans, [ask[0], Question(given[1], other)])  # another reading
    assert not shared(plans, given)  # none at all
    assert not shared([replace(plan, host=False) for plan in plans], ask)
    assert not shared([plans[0], replace(plans[1], dynamic=torch.zeros_like(plans[1].dynamic))], ask)
    turned = replace(plans[1], chunk_order=plans[1].prunable.nonzero()[:, 0].flip(0))
    assert not shared([plans[0], turned], ask)
    early = engine.read(given[0], tokens=100)
    differs = given[1].input_ids.clone()
    differs[150] = (differs[150] + 1) % 256
    assert not shared(plans, [Question(given[0], early), Question(replace(given[1], input_ids=differs), early)])
    assert shared(plans, [Question(given[0], early), Question(given[1], early)])


@pytest.mark.slow
@pytest.mark.compiles
def test_compiled_is_uncompiled(model):
    given, model = questions(2, longer=0), copy.deepcopy(model).float()
    twin = Engine(model, config(), compile=False)
    reading = twin.read(given[0], tokens=READ)
    engine = Engine(model, config())
    expected = [result.token_ids for result in twin.ask(reading, given, 40)]
    assert [result.token_ids for result in engine.ask(reading, given, 40)] == expected
    cache = engine.cache
    with torch.compiler.set_stance("fail_on_recompile"):
        again = engine.ask(reading, given[::-1], 40)
    assert engine.cache is cache and [result.token_ids for result in again] == expected[::-1]
    assert shared_pages(cache).any()
