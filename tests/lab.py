"""What the tests share: random prompts, and a bench on which a cache runs beside the plain tensors it stands for."""

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import compilation_time_metrics

from bench.kernels import compiler_output
from hybridkv import BudgetError, Capacity, HybridCache, HybridConfig, Plan, Prefill, full_plan, hybrid_plan
from hybridkv.cache.pack import lane_tokens
from hybridkv.cache.pool import Pool
from hybridkv.cache.sketch import from_words
from hybridkv.model import Prompt
from hybridkv.planning.head_profile import HeadProfile

GPU = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


# Kernels of a layer that does not retrieve, and of one that does, by where the store is, on a GPU with torch 2.11.
# Eight are the model's own; the goals are 13 and 20. (bench/NOTES.md has the lists.)
KERNELS = {"device": (15, 22), "host": (15, 29)}


def kernels_of_layers(capsys: pytest.CaptureFixture, store: str, *options: str) -> tuple[list[int], str]:
    """What `bench.kernels` counts for a small model in bfloat16, fewest first, and all it prints."""
    from bench import kernels

    small = ["--hidden-size", "256", "--intermediate-size", "256", "--vocab-size", "128", "--dtype", "bfloat16"]
    kernels.main(["--layers", "4", "--context", "2048", "--store", store, *small, *options])
    out = capsys.readouterr().out
    return sorted(int(line.split()[0]) for line in out.splitlines() if "kernels in a layer" in line), out


def examples(n: int) -> settings:
    """So many of a property; with the profile `explore` (conftest.py) ten times as many."""
    return settings(max_examples=n * settings.default.max_examples // 100, deadline=None)


def random_prefill(
    config: HybridConfig, layers: int, shape: tuple, prunable: Tensor | None, seed: int, dtype
) -> Prefill:
    """A prompt of random queries, keys and values; shape is (H, G, T, D)."""
    heads, group, tokens, dim = shape
    generator = torch.Generator().manual_seed(seed)
    prefill = Prefill(prunable, config)
    for layer in range(layers):
        q, k, v = (torch.randn(1, n, tokens, dim, generator=generator).to(dtype) for n in (heads * group, heads, heads))
        prefill[layer](q, k, v)
    return prefill


def head_profile(layers: int, heads: int) -> HeadProfile:
    """An offline profile with random numbers."""
    return HeadProfile(*torch.rand(2, layers, heads, generator=torch.Generator().manual_seed(0)))


def plan_or_none(prefill: Prefill) -> Plan | None:
    """The hybrid plan, or None where the budget can't hold what must be kept."""
    try:
        return hybrid_plan(prefill)
    except BudgetError:
        return None


def prompt(tokens: int, seed: int) -> Prompt:
    """Text only, as far as the model is concerned; all but the ends is prunable."""
    ids = torch.randint(0, 256, (tokens,), generator=torch.Generator().manual_seed(seed))
    prunable = (torch.arange(tokens) > 3) & (torch.arange(tokens) < tokens - 20)
    return Prompt(ids, prunable, 0, None, [], [])


@st.composite
def prompts(draw, max_tokens: int = 500) -> Tensor:
    """A prunable mask, (T,) bool: text, one or two runs of context, a question. Mostly context."""
    mask = []
    for _ in range(draw(st.integers(1, 2))):
        mask += [False] * draw(st.integers(0, 12))
        mask += [True] * draw(
            st.integers(10, max_tokens // 2 - 12) | st.integers(max_tokens // 4, max_tokens // 2 - 12)
        )
    return torch.tensor(mask + [False] * draw(st.integers(1, 12)))


def kinds(plans: list[Plan]) -> str:
    """Which kinds of lanes the plans have, to see in Hypothesis' statistics that all are tested."""
    dynamic = any(plan.dynamic.any() for plan in plans)
    whole = any(plan.whole.any() for plan in plans)
    static = any((~plan.whole & ~plan.dynamic).any() for plan in plans)
    return f"static {static} dynamic {dynamic} whole {whole}"


configs = st.builds(
    HybridConfig,
    budget=st.sampled_from([0.2, 0.35, 0.5, 0.75, 1.0]),
    page_size=st.sampled_from([16, 32]),
    classifier=st.sampled_from(["focus", "threshold"]),
    dynamic_share=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    dynamic_weight=st.sampled_from([0.5, 1.0, 2.0]),
    retrieval=st.sampled_from(["sketch", "bound", "exact"]),
    group=st.sampled_from(["mean", "max"]),
    sketch_rank=st.sampled_from([None, 4, 8]),
    tiles=st.booleans(),
    window=st.integers(1, 20),
    sinks=st.integers(0, 5),
    recent=st.integers(0, 10),
    score=st.sampled_from(["max", "mean"]),
    pool=st.sampled_from([1, 5, 15]),
    pool_weight=st.sampled_from([0.2, 0.5, 1.0]),
    store=st.sampled_from(["device", "host"]),
    stickiness=st.sampled_from([1.0, 2.0]),
    keep_new=st.sampled_from([None, None, 1, 20]),
)
shapes = st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 3, 6, 7]), st.sampled_from([8, 16, 32]))  # H, G, D


