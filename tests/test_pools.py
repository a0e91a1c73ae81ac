"""Caches of several pools: the same as with one, to the bit and to the byte."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from hypothesis import assume, event, given
from hypothesis import strategies as st
from torch._dynamo.utils import counters

from demo.tiny_vlm import config as tiny_config
from demo.tiny_vlm import random_model
from hybridkv import Capacity, Engine, HybridCache, HybridConfig, Plan, Prefill, full_plan
from hybridkv.cache import capacity as sizes
from hybridkv.cache.capacity import bucket, split
from tests.lab import (
    compiler_output,
    configs,
    examples,
    layer_traces,
    plan_or_none,
    prompt,
    prompts,
    random_prefill,
    shapes,
)


@contextmanager
def pools_up_to(plans: list[Plan], new_tokens: int | None, share: float) -> Iterator[None]:
    """Pools hold at most this share of what one for all these prompts would, or the largest layer."""
    one = Capacity.of(plans, new_tokens)
    pages = max(max(one.needs) + 1, int(share * one.n_pages))
    with patch.object(sizes, "LARGEST", pages * plans[0].page_size * plans[0].head_dim):
        yield


@examples(200)
@given(st.lists(st.integers(0, 500), min_size=1, max_size=40), st.integers(0, 300), st.floats(0.01, 1.2))
def test_layers_are_spread_over_few_pages(needs, spare, share):
    """Each layer fits into its pool; pools are no larger than they may be, and together little more than is needed."""
    pages = sum(needs) + 1 + spare
    most = int(share * pages)
    pool, size = split(needs, pages, most)
    pools = max(pool) + 1
    held = [sum(n for n, at in zip(needs, pool, strict=True) if at == p) for p in range(pools)]
    assert max(held) < size <= max(most, max(needs) + 1, pages if len(needs) == 1 else 0)
    # The neediest first, each into the emptiest: none holds more than its share and one layer.
    assert max(held) <= sum(needs) / pools + max(needs)
    assert pools * size <= pages + pools * bucket(max(needs) + 2)
    assert pages > most or (pools, size) == (1, pages)
    event(f"{min(pools, 4)} pools")


def caches(prefill, plans: list[Plan], steps: int, share: float) -> tuple[HybridCache, HybridCache]:
    """The same prompts in one pool, and in pools of at most this share of it. prefill(i) makes the record of one."""
    found = []
    for most in (1.0, share):
        prefills = [prefill(i) for i in range(len(plans))]
        with pools_up_to(plans, steps, most):
            cache = HybridCache(Capacity.of(plans, steps), len(plans), prefills[0])
        cache.load(prefills, plans, steps)
        found.append(cache)
    return found[0], found[1]


@examples(25)
@given(
    masks=st.lists(prompts(), min_size=1, max_size=2),
    config=configs,
    shape=shapes,
    share=st.sampled_from([0.3, 0.45, 0.7]),
    steps=st.integers(0, 25),
    seed=st.integers(0, 999),
)
def test_several_pools_give_what_one_gives_bit_for_bit(masks, config, shape, share, steps, seed):
    """Whatever heads retrieve, wherever chunks are, over any number of steps; nothing but what is owned is read."""
    heads, group, dim = shape
    assume(config.sketch_rank is None or config.sketch_rank <= dim)

    def prefill(i: int) -> Prefill:
        return random_prefill(config, 4, (heads, group, len(masks[i]), dim), masks[i], seed + i, torch.float32)

    plans = [plan_or_none(prefill(i)) or full_plan(prefill(i)) for i in range(len(masks))]
    one, several = caches(prefill, plans, steps, share)
    assert len(one.pools) == 1 < len(several.pools)
    assert len({pool.keys.shape for pool in several.pools}) == 1
    generator = torch.Generator().manual_seed(seed)
    active = torch.ones(len(masks), dtype=torch.bool)
    for step in range(steps):
        for layer in range(4):
            q, k, v = (torch.randn(len(masks), n, 1, dim, generator=generator) for n in (heads * group, heads, heads))
            assert torch.equal(one[layer](q, k, v), several[layer](q, k, v))
        for cache in (one, several):
            cache.advance(active if step % 5 else active.clone().index_fill(0, torch.tensor([0]), False))
    assert torch.equal(one.fetched, several.fetched)
    event(f"{len(several.pools)} pools, on the host {one.capacity.host}, retrieves {one.capacity.retrieve > 0}")


@examples(40)
@given(
    masks=st.lists(prompts(), min_size=1, max_size=3),
    config=configs,
    shape=shapes,
    share=st.sampled_from([0.3, 0.45, 0.7]),
    new_tokens=st.integers(1, 100),
)
def test_bytes_promised_are_bytes_held(masks, config, shape, share, new_tokens):
    """A prompt plans for the pools that it needs. Those of a batch, equal in size, may have room for a layer more."""
    heads, group, dim = shape
    assume(config.retrieval != "exact")  # the oracle holds more than it is charged for, by design
    assume(config.sketch_rank is None or config.sketch_rank <= dim)
    prefills = [random_prefill(config, 4, (heads, group, len(m), dim), m, 0, torch.float32) for m in masks]
    with pools_up_to([full_plan(p) for p in prefills], new_tokens, share):
        plans = [plan_or_none(p) or full_plan(p) for p in prefills]
        cache = HybridCache(Capacity.of(plans, new_tokens), len(masks), prefills[0])
        cache.load(prefills, plans, new_tokens)
        cost, mine = cache.count_bytes(), Capacity.of(plans, None)
        alone = [plan.budget_bytes(cache.costs) for plan in plans]
        most = sizes.LARGEST
    assert all(cache.layers[i].pool is cache.pools[pool] for i, pool in enumerate(cache.capacity.pool))
    assert max(pool.keys.numel() for pool in cache.pools) <= most or max(cache.capacity.needs) == 0
    host = {"store.keys", "store.values"}
    held = sum(t.nbytes for name, t in cache.named_buffers() if name not in host)
    assert cost.allocated == held == cache.capacity.device_bytes(cache.costs, cache.row.shape[1])
    assert cost.host == sum(t.nbytes for name, t in cache.named_buffers() if name in host)
    assert cost.resident == mine.device_bytes(cache.costs, cache.row.shape[1])
    for plan, each, mask in zip(plans, alone, masks, strict=True):
        if config.budget < 1 and not plan.no_room and not plan.whole.all():
            assert each <= config.budget * len(mask) * 8 * heads * dim * 4
    if config.store == "host" and len(masks) > 1:
        layer = bucket(max(mine.needs) + 2) * (cache.costs.page + cache.costs.entry)
        assert cost.resident <= sum(alone) + (mine.pools > 1) * mine.pools * layer
    event(f"{mine.pools} and {cache.capacity.pools} pools")


def test_a_layer_that_is_too_large_is_refused_by_who_compiles_for_an_old_kernel():
    config = HybridConfig(budget=0.5)
    prefill = random_prefill(config, 3, (2, 1, 400, 16), torch.arange(400) < 380, 0, torch.float32)
    plans = [full_plan(prefill)]
    with patch.object(sizes, "LARGEST", 16 * 16 * 10):  # 10 pages
        capacity = Capacity.of(plans, 4)
    assert capacity.pools == 3 and capacity.n_pages == max(capacity.needs) + 1 > 10


@pytest.mark.parametrize("store", ["host", "device"])
def test_another_prompt_takes_the_same_pools(store):
    """As long as each pool holds its layers; else there is a new cache."""
    config = HybridConfig(budget=0.5, store=store)
    model = random_model(tiny_config(layers=5, hidden_size=48, heads=6, kv_heads=2, head_dim=8, tie=False))
    whole, rest = Engine(model, config, compile=False), [prompt(600, seed) for seed in range(3)]
    expected = [whole.generate([prompt(n, n), *rest], 20) for n in (900, 890)]
    with patch.object(sizes, "LARGEST", int(0.4 * whole.cache.pools[0].keys.numel())):
        engine, seen = Engine(model, config, compile=False), []
        for n, results in zip((900, 890), expected, strict=True):
            found = engine.generate([prompt(n, n), *rest], 20)
            assert [r.token_ids for r in found] == [r.token_ids for r in results]
            seen.append(engine.cache)
        engine.generate([prompt(1500, 1500), *rest], 20)
    assert seen[0] is seen[1] is not engine.cache
    assert 1 < len(seen[0].pools) <= len(engine.cache.pools)


@pytest.mark.compiles
@pytest.mark.parametrize("store", ["host", pytest.param("device", marks=pytest.mark.slow)])
def test_compiled_layers_of_all_pools_share_one_region(store):
    config = HybridConfig(budget=0.4, store=store)
    model = random_model(tiny_config(layers=2, hidden_size=32, heads=2, kv_heads=1, head_dim=16, tie=False))
    asked, others = [prompt(2000, 0), prompt(1500, 1)], [prompt(1990, 2), prompt(1480, 3)]
    whole = Engine(model, config, compile=False)
    expected = [[r.token_ids for r in whole.generate(each, 40)] for each in (asked, others)]
    with patch.object(sizes, "LARGEST", int(0.7 * whole.cache.pools[0].keys.numel())):
        engine = Engine(model, config)
        counters.clear()
        before = layer_traces()
        with compiler_output() as code:
            found = engine.generate(asked, 40)
        assert len(engine.cache.pools) == 2
        assert counters["stats"]["unique_graphs"] == 1 and not sum(counters["graph_break"].values())
        assert torch.__version__ < "2.13" or layer_traces() - before == 1
        with torch.compiler.set_stance("fail_on_recompile"):
            again = engine.generate(others, 40)
    assert [[r.token_ids for r in each] for each in (found, again)] == expected and len(set(expected[0][0])) > 5
    code = "\n".join(code)
    assert code.count("std::vector<int> kv_indice_list(") == 1
    shapes = re.findall(r"empty_strided\w*\(\(([\d, ]*)\)", code)
    sizes_of = [math.prod(int(n) for n in shape.split(",") if n.strip()) for shape in shapes]
    assert len(sizes_of) > 10 and max(sizes_of) < engine.cache.pools[0].keys.numel()
