"""The store in host memory and its frames: against slow twins, over thousands of steps, and compiled."""

import contextlib
import ctypes
import math
import re
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from hypothesis import assume, event, given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import counters

from demo.tiny_vlm import config as tiny_config
from demo.tiny_vlm import random_model
from hybridkv import Capacity, Engine, HybridCache, HybridConfig, Prefill, hybrid_plan
from hybridkv.cache.store import PAGE, HostStore, StoreError, at_once, entries, exchange, host_tensor, marked
from hybridkv.cli import one_line
from tests.lab import (
    Bench,
    chunks_of,
    compiler_output,
    configs,
    examples,
    frames_of,
    layer_traces,
    plan_or_none,
    prompt,
    prompts,
    random_prefill,
    row_of,
    same_chunks,
    shapes,
    store_page,
)

PROMPTS = [prompt(2000, 0), prompt(1500, 1)]
HOST = HybridConfig(budget=0.5, dynamic_share=0.5, dynamic_weight=0.4, store="host")  # fewer frames than chunks


def slow_exchange(held: list[int], chosen: list[int], most: int) -> list[int]:
    """One lane of `exchange`, as one would say it: what its frames hold afterwards."""
    missing = iter([chunk for chunk in chosen if chunk not in held][:most])
    return [chunk if chunk in chosen else next(missing, chunk) for chunk in held]


@examples(200)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 12), st.integers(1, 40), st.integers(1, 12))
def test_frames_change_hands_as_in_the_slow_twin(seed, lanes, frames, chunks, most):
    """No chunk twice, what is wanted and there stays where it is, only frames that are meant change, few at once."""
    generator, most = torch.Generator().manual_seed(seed), min(most, frames)
    k = torch.randint(0, min(frames, chunks) + 1, (lanes,), generator=generator)
    held = torch.randint(-1, chunks, (lanes, frames), generator=generator).int()  # what is not meant holds whatever
    chosen = torch.randint(0, chunks, (lanes, frames), generator=generator)
    for lane, n in enumerate(k.tolist()):
        held[lane, :n] = torch.randperm(chunks, generator=generator)[:n].int()
        if n and seed % 3 == 0:
            held[lane, torch.randint(0, n, (), generator=generator)] = -1  # nothing yet
        chosen[lane, :n] = torch.randperm(chunks, generator=generator)[:n]
    there = marked(held, entries(held, k) & (held >= 0), chunks)
    columns, goes, counts = exchange(held, chosen, k, there, most)
    assert columns.shape == goes.shape == (lanes, most)
    for lane, (n, count) in enumerate(zip(k.tolist(), counts.tolist(), strict=True)):
        after = held[lane].clone()
        after[columns[lane, :count]] = goes[lane, :count].int()
        expected = slow_exchange(held[lane, :n].tolist(), chosen[lane, :n].tolist(), most)
        assert after[:n].tolist() == expected and torch.equal(after[n:], held[lane, n:])
        assert count == int((after != held[lane]).sum()) == len(set(columns[lane, :count].tolist()))
        if count < most:
            assert sorted(expected) == sorted(chosen[lane, :n].tolist())


def poison(cache: HybridCache) -> None:
    """NaN wherever nothing may be read: in every page that no lane reads now, in the pool and in the store.

    (The unwritten slots of a tail page are read under a mask, and the null page where a list has ended.)
    """
    size, store, (frames,) = cache.page_size, cache.store, cache.pools
    tails = (cache.tail.flatten().long()[:, None] * size + torch.arange(size)).flatten()
    for tensor in (frames.keys, frames.values):
        tensor.index_copy_(2, tails, tensor[:, :, tails].nan_to_num())
    pool, chunks = {0, *cache.tail.flatten().tolist()}, set()
    for layer in range(cache.row.shape[0]):
        pages, n = cache._run(cache[layer].layer)
        for lane in range(cache.row.shape[1]):
            pool |= set(pages[lane, : n[lane]].tolist())
            chunks |= {page - cache.capacity.n_pages for page in chunks_of(cache, layer, lane)}
            if at := row_of(cache, layer, lane):
                chunks.add(store_page(cache, at, int(cache.n_chunks[at])) - cache.capacity.n_pages)
    for tensors, pages, used in (
        ((frames.keys, frames.values), cache.capacity.n_pages, pool),
        ((store.keys, store.values), cache.capacity.n_store, chunks),
    ):
        unused = torch.tensor([page for page in range(pages) if page not in used], dtype=torch.int64)
        slots = (unused[:, None] * size + torch.arange(size)).flatten()
        for tensor in tensors:
            tensor.index_fill_(2, slots, torch.nan)