def layer_traces() -> int:
    """How often a layer was traced since the process began."""
    return len(compilation_time_metrics.get("invoke_subgraph_trace", ()))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Plain attention in float64: q (G, D); k, v (T, D)."""
    q, k, v = q.double(), k.double(), v.double()
    return torch.softmax(q @ k.T * q.shape[-1] ** -0.5, -1) @ v


def tolerance(q: Tensor, k: Tensor, v: Tensor) -> float:
    """A bound on the rounding error of attention, in the usual model of floating-point arithmetic.

    A dot product of length D errs by at most D u |q||k|, which moves softmax weights by twice that; sums of n terms
    err by n u. Products accumulate in float32; in bfloat16 the scores, the weights and the result are rounded, too.
    """
    dim, tokens = q.shape[-1], k.shape[0]
    score = float(q.double().norm(dim=-1).max() * k.double().norm(dim=-1).max()) * dim**-0.5
    u32, u = torch.finfo(torch.float32).eps / 2, torch.finfo(q.dtype).eps / 2
    relative = 2 * dim * u32 * score + (2 * tokens + 4) * u32
    if q.dtype != torch.float32:
        relative += 2 * u * score + 3 * u
    return relative * float(v.double().abs().max()) + 1e-12


def at(cache: HybridCache, layer: int) -> tuple[Tensor, Tensor | None, Pool]:
    """A layer's number, that among the layers that retrieve, and its pool."""
    each = cache.layers[layer]
    return each.layer, each.nth if each.retrieves else None, each.pool


def row_of(cache: HybridCache, layer: int, lane: int) -> tuple[int, int] | None:
    """Where the tables of dynamic lanes have a lane; None for a static one."""
    row = int(cache.row[layer, lane]) - 1
    if row < 0:
        return None
    nth = cache.retrieving.tolist().index(layer)
    assert int(cache.lane[nth, row]) == lane
    return nth, row


def chunks_of(cache: HybridCache, layer: int, lane: int) -> list[int]:
    """Store pages of a lane, counted behind the pool's if they are in host memory; none of a static one."""
    at = row_of(cache, layer, lane)
    if at is None:
        return []
    return [store_page(cache, at, chunk) for chunk in range(int(cache.n_chunks[at]))]


def store_page(cache: HybridCache, at: tuple[int, int], chunk: int) -> int:
    """Where a chunk of a row lies, counted behind the pool's pages if that is in host memory."""
    if not cache.capacity.host:
        pool = cache.layers[int(cache.retrieving[at[0]])].pool
        return int(pool.pages_of(cache.first[at])) + chunk
    first, own, n_shared = cache.runs[at].tolist()
    return cache.capacity.n_pages + (first if chunk < n_shared else own) + chunk


def tail_of(cache: HybridCache, layer: int, lane: int) -> int:
    """The page that a lane's new tokens fill, in the store if it is a dynamic lane's."""
    if cache.capacity.host and cache.row[layer, lane]:
        at = row_of(cache, layer, lane)
        return store_page(cache, at, int(cache.n_chunks[at]))
    return int(cache.tail[layer, lane])


def frames_of(cache: HybridCache, layer: int, lane: int) -> list[int]:
    """A dynamic lane's frames, with the store on the host."""
    at = row_of(cache, layer, lane)
    if at is None or not cache.capacity.host:
        return []
    start = int(cache.start[layer, lane])
    return list(range(start, start + int(cache.n_retrieve[at])))


def fixed_of(cache: HybridCache, layer: int, lane: int) -> list[int]:
    """Full pages that a lane always reads."""
    pages, n = cache._run(cache[layer].layer)
    return pages[lane, len(frames_of(cache, layer, lane)) : n[lane]].tolist()


def pages_read(cache: HybridCache, layer: int, q: Tensor) -> list[set[int]]:
    """What each lane has just read for q (L, G, D): its fixed pages, its tail, and the pages of the store."""
    pages, n = None, None
    if not cache.capacity.host:
        pages, n = cache._to_read(*at(cache, layer), q)
    read = []
    for lane in range(len(q)):
        if cache.capacity.host:
            chunks = chunks_of(cache, layer, lane)
            held = [chunks[cache.layers[layer].pool.held[frame]] for frame in frames_of(cache, layer, lane)]
            assert len(set(held)) == len(held)  # no chunk twice
            read.append({*held, *fixed_of(cache, layer, lane), tail_of(cache, layer, lane)})
        else:
            read.append({*pages[lane, : n[lane]].tolist(), int(cache.tail[layer, lane])})
    return read


