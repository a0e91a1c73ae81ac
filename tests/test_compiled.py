"""The compiled step: same results as uncompiled, one graph, no recompilation, no copy of the pool, no host sync."""

import functools
import gc
import math
import re
import weakref
from dataclasses import dataclass
from types import FunctionType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.utils import counters
from torch._higher_order_ops.while_loop import while_loop
from torch._inductor.utils import fresh_cache
from torch.nn import functional as F

import hybridkv.cache.attention as attention_module
from demo.tiny_vlm import config as tiny_config
from demo.tiny_vlm import random_model
from hybridkv import Engine, HybridConfig, Sampling
from hybridkv.cache.attention import attend_gathered, attend_pages, tail_last
from hybridkv.cache.bounds import KeyBounds
from hybridkv.cache.exact import ExactKeys
from hybridkv.cache.retrieve import best_chunks, chunk_pages, select
from hybridkv.cache.sketch import KeySketch
from hybridkv.decode import CPU_OPTIONS, DecodeState
from tests.lab import compiler_output, examples, layer_traces, prompt

pytestmark = pytest.mark.compiles
POOL, LAYERS, LANES, DIM = 40, 2, 3, 16
PROMPTS = [prompt(2000, 0), prompt(1500, 1)]
# Of the twelve draws of each, none lies within 7e-5 of another token's share: rounding, about 1e-7, decides none.
SAMPLING = Sampling(temperature=0.8, top_p=0.9, seed=3)


@functools.cache
def compiled_attention(page_size: int, gpu_lists: bool):
    """`attend_pages`, compiled once for each of its variants; `gpu_lists` takes the block lists of the GPU path."""

    def lists_of_gpu(pages, n_pages, tail, pool_pages):
        pages = F.pad(pages, (0, pool_pages - pages.shape[1]))  # the CPU kernel wants a list as wide as the pool
        return tail_last(pages, n_pages, tail)

    def run(*args):
        apart = attention_module.tail_apart
        if gpu_lists:
            attention_module.tail_apart = lists_of_gpu
        try:
            return attend_pages(*args, page_size)
        finally:
            attention_module.tail_apart = apart

    return torch.compile(run, fullgraph=True, dynamic=False)


@examples(40)
@given(st.sampled_from([(32, True, 2), (16, False, 7)]), st.integers(0, 10**6))
def test_compiled_attention_reads_exactly_the_listed_pages(variant, seed):
    """Against the gathered twin: random lists, counts, tails and fills, in every variant of lists and page size."""
    page_size, gpu_lists, group = variant
    generator = torch.Generator().manual_seed(seed)

    def randint(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator).int()

    keys, values = (torch.randn(1, 1, POOL * page_size, DIM, generator=generator) for _ in range(2))
    owner = torch.randperm(POOL - 1, generator=generator)[: LANES * 12].view(LANES, 12).int() + 1
    pages, n_pages = F.pad(owner[:, :11], (0, 1)), randint(0, 12, LANES)
    tail = randint(1, POOL, LAYERS, LANES)
    tail[1] = owner[:, 11]
    fill = randint(0, page_size, LAYERS, LANES)
    q = torch.randn(LANES, 1, group, DIM, generator=generator)
    args = (q, keys, values, pages, n_pages, tail, fill, torch.tensor(1))
    out = compiled_attention(page_size, gpu_lists)(*args)
    # Softmax and sums over at most 12 pages in float32, in another order: a few units in the last place of max|v|.
    bound = 12 * page_size * torch.finfo(torch.float32).eps * float(values.abs().max())
    torch.testing.assert_close(out, attend_gathered(*args, page_size), atol=bound, rtol=0)