@examples(25)
@given(
    masks=st.lists(prompts(), min_size=1, max_size=2),
    budget=st.sampled_from([0.3, 0.5, 0.75]),
    shape=shapes,
    stickiness=st.sampled_from([1.0, 1.1, 1000.0]),
    page_size=st.sampled_from([16, 32]),
    few=st.sampled_from([1, 16]),
    steps=st.integers(1, 40),
    seed=st.integers(0, 999),
)
def test_frames_hold_what_the_table_says(masks, budget, shape, stickiness, page_size, few, steps, seed):
    """After every step each frame holds its chunk bit for bit, and everything else is NaN meanwhile.

    However few change hands at once: then it may be another one than was chosen.
    """
    heads, group, dim = shape
    config = replace(HOST, budget=budget, stickiness=stickiness, page_size=page_size, keep_new=40)
    prefills = [
        random_prefill(config, 2, (heads, group, len(m), dim), m, seed + i, torch.float32) for i, m in enumerate(masks)
    ]
    plans = [plan_or_none(p) for p in prefills]
    assume(all(plan is not None and plan.dynamic.any() for plan in plans))
    bench = Bench(prefills, plans, steps, seed)
    cache, places = bench.cache, [(i, lane) for i in range(2) for lane in range(len(masks) * heads)]
    few = any(0 < len(frames_of(cache, *p)) < len(chunks_of(cache, *p)) for p in places)
    poison(cache)
    (frame_pool,) = cache.pools
    held = frame_pool.held
    for _ in range(steps):
        before = held.clone()
        counted = cache.fetched.clone()
        with patch("hybridkv.cache.store.FEW", few):
            results = bench.step(group)
        for out, exact, bound in results:
            assert ((out.double() - exact).abs().amax((1, 2)) <= bound).all()
        for layer, lane in places:
            for frame in (frames := frames_of(cache, layer, lane)):
                page = int(cache.first[row_of(cache, layer, lane)]) + int(held[frame])
                for pool, store in ((frame_pool.keys, cache.store.keys), (frame_pool.values, cache.store.values)):
                    here, there = (t[0, 0].view(-1, page_size, dim) for t in (pool, store))
                    assert torch.equal(here[frame], there[page])
            if frames:
                at = row_of(cache, layer, lane)
                new = int((held[frames] != before[frames]).sum())
                assert new == int(cache.fetched[at] - counted[at]) <= at_once(cache.capacity.retrieve)
                assert few > 1 or new <= max(1, cache.capacity.retrieve // 2)
        poison(cache)
    event(f"evictions {bool(cache.fetched.any())}, fewer frames than chunks {few}")


@examples(15)
@given(
    masks=st.lists(prompts(), min_size=1, max_size=2),
    retrieval=st.sampled_from(["sketch", "bound", "exact"]),
    shape=shapes,
    steps=st.integers(1, 40),
    seed=st.integers(0, 999),
)
def test_host_is_device_for_the_same_choice(masks, retrieval, shape, steps, seed):
    """Without stickiness both choose the same chunks of the same plan, and read the same, if all may change hands."""
    heads, group, dim = shape
    config = replace(HOST, retrieval=retrieval, stickiness=1.0)

    def prefill(i: int):
        return random_prefill(config, 2, (heads, group, len(masks[i]), dim), masks[i], seed + i, torch.float32)

    plans = [plan_or_none(prefill(i)) for i in range(len(masks))]
    assume(all(plan is not None and plan.dynamic.any() for plan in plans))
    host, device = (
        Bench([prefill(i) for i in range(len(masks))], [replace(p, host=h) for p in plans], steps, seed)
        for h in (True, False)
    )
    assert host.cache.capacity.host and not device.cache.capacity.host
    for _ in range(steps):
        with patch("hybridkv.cache.store.FEW", 1000):
            results = host.step(group)
        for (ours, _, bound), (theirs, _, _) in zip(results, device.step(group), strict=True):
            assert ((ours - theirs).abs().amax((1, 2)) <= 2 * bound).all()


@examples(30)
@given(
    masks=st.lists(prompts(), min_size=1, max_size=3),
    config=configs,
    shape=shapes,
    layers=st.integers(1, 4),
    new_tokens=st.integers(1, 100),
)
def test_what_a_batch_holds_is_within_its_budgets(masks, config, shape, layers, new_tokens):
    """Every tensor on the device, rounding and spare pages included, less the room for new tokens."""
    heads, group, dim = shape
    assume(config.sketch_rank is None or config.sketch_rank <= dim)
    config = replace(config, store="host", retrieval="bound" if config.retrieval == "exact" else config.retrieval)
    prefills = [random_prefill(config, layers, (heads, group, len(m), dim), m, 0, torch.float32) for m in masks]
    plans = [plan_or_none(p) for p in prefills]
    assume(all(plan is not None and not plan.no_room for plan in plans) and config.budget < 1)
    cache = HybridCache(Capacity.of(plans, new_tokens), len(masks), prefills[0])
    cache.load(prefills, plans, new_tokens)
    cost, mine = cache.count_bytes(), Capacity.of(plans, None)
    room = (cache.capacity.n_pages - mine.n_pages) * (cache.costs.page + cache.costs.entry)
    room += (cache.capacity.n_store - mine.n_store) * cache.costs.summary
    held = sum(t.nbytes for name, t in cache.named_buffers() if name not in ("store.keys", "store.values"))
    assert held - room == cost.resident <= config.budget * cost.full
    event(f"used {cost.resident / cost.full / config.budget:.1f} of the budget")


def appended(steps: int, keep_new: int | None) -> tuple[HybridCache, list[Tensor], HybridCache]:
    """A cache after so many steps of one layer's random keys, those keys, and it again as it began."""
    config = replace(HOST, keep_new=keep_new)
    mask = torch.arange(200) < 180
    prefill = random_prefill(config, 1, (2, 1, 200, 16), mask, 0, torch.float32)
    plan = hybrid_plan(prefill)
    cache = HybridCache(Capacity.of([plan], steps), 1, prefill)
    cache.load([prefill], [plan], steps)
    begun = cache.count_bytes()
    generator, new = torch.Generator().manual_seed(0), []
    active = torch.ones(1, dtype=torch.bool)
    for _ in range(steps):
        q, k, v = (torch.randn(1, 2, 1, 16, generator=generator) for _ in range(3))
        cache[0](q, k, v)
        cache.advance(active)
        new.append(torch.cat((k, v), 2)[0])  # (H, 2, D)
    cache.catch_up()  # as the next step would
    return cache, new, begun


@pytest.mark.parametrize("steps", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_the_store_is_a_record_of_every_step(steps):
    """And the device holds more only by what the ring allows, and by summaries."""
    cache, new, begun = appended(steps, keep_new=64)
    (lane,) = (cache.row[0] > 0).nonzero()[:, 0].tolist()
    fill = 200 % 16
    start = int(cache.first[0, 0]) * 16 + 200 - 200 % 16 - int(cache.n_full[0, lane] - cache.n_retrieve[0, 0]) * 16
    record = torch.stack(new)[:, lane]  # (steps, 2, D)
    for i, store in enumerate((cache.store.keys, cache.store.values)):
        assert torch.equal(store[0, 0, start + fill : start + fill + steps], record[:, i])
    cost, costs = cache.count_bytes(), cache.costs
    closed = (fill + steps) // 16
    ring = (64 // 16 + 1) * (costs.page + costs.entry)
    assert cost.new == ring + closed * costs.summary
    assert begun.host == cost.host and int(cache.fetched.sum()) > steps / 10
    static = cache.n_full[0, 1 - lane] - cache._plans[0].n_fixed[0, 1 - lane]
    assert int(static) == 64 // 16


def test_what_is_held_follows_a_formula_whatever_is_asked_for():
    """Ten times the new tokens take ten times the summaries, and no page of the pool more."""
    config = replace(HOST, keep_new=64)
    prefill = random_prefill(config, 2, (2, 1, 500, 16), torch.arange(500) < 480, 0, torch.float32)
    plan = hybrid_plan(prefill)
    some, many = (Capacity.of([plan], n) for n in (2000, 20_000))
    assert some.n_pages == many.n_pages and some.retrieve == many.retrieve
    new = 20_000 // 16 * int(plan.dynamic.sum())
    assert new <= many.n_store - Capacity.of([plan], None).n_store <= new * 9 / 8 + 2


def test_frames_begin_with_what_the_last_query_would_choose():
    config = replace(HOST, stickiness=1.0, retrieval="exact")
    prefill = random_prefill(config, 2, (2, 2, 500, 16), torch.arange(500) < 480, 0, torch.float32)
    q = [layer.q[:, -1].clone() for layer in prefill.layers]
    plan = hybrid_plan(prefill)
    cache = HybridCache(Capacity.of([plan], 4), 1, prefill)
    cache.load([prefill], [plan], 4)
    assert not cache.fetched.any()
    before = cache.pools[0].held.clone()
    assert (before >= 0).sum() == plan.n_retrieve.sum()
    k, v = torch.randn(2, 1, 2, 1, 16)
    for layer in range(2):
        cache[layer](q[layer][None, :, None], k, v)
    assert torch.equal(cache.pools[0].held[1:], before[1:]) and not cache.fetched.any()  # of the null page whatever


@pytest.mark.parametrize("store", ["device", "host"])
def test_chunks_follow_from_the_context_alone(store):
    """Questions of any length find the same chunks and sketches; one chunk at the end may go to the fixed pages."""
    generator, config = torch.Generator().manual_seed(0), replace(HOST, store=store)
    context, question = torch.randn(2, 3, 1, 2, 400, 16, generator=generator)
    found = []
    for asked in range(20, 60):
        prefill = Prefill(torch.arange(400 + asked) < 400, config)
        tensors = [torch.cat((c, q[:, :, :asked]), 2) for c, q in zip(context, question, strict=True)]
        prefill[0](*tensors)
        plan = hybrid_plan(prefill)
        cache = HybridCache(Capacity.of([plan], 8), 1, prefill)
        cache.load([prefill], [plan], 8)
        first, summary = int(cache.first[0, 0]), cache.summary
        settled = slice(first, first + plan.settled_chunks)
        assert plan.lane_chunks - plan.settled_chunks in (0, 1)
        keys = (cache.store if store == "host" else cache.pools[0]).keys[0, 0].view(-1, 16, 16)[settled]
        found.append((summary.basis[0], summary.step[0], summary.sketch.view(-1, summary.words, 16)[settled], keys))
        assert plan.dynamic.sum() == 1
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_stickiness_saves_fetches():
    counts, generator = [], torch.Generator().manual_seed(0)
    draws = [[torch.randn(1, n, 1, 16, generator=generator) for n in (4, 2, 2)] for _ in range(12)]
    for stickiness in (1.0, 2.0, 8.0):
        config = replace(HOST, stickiness=stickiness, retrieval="exact")
        prefill = random_prefill(config, 1, (2, 2, 900, 16), torch.arange(900) < 880, 0, torch.float32)
        plan = hybrid_plan(prefill)
        cache = HybridCache(Capacity.of([plan], 12), 1, prefill)
        cache.load([prefill], [plan], 12)
        for q, k, v in draws:
            cache[0](4 * q, k, v)
            cache.advance(torch.ones(1, dtype=torch.bool))
        counts.append(int(cache.fetched.sum()))
    assert counts[0] > counts[1] > counts[2] > 0


def test_a_store_that_can_not_be_had_says_so(monkeypatch):
    def empty(*args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    like = torch.zeros(1, 16)
    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(StoreError, match="bytes of host memory") as error:
        HostStore(100, 16, like, 1.0)
    assert one_line(error.value, "lower --max-pixels") == str(error.value)


class Runtime:
    """Stands in for CUDA's: notes what is locked, and refuses what is more than the limit."""

    def __init__(self, limit: int):
        self.limit, self.locked, self.waited = limit, {}, 0

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if size > self.limit:
            return 2
        assert flags == 3 and address not in self.locked
        self.locked[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        assert self.waited  # a kernel may be reading it
        del self.locked[address]
        return 0


def test_host_memory_is_locked_as_long_as_its_owner_lives(monkeypatch):
    """Whole pages that nobody else has, exactly as many as there must be; refused in words that help."""

    class Owner:
        pass

    def view(memory, device):
        (size,), (address, _) = (memory.__cuda_array_interface__[name] for name in ("shape", "data"))
        return torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8)

    runtime, owners, forgotten = Runtime(100_000), [Owner(), Owner()], []
    monkeypatch.setattr("hybridkv.cache.store.forget_error", forgotten.append)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: setattr(runtime, "waited", runtime.waited + 1))
    monkeypatch.setattr(torch, "as_tensor", view)
    cuda = torch.device("cuda")
    for n, owner in enumerate(owners):
        tensor = host_tensor((1, 1, 300, 7), torch.bfloat16, cuda, owner)
        tensor.fill_(n)
        assert tensor.shape == (1, 1, 300, 7) and tensor.data_ptr() % PAGE == 0
        assert runtime.locked[tensor.data_ptr()] == 2 * PAGE  # of 4,200 bytes
    assert len(runtime.locked) == 2
    with pytest.raises(StoreError, match=r"can't be locked.*memlock"):
        host_tensor((1, 1, 30_000, 7), torch.bfloat16, cuda, Owner())
    assert forgotten == [cuda]
    del owner
    for n in range(2):
        owners.pop()
        assert len(runtime.locked) == 1 - n == 2 - runtime.waited
    monkeypatch.setattr(torch, "as_tensor", lambda memory, device: torch.zeros(1, dtype=torch.uint8))
    with pytest.raises(StoreError, match="no view of host memory"):
        host_tensor((1, 1, 3, 7), torch.bfloat16, cuda, Owner())


@pytest.fixture(scope="module")
def model():
    return random_model(tiny_config(layers=3, hidden_size=96, heads=7, kv_heads=1, head_dim=16, tie=False))


SMALL = HybridConfig(budget=0.4, store="host", keep_new=24)


@pytest.mark.compiles
def test_compiled_is_uncompiled(model):
    """One graph for two sequences and for other prompts after them; no copy of the pool or of the store."""
    plain, engine = Engine(model, SMALL, compile=False), Engine(model, SMALL)
    expected = plain.generate(PROMPTS, 60)
    counters.clear()
    before = layer_traces()
    with compiler_output() as code:
        found = engine.generate(PROMPTS, 60)
    assert [r.token_ids for r in found] == [r.token_ids for r in expected] and len(set(expected[0].token_ids)) > 5
    assert counters["stats"]["unique_graphs"] == 1 and not sum(counters["graph_break"].values())
    assert torch.__version__ < "2.13" or layer_traces() - before == 1
    cache, text = engine.cache, "\n".join(code)
    assert int(cache.fetched.sum()) > 0
    same_chunks(cache, plain.cache)
    sizes = [
        math.prod(int(n) for n in shape.split(",") if n.strip())
        for shape in re.findall(r"empty_strided\w*\(\(([\d, ]*)\)", text)
    ]
    assert len(sizes) > 10 and max(sizes) < min(cache.pools[0].keys.numel(), cache.store.keys.numel())
    assert ".item()" not in text and text.count("while should_loop:") == 1
    with torch.compiler.set_stance("fail_on_recompile"):
        again = engine.generate([prompt(1990, 2), prompt(1480, 3)], 60)
    assert engine.cache is cache
    twin = Engine(model, SMALL, compile=False).generate([prompt(1990, 2), prompt(1480, 3)], 60)
    assert [r.token_ids for r in again] == [r.token_ids for r in twin]