@dataclass
class Bench:
    """A loaded cache, and for each lane the keys and values of all its tokens, prompt and generated."""

    prefills: list[Prefill]
    plans: list[Plan]
    new_tokens: int
    seed: int = 0
    cache: HybridCache = field(init=False)

    def __post_init__(self) -> None:
        first = self.prefills[0].layers[0].k
        self.layers, (self.heads, _, self.dim) = len(self.prefills[0].layers), first.shape
        self.dtype, self.batch = first.dtype, len(self.prefills)
        # tokens[layer][lane]: keys and values (T, D), growing
        self.k = [[k for p in self.prefills for k in p.layers[i].k] for i in range(self.layers)]
        self.v = [[v for p in self.prefills for v in p.layers[i].v] for i in range(self.layers)]
        each = list(zip(self.plans, self.prefills, strict=True))
        orders = [[t for plan, p in each for t in lane_tokens(plan, p, i)] for i in range(self.layers)]
        self.cache = HybridCache(Capacity.of(self.plans, self.new_tokens), self.batch, self.prefills[0])
        self.cache.load(self.prefills, self.plans, self.new_tokens)
        self.slot_of = [
            [self._prompt_slots(i, lane, orders[i][lane]) for lane in range(len(orders[i]))] for i in range(self.layers)
        ]
        self.generator = torch.Generator().manual_seed(self.seed)

    def _prompt_slots(self, layer: int, lane: int, order: Tensor) -> dict[int, int]:
        """token -> slot of a lane's prompt, read off the tables."""
        c = self.cache
        pages = [*chunks_of(c, layer, lane), *fixed_of(c, layer, lane), tail_of(c, layer, lane)]
        slots = [page * c.page_size + i for page in pages for i in range(c.page_size)]
        slots = slots[: len(slots) - c.page_size + int(c.fill[layer, lane])]
        assert len(slots) == len(order)
        return dict(zip(order.tolist(), slots, strict=True))

    def random(self, heads: int) -> Tensor:
        return torch.randn(self.batch, heads, 1, self.dim, generator=self.generator).to(self.dtype)

    def step(self, group: int, active: Tensor | None = None, attend=None) -> list[tuple[Tensor, Tensor, Tensor]]:
        """One token through every layer. Returns (output, exact, tolerance) for each layer, (L, G, D) and (L,)."""
        c, results = self.cache, []
        active = torch.ones(self.batch, dtype=torch.bool) if active is None else active
        for layer in range(self.layers):
            q, k, v = self.random(self.heads * group), self.random(self.heads), self.random(self.heads)
            lanes = q.view(-1, group, self.dim)
            tail, fill = [tail_of(c, layer, lane) for lane in range(len(lanes))], c.fill[layer].clone()
            out = (attend or (lambda layer, *qkv: c[layer](*qkv)))(layer, q, k, v).view_as(lanes)
            exact, tolerances, read = [], [], pages_read(c, layer, lanes)
            for lane in range(len(lanes)):
                self.k[layer][lane] = torch.cat((self.k[layer][lane], k.view(-1, self.dim)[lane : lane + 1]))
                self.v[layer][lane] = torch.cat((self.v[layer][lane], v.view(-1, self.dim)[lane : lane + 1]))
                slot = tail[lane] * c.page_size + int(fill[lane])
                new = len(self.k[layer][lane]) - 1
                over = range(slot, (tail[lane] + 1) * c.page_size)  # what a ring's oldest page held behind it is gone
                kept = {t: s for t, s in self.slot_of[layer][lane].items() if s not in over}
                self.slot_of[layer][lane] = kept | {new: slot}
                seen = [t for t, s in self.slot_of[layer][lane].items() if s // c.page_size in read[lane]]
                K, V = self.k[layer][lane][seen], self.v[layer][lane][seen]
                exact.append(attention(lanes[lane], K, V))
                tolerances.append(tolerance(lanes[lane], K, V))
            results.append((out, torch.stack(exact), torch.tensor(tolerances)))
        c.advance(active)
        return results


def same_chunks(a: HybridCache, b: HybridCache) -> None:
    """Asserts that two caches have the same chunks and sketches, up to the rounding of other kernels."""
    (layers, lanes), size = a.row.shape, a.page_size
    pages = [page for i in range(layers) for lane in range(lanes) for page in chunks_of(a, i, lane)]
    pages = torch.tensor(pages) - a.capacity.host * a.capacity.n_pages
    for name in ("keys", "values"):
        held = [getattr(c.store if c.capacity.host else c.pools[0], name) for c in (a, b)]
        one, other = (each[0, 0].unflatten(0, (-1, size)) for each in held)
        torch.testing.assert_close(one[pages], other[pages], rtol=1e-3, atol=1e-3)
    for j in range(4):
        one, other = (from_words(c.summary.sketch.view(-1, c.summary.words, size)[pages], j) for c in (a, b))
        assert (one - other).abs().max() <= 1 and one.any()


def check(results: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Asserts that every output lies within its tolerance of the exact one."""
    for out, exact, bound in results:
        error = (out.double() - exact).abs().amax((1, 2))
        assert (error <= bound).all(), (error, bound)


__all__ = [
    "Bench",
    "attention",
    "check",
    "compiler_output",
    "configs",
    "examples",
    "full_plan",
    "kinds",
    "layer_traces",
    "plan_or_none",
    "prompt",
    "prompts",
    "random_prefill",
    "same_chunks",
    "shapes",
    "tolerance",
]
