"""Decoding: one compiled graph for every token, from the embedding to the next token's number.

`Engine` ties it together: prefill, plan, load, then `decode_step` over and over. It works with any model that has

    prefill(prompt, kv) -> logits (1, V), next position     and     step(token, position, kv) -> logits (B, V)

where prompts have `input_ids` (T,) and `prunable` (T,), and perhaps `spans` (where pictures lie), and
`kv[layer](q, k, v)` is a layer's attention.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import FunctionType

import torch
from torch import Tensor, nn

from hybridkv.cache.attention import check_pool
from hybridkv.cache.capacity import Capacity, bucket
from hybridkv.cache.dense import DenseCache
from hybridkv.cache.hybrid import CacheBytes, HybridCache
from hybridkv.cache.pack import Placement
from hybridkv.config import HybridConfig
from hybridkv.planning.head_profile import HeadProfile
from hybridkv.planning.plan import Plan, full_plan, known_plan, layer_order
from hybridkv.planning.policies import POLICIES
from hybridkv.planning.prefill import Prefill, outline
from hybridkv.sampling import Sampling, sample

# Else the compile cache on disk would refuse graphs with a loop (`retrieve.best_chunks`). Its key covers their bodies.
CPU_OPTIONS = {"unsafe_marked_cacheable_functions": {"torch.ops.higher_order.while_loop": torch.__version__}}


class DecodeState(nn.Module):
    """What a step reads and writes beside the cache. Buffers, so that CUDA graphs can keep their addresses."""

    def __init__(self, batch: int, new_tokens: int, eos: Sequence[int], device: torch.device):
        super().__init__()

        def buffer(name: str, value: Tensor) -> None:
            self.register_buffer(name, value.to(device), persistent=False)

        buffer("token", torch.zeros(batch, dtype=torch.int64))
        buffer("position", torch.zeros(batch, dtype=torch.int64))
        buffer("active", torch.zeros(batch, dtype=torch.bool))
        buffer("count", torch.zeros(1, dtype=torch.int64))  # tokens chosen so far
        buffer("noise", torch.zeros(new_tokens, batch))
        buffer("temperature", torch.ones(()))
        buffer("top_p", torch.ones(()))
        buffer("eos", torch.tensor(eos or [-1]))

    def choose(self, logits: Tensor, greedy: bool) -> Tensor:
        """The next token (B,), which becomes the current one; a sequence that reaches its end is no longer active."""
        if greedy:
            token = logits.argmax(-1)
        else:
            token = sample(logits, self.temperature, self.top_p, self.noise.index_select(0, self.count)[0])
        self.active.logical_and_((token[:, None] != self.eos).all(-1))
        self.token.copy_(token)
        self.count.add_(1)
        return token


def decode_step(model: nn.Module, cache: HybridCache | DenseCache, state: DecodeState, greedy: bool) -> Tensor:
    """One token for every sequence: (B,) int64. The whole of it is one graph."""
    logits = model.step(state.token, state.position, cache)
    cache.advance(state.active)
    state.position.add_(state.active)
    return state.choose(logits, greedy)


@dataclass
class Result:
    """One sequence's answer; the engine's timings and bytes are those of the whole batch."""

    token_ids: list[int] = field(default_factory=list)
    finished: bool = False  # ended by itself, not by the limit


@dataclass
class Stats:
    """What a generation cost.

    Attributes:
        static_heads, dynamic_heads: KV heads over all layers and sequences.
        attended_tokens: prompt tokens that a step reads, mean over heads and sequences.
        ttft_s: from the start to the first token, prefill, plan and compression included.
        compile_s: the first decoding step beyond the time of a later one; 0 when nothing was compiled.
        ms_per_token: median milliseconds of a decoding step after the first; with CUDA graphs after the second, too,
            which records them and counts as compiling.
    """

    static_heads: int = 0
    dynamic_heads: int = 0
    attended_tokens: float = 0.0
    bytes: CacheBytes | None = None
    ttft_s: float = 0.0
    compile_s: float = 0.0
    ms_per_token: float | None = None


class Engine:
    """Generates with one model and one policy; keeps its cache and compiled step from prompt to prompt.

    Args:
        model: see the module.
        config: how to compress.
        policy: a name in `policies.POLICIES`, or a function from a `Prefill` to a `Plan`. `full` keeps everything, on
            the same pages; `dense` keeps everything in plain tensors read by SDPA. `quest` sets `config.retrieval`.
        eos: token ids that end an answer.
        compile: False runs the same step uncompiled, with the same tokens.
    """

    def __init__(
        self,
        model: nn.Module,
        config: HybridConfig | None = None,
        policy: str | Callable[[Prefill], Plan] = "hybridkv",
        eos: Sequence[int] = (),
        compile: bool = True,
    ):
        if not callable(policy) and policy not in (*POLICIES, "dense"):
            raise ValueError(f"policy must be one of {', '.join(POLICIES)}, dense, or a function, got {policy!r}")
        self.model, self.config, self.policy, self.eos = model, config or HybridConfig(), policy, tuple(eos)
        if policy == "quest":
            self.config = replace(self.config, retrieval="bound")
        self.cache: HybridCache | DenseCache | None = None
        self.state: DecodeState | None = None
        self.greedy = True
        self.stats = Stats()
        self.compile = compile
        self._decode_step = decode_step

    def prefill(
        self, prompts: Sequence, on_layer: Callable[[], None] | None = None
    ) -> tuple[list[Prefill], Tensor, list[int]]:
        """Reads the prompts one by one: their records, the next token's logits (B, V) and positions."""
        prefills = [Prefill(p.prunable, self.config, on_layer, getattr(p, "spans", ())) for p in prompts]
        read = [self.model.prefill(prompt, prefill) for prompt, prefill in zip(prompts, prefills, strict=True)]
        logits, positions = zip(*read, strict=True)
        return prefills, torch.cat(logits), list(positions)

    def load(self, prefills: list[Prefill], new_tokens: int) -> None:
        """Plans and packs the prompts; makes a new cache only if the last one can't hold them."""
        if self.policy == "dense":
            slots, batch = max(len(p.prunable) for p in prefills) + new_tokens, len(prefills)
            if not self.cache or self.cache.slots < slots or len(self.cache.length) != batch:
                self.cache = None
                self.cache = DenseCache(slots, batch, prefills[0])
                self._compile()
            self._count_heads([full_plan(p) for p in prefills])
            self.cache.load(prefills, new_tokens)
            return
        make_plan = self.policy if callable(self.policy) else POLICIES[self.policy]
        plans = [make_plan(p) for p in prefills]
        self._make_room(plans, new_tokens, prefills[0])
        self.cache.load(prefills, plans, new_tokens)

    @property
    def plans_ahead(self) -> bool:
        """Whether prompts can be planned before they are read: an offline profile knows the heads."""
        config = self.config
        return self.policy == "hybridkv" and config.classifier == "profile" and config.head_weight == "uniform"

    def prefill_into_cache(
        self, prompts: Sequence, new_tokens: int, on_layer: Callable[[], None] | None = None
    ) -> tuple[Tensor, list[int]]:
        """`prefill` and `load` in one, for prompts that can be planned ahead: each layer is packed as it is read.

        Beside the cache, only one layer of one prompt is ever held in full.

        Returns:
            the next token's logits (B, V) and positions.

        Raises:
            ValueError: the head profile is for another model.
        """
        layers = len(HeadProfile.load(self.config.head_profile).need)
        placement: Placement | None = None

        def pack(b: int) -> None:
            nonlocal placement
            prefill, layer = prefills[b], len(prefills[b].layers) - 1
            if layer >= layers:
                raise ValueError(f"{self.config.head_profile} profiles {layers} layers, this model has more")
            if placement is None:
                outlines = [outline(p.prunable, self.config, layers, prefill.layers[0], p.spans) for p in prefills]
                plans = [known_plan(record) for record in outlines]
                self._make_room(plans, new_tokens, outlines[0])
                placement = self.cache.reserve(plans, new_tokens)
            self.cache.pack(placement, b, prefill, layer, layer_order(prefill, layer))
            if on_layer:
                on_layer()

        prefills = [
            Prefill(p.prunable, self.config, partial(pack, b), getattr(p, "spans", ())) for b, p in enumerate(prompts)
        ]
        read = [self.model.prefill(prompt, prefill) for prompt, prefill in zip(prompts, prefills, strict=True)]
        if len(prefills[0].layers) < layers:
            raise ValueError(f"{self.config.head_profile} profiles {layers} layers, this model has fewer")
        logits, positions = zip(*read, strict=True)
        return torch.cat(logits), list(positions)

    def _make_room(self, plans: list[Plan], new_tokens: int, like: Prefill) -> None:
        """A paged cache that can hold these plans: the one that is there, or a new one."""
        capacity = Capacity.of(plans, new_tokens)
        if not self.cache or self.cache.batch != len(plans) or not self.cache.capacity.covers(capacity):
            if self.compile:
                key = like.layers[0].k
                check_pool(capacity.n_pages * self.config.page_size * key.shape[-1], key.device)
            self.cache = None  # free the old pool before the new one is made
            self.cache = HybridCache(capacity, len(plans), like)
            self._compile()
        self._count_heads(plans)

    def _count_heads(self, plans: list[Plan]) -> None:
        dynamic = torch.stack([plan.dynamic for plan in plans])
        self.stats.dynamic_heads = int(dynamic.sum())
        self.stats.static_heads = dynamic.numel() - self.stats.dynamic_heads
        self.stats.attended_tokens = float(torch.stack([plan.attended for plan in plans]).double().mean())

    @torch.no_grad()
    def stream(
        self,
        prompts: Sequence,
        max_new_tokens: int | Sequence[int] = 128,
        sampling: Sampling | None = None,
        on_layer: Callable[[], None] | None = None,
    ) -> Iterator[list[int | None]]:
        """Generates, yielding one list of B token ids a step; None for a sequence that has ended.

        Args:
            prompts: B prompts, of any lengths.
            max_new_tokens: limit for all, or one for each prompt.
            sampling: default greedy.
            on_layer: called after each layer of each prompt's prefill, for progress.

        Raises:
            BudgetError: the budget can't hold what must be kept.
        """
        sampling, batch = sampling or Sampling(), len(prompts)
        limits = [max_new_tokens] * batch if isinstance(max_new_tokens, int) else list(max_new_tokens)
        if not batch or len(limits) != batch or min(limits) < 1:
            raise ValueError("stream wants at least one prompt, and at least one new token for each")
        start, self.stats = time.perf_counter(), Stats()
        if self.plans_ahead:
            logits, positions = self.prefill_into_cache(prompts, max(limits), on_layer)
        else:
            prefills, logits, positions = self.prefill(prompts, on_layer)
            self.load(prefills, max(limits))
        self.begin(positions, max(limits), sampling, logits.device)
        token = self.state.choose(logits, self.greedy)
        times, alive, begun = [], list(range(batch)), start
        for n in range(max(limits)):
            token_ids = token.tolist()  # the one place where the host waits
            if n == 0:
                self.stats.ttft_s = time.perf_counter() - start
            else:
                times.append(time.perf_counter() - begun)
            yield [token_ids[b] if b in alive else None for b in range(batch)]
            alive = [b for b in alive if token_ids[b] not in self.eos and n + 1 < limits[b]]
            if not alive:
                break
            begun = time.perf_counter()
            token = self.step()
        slow = 2 if self.compile and logits.is_cuda else 1  # steps that compile and record
        if len(times) > slow:
            typical = float(torch.tensor(times[slow:]).median())
            self.stats.ms_per_token = typical * 1e3
            self.stats.compile_s = max(0.0, sum(times[:slow]) - slow * typical)
        if isinstance(self.cache, HybridCache):
            self.stats.bytes = self.cache.count_bytes()

    def begin(self, positions: list[int], new_tokens: int, sampling: Sampling, device: torch.device) -> None:
        """Sets the state for a generation whose B next tokens stand at `positions`."""
        batch, rows = len(positions), bucket(new_tokens)
        if not self.state or self.state.noise.shape[1] != batch or self.state.noise.shape[0] < rows:
            self.state = DecodeState(batch, rows, self.eos, device)
            self._compile()
        self.greedy, state = sampling.temperature == 0, self.state
        state.position.copy_(torch.tensor(positions))
        state.active.fill_(True)
        state.count.zero_()
        state.temperature.fill_(sampling.temperature)
        state.top_p.fill_(sampling.top_p)
        for b in range(batch):  # a sequence's draws do not depend on the others'
            generator = torch.Generator().manual_seed(sampling.seed + b)
            state.noise[:, b].copy_(torch.rand(len(state.noise), generator=generator))

    def step(self) -> Tensor:
        """The next token of every sequence, (B,) int64."""
        return self._decode_step(self.model, self.cache, self.state, self.greedy)

    def _compile(self) -> None:
        """For a cache or state of a new size. Its own code object keeps other sizes' graphs out of Dynamo's count."""
        if self.compile:
            step = FunctionType(decode_step.__code__.replace(), decode_step.__globals__)
            how = {"mode": "reduce-overhead"} if next(self.cache.buffers()).is_cuda else {"options": CPU_OPTIONS}
            self._decode_step = torch.compile(step, fullgraph=True, dynamic=False, **how)

    def generate(
        self, prompts: Sequence, max_new_tokens: int | Sequence[int] = 128, sampling: Sampling | None = None
    ) -> list[Result]:
        """`stream`, gathered: one `Result` for each prompt, end tokens left out."""
        results = [Result() for _ in prompts]
        for tokens in self.stream(prompts, max_new_tokens, sampling):
            for result, token in zip(results, tokens, strict=True):
                if token in self.eos:
                    result.finished = True
                elif token is not None:
                    result.token_ids.append(token)
        return results