@functools.cache
def summary_and_compiled_choice(kind, lanes):
    """Summaries of a store of 37 pages for five lanes with 7 chunks each, and `best_chunks` compiled once a shape."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(5, 7 * 16, DIM, generator=generator)
    summary = kind(37, 6, DIM, HybridConfig(), keys)
    pages = [torch.arange(1, 8) + 7 * i for i in range(5)]
    summary.pack(keys, [torch.cat((p, torch.tensor([36]))) for p in pages], torch.arange(1, 6), 7)
    choose = functools.partial(best_chunks, summary, count=3, columns=8)
    # The bounds are compiled in test_policies.py, as part of a step.
    return summary, choose if kind is KeyBounds else torch.compile(choose, fullgraph=True, dynamic=False)


@examples(40)
@given(
    # A turn of the loop takes one lane of 5, and three of 24.
    st.sampled_from([(KeySketch, 24), (KeyBounds, 24), (ExactKeys, 5)]),
    st.permutations(range(24)),
    st.integers(0, 5),
    st.integers(0, 10**6),
)
def test_lanes_with_chunks_are_scored_alone_as_all_together(case, order, dynamic, seed):
    """Some lanes have no chunks, perhaps none has; the others get what scoring all at once says."""
    _, lanes = case
    summary, compiled = summary_and_compiled_choice(*case)
    generator = torch.Generator().manual_seed(seed)
    first, n_chunks, row = (torch.zeros(lanes, dtype=torch.int32) for _ in range(3))
    for number, lane in enumerate([lane for lane in order if lane < lanes][:dynamic]):
        n_chunks[lane] = int(torch.randint(0, 8, (), generator=generator))
        first[lane], row[lane] = 1 + 7 * number, number + 1
    q = torch.randn(lanes, 3, DIM, generator=generator)
    favour = 1 + torch.randint(0, 2, (lanes, 8), generator=generator)
    k = n_chunks.clamp(max=3)
    expected = select(summary.scores(q, chunk_pages(first, n_chunks, 8), n_chunks, row) * favour, k, 3)
    args = (q, first, n_chunks, row, k)
    for found in (compiled(*args, favour=favour), best_chunks(summary, *args, 3, 8, favour)):
        for lane, n in enumerate(n_chunks.tolist()):
            # Scores of random keys are not this close to a tie.
            assert torch.equal(found[lane, : min(n, 3)], expected[lane, : min(n, 3)])


@pytest.fixture(scope="module")
def model():
    return random_model(tiny_config(layers=3, hidden_size=96, heads=7, kv_heads=1, head_dim=16, tie=False))


@dataclass
class Compiled:
    """An engine that has compiled its step.

    Attributes:
        code: what the compiler made of it.
        graphs, breaks: Dynamo's counts.
        traces: how often a layer was traced.
    """

    engine: Engine
    code: str
    graphs: int
    breaks: int
    traces: int


@pytest.fixture(scope="module")
def compiled(model) -> Compiled:
    """Two sequences, G = 7, hybrid; the pool and the sketches are larger than any activation. Compiled once for all."""
    engine = Engine(model, HybridConfig(budget=0.3))
    counters.clear()
    before = layer_traces()
    with compiler_output() as code:
        engine.generate(PROMPTS, 60)
    assert engine.stats.dynamic_heads and engine.stats.static_heads
    graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    return Compiled(engine, "\n".join(code), graphs, breaks, layer_traces() - before)


def test_compiled_tokens_are_the_uncompiled_tokens(model, compiled):
    expected = Engine(model, HybridConfig(budget=0.3), compile=False).generate(PROMPTS, 60)
    actual = compiled.engine.generate(PROMPTS, 60)
    assert [r.token_ids for r in actual] == [r.token_ids for r in expected]
    assert len(set(expected[0].token_ids)) > 5


def test_one_graph_and_no_recompilation_over_long_generations_and_other_prompts(compiled):
    assert compiled.graphs == 1 and not compiled.breaks
    engine = compiled.engine
    engine.generate(PROMPTS, 2)  # other tests, and benchmarks, may have made Dynamo forget
    cache = engine.cache
    with torch.compiler.set_stance("fail_on_recompile"):
        engine.generate([prompt(1990, 2), prompt(1480, 3)], 60)
        engine.generate([prompt(1500, 4), prompt(1850, 5)], [60, 7])  # other lengths, other limits, same bucket
    assert engine.cache is cache


def test_a_longer_prompt_gets_a_larger_cache(model):
    small = Engine(model, HybridConfig(budget=0.3), compile=False)
    small.generate([prompt(700, 0)], 4)
    before = small.cache
    small.generate([prompt(1500, 0)], 4)
    assert small.cache is not before and small.cache.capacity.n_pages > before.capacity.n_pages


@pytest.mark.parametrize("policy", ["hybridkv", "dense"])
def test_the_old_cache_is_gone_before_a_larger_one_is_made(model, policy, monkeypatch):
    """And not when the garbage collector happens to run: two pools at once may not fit into the device."""
    engine = Engine(model, HybridConfig(budget=0.3), policy, compile=False)
    engine.generate([prompt(700, 0)], 4)
    old = weakref.ref(engine.cache)
    kind, make = type(engine.cache), type(engine.cache).__init__

    def first_look(self, *args):
        assert old() is None
        make(self, *args)

    monkeypatch.setattr(kind, "__init__", first_look)
    gc.disable()
    try:
        engine.generate([prompt(1500, 0)], 4)
    finally:
        gc.enable()


def test_nothing_of_the_size_of_the_pool_is_allocated(compiled):
    code, cache = compiled.code, compiled.engine.cache
    sizes = [
        math.prod(int(n) for n in shape.split(",") if n.strip())
        for shape in re.findall(r"empty_strided\w*\(\(([\d, ]*)\)", code)
    ]
    assert len(sizes) > 10
    coordinates = 4 * cache.summary.sketch.numel()  # four in a word
    assert max(sizes) < coordinates < cache.pools[0].keys.numel()
    copies = [line for line in code.splitlines() if ".clone()" in line]
    assert len(copies) == 2 and "if not should_loop" in code  # of the scores, where no lane has chunks


def test_layers_share_one_compiled_region(compiled):
    assert compiled.code.count("std::vector<int> kv_indice_list(") == 1  # the loop of FlexAttention's CPU kernel


@pytest.mark.skipif(torch.__version__ < "2.13", reason="older compilers trace every layer")
def test_one_layer_is_traced_for_all(compiled):
    """What differs between layers are modules and tensors: tracing 28 of them one by one takes minutes."""
    assert compiled.traces == 1


def test_no_step_waits_for_the_device(compiled):
    code = compiled.code
    # The loop over lanes asks the host each time; it is for CPUs only, see `retrieve.best_chunks`.
    assert ".item()" not in code and "_local_scalar_dense" not in code and code.count("while should_loop:") == 1


@pytest.mark.parametrize("policy, sampling", [("full", Sampling()), ("dense", SAMPLING)], ids=["full", "dense sampled"])
def test_the_full_caches_compiled(model, policy, sampling):
    """They give the tokens, and draw the samples, that uncompiled steps do."""
    prompts = [prompt(80, 0), prompt(60, 1)]
    expected = Engine(model, policy=policy, compile=False).generate(prompts, 12, sampling)
    compiled = Engine(model, policy=policy)
    assert [r.token_ids for r in compiled.generate(prompts, 12, sampling)] == [r.token_ids for r in expected]
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled.generate([prompt(78, 2), prompt(58, 3)], 12, sampling)


def test_state_is_only_buffers():
    """CUDA graphs keep the addresses of buffers; a plain tensor attribute would be copied at every step."""
    state = DecodeState(2, 8, [1], torch.device("cpu"))
    plain = [name for name, value in vars(state).items() if isinstance(value, torch.Tensor)]
    assert not plain and len(list(state.buffers())) == 8


def test_a_step_is_made_of_few_kernels(compiled):
    """With torch 2.13: 18 fused kernels, 9 matrix products, 6 other calls, at any depth: layers share a region."""
    code = compiled.code
    kernels = re.findall(r"^(cpp_fused\w+) = async_compile", code, re.M)
    assert 5 < len(set(kernels)) <= 20
    assert 5 < len(re.findall(r"extern_kernels\.\w*mm\w*\(", code)) <= 10
    calls = re.findall(r"= torch\.ops\.aten\.(\w+)", code)
    assert calls.count("topk") == 1 and len(calls) <= 10  # what the compiler can't fuse: slices in a loop, for example


def test_the_compile_cache_keeps_loops_and_tells_them_apart():
    def power(base, n):
        def more(i, x):
            return i < n.sum()

        def times(i, x):
            return i + 1, x * base

        return while_loop(more, times, (torch.zeros((), dtype=torch.int64), torch.ones(())))[1]

    three = torch.tensor([3])
    with fresh_cache():
        for base, hits in ((2.0, 0), (3.0, 0), (2.0, 1)):
            counters.clear()
            again = FunctionType(power.__code__.replace(), globals())  # Dynamo has not seen it
            compiled = torch.compile(functools.partial(again, base), fullgraph=True, dynamic=False, options=CPU_OPTIONS)
            assert float(compiled(three)) == base**3
            assert counters["aot_autograd"]["autograd_cache_hit"] == hits
