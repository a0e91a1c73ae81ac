"""The engine: reads prompts into a cache, then decodes.

    engine = Engine(model, HybridConfig(budget=0.1))
    for result in engine.generate(prompts): ...

    reading = engine.read(prompt)  # its pictures and long texts, once
    engine.ask(reading, prompt)

It works with any model that has

    prefill(prompt, kv) -> logits (1, V), next position     and     step(token, position, kv) -> logits (B, V)

where prompts have `input_ids` (T,), and perhaps `prunable` (T,) and `spans` (where pictures lie), and
`kv[layer](q, k, v)` is a layer's attention. If the model has `n_layers`, too, and the policy needs not see a prompt to
plan it, no more than one layer of it is ever held in full; else no more than one prompt. Questions about readings want
`prefill(prompt, kv, start)`, which computes only what comes after the first `start` tokens.
"""

import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hybridkv.cache.attention import check_pool, why_uncompiled
from hybridkv.cache.capacity import Capacity, bucket
from hybridkv.cache.dense import DenseCache
from hybridkv.cache.hybrid import CacheBytes, HybridCache
from hybridkv.cache.pack import Kept, keep
from hybridkv.config import HybridConfig
from hybridkv.decode import DecodeState, check_logits, compiled_step, decode_step
from hybridkv.fingerprint import fingerprint
from hybridkv.launch import Steps
from hybridkv.planning.plan import Plan, check_plan, full_plan
from hybridkv.planning.policies import POLICIES
from hybridkv.planning.prefill import NotRead, Prefill, all_but_question
from hybridkv.planning.share import share
from hybridkv.read_on import PrefillOn, read_once
from hybridkv.reading import Question, Reading
from hybridkv.sampling import Sampling

if TYPE_CHECKING:
    from hybridkv.model import Processor, Prompt


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
        retrieving_layers: layers whose graph retrieves.
        attended_tokens: prompt tokens that a step reads, mean over heads and sequences.
        bytes: of the cache; None for `dense`.
        ttft_s: from the start to the first token, prefill, plan and compression included.
        compile_s: the first decoding step beyond the time of a later one; 0 when nothing was compiled.
        ms_per_token: median milliseconds of a decoding step after the first; with CUDA graphs after the second, too,
            which records them and counts as compiling.
    """

    static_heads: int = 0
    dynamic_heads: int = 0
    retrieving_layers: int = 0
    attended_tokens: float = 0.0
    bytes: CacheBytes | None = None
    ttft_s: float = 0.0
    compile_s: float = 0.0
    ms_per_token: float | None = None


class Engine:
    """Generates with one model and one policy; keeps its cache and compiled step from prompt to prompt.

    One generation at a time: a new one ends the one before it, whose `stream` raises when it is asked to go on.

    Args:
        model: see the module.
        config: how to compress.
        policy: a name in `policies.POLICIES`, or a function from a `Prefill` to a `Plan`. `full` keeps everything, on
            the same pages; `dense` keeps everything in plain tensors read by SDPA. `quest` sets `config.retrieval`.
        eos: token ids that end an answer.
        compile: False runs the same step uncompiled, with the same tokens; so does a CPU with torch before 2.13.
        record: writes down what is kept and retrieved, for `report`, in a step that is compiled for that.
    """

    def __init__(
        self,
        model: nn.Module,
        config: HybridConfig | None = None,
        policy: str | Callable[[Prefill], Plan] = "hybridkv",
        eos: Sequence[int] = (),
        compile: bool = True,
        record: bool = False,
    ):
        if record and policy == "dense":
            raise ValueError("dense has no pages to write down: use policy='full' to record a full cache")
        if not callable(policy) and policy not in (*POLICIES, "dense"):
            raise ValueError(f"policy must be one of {', '.join(POLICIES)}, dense, or a function, got {policy!r}")
        self.model, self.config, self.policy, self.eos = model, config or HybridConfig(), policy, tuple(eos)
        if policy == "quest":
            self.config = replace(self.config, retrieval="bound")
        self.cache: HybridCache | DenseCache | None = None
        self.state: DecodeState | None = None
        self.greedy = True
        self.stats = Stats()
        self.compile, self.record = compile, record
        self.ahead: bool | None = None  # whether steps are launched before the one before is read; None: on GPUs
        self._decode_step = decode_step
        self._lock = threading.Lock()  # held while something is computed, not between two tokens
        self._stream: object | None = None  # the generation that the cache belongs to

    def plan(self, prefill: Prefill) -> Plan:
        """What this engine keeps of a prompt.

        Raises:
            BudgetError: the budget can't hold what must be kept, or the policy's plan is over it; see `config.strict`.
            ValueError: the policy's plan breaks the rules, see `check_plan`.
        """
        if self.policy in ("full", "dense"):
            return full_plan(prefill)
        plan = (self.policy if callable(self.policy) else POLICIES[self.policy])(prefill)
        check_plan(plan, prefill)
        return plan

    @torch.no_grad()
    def read(
        self,
        prompt: object,
        past: Reading | None = None,
        tokens: int | None = None,
        on_layer: Callable[[], None] | None = None,
        int8: bool = False,
    ) -> Reading:
        """Reads what questions are asked about, once, into host memory. What is being generated goes on after it.

        Args:
            prompt: of which the first `tokens` are read.
            past: a reading of fewer of these tokens, which it goes on from.
            tokens: None for `prompt.heavy`, what comes before the question can make a difference, where a prompt has
                that; for the whole prompt, where it has not.
            on_layer: called after each layer, for progress.
            int8: keys and values are kept in a byte a number, and come back rounded (`int8.py`); always, if those of
                `past` are.

        Raises:
            ValueError: there is nothing to read, or `past` is of something else, or of another model.
        """
        with self._alone():
            return read_once(self.model, self.fingerprint, prompt, self.config, past, tokens, on_layer, int8)

    @cached_property
    def fingerprint(self) -> str:
        """The model's and its dtype's, by which it knows readings of its own."""
        dtypes = {str(weight.dtype).removeprefix("torch.") for weight in self.model.parameters()}
        return "-".join([fingerprint(self.model), *sorted(dtypes)])

    def take_in(
        self, prompts: Sequence, new_tokens: int, on_layer: Callable[[], None] | None = None
    ) -> tuple[Tensor, list[int]]:
        """Reads the prompts one by one, and packs each into the cache before the next is read.

        Each is planned as early as the policy allows. Planned before it is read, each layer is packed as soon as it
        was read. If the policy wants to see the whole prompt first, what it keeps waits for the cache, whose size is
        known once all prompts are planned.

        Args:
            new_tokens: that may be generated for each.
            on_layer: called after each layer of each prompt, for progress.

        Returns:
            the next token's logits (B, V) and positions.
        """
        plans: list[Plan] = []
        ahead = False

        def layer_was_read(b: int) -> None:
            nonlocal ahead
            prefill, layer = prefills[b], len(prefills[b].layers) - 1
            if (b, layer) == (0, 0) and (n_layers := getattr(self.model, "n_layers", None)):
                try:
                    plans.extend(self.plan(p.outline(n_layers, prefill.like)) for p in prefills)
                    plans[:] = share(plans, prompts)
                    ahead = True
                    self._make_room(plans, new_tokens, prefill.outline(n_layers, prefill.like))
                except NotRead:
                    plans.clear()
            if ahead:
                self.cache.pack(b, layer, keep(plans[b], prefill, layer))
            if on_layer:
                on_layer()

        prefills = [self._record(prompt, partial(layer_was_read, b)) for b, prompt in enumerate(prompts)]
        logits, positions, waiting = [], [], []
        for b, (prompt, prefill) in enumerate(zip(prompts, prefills, strict=True)):
            if isinstance(prompt, Question):
                next_logits, position = self.model.prefill(prompt.prompt, prefill, prompt.reading.tokens)
            else:
                next_logits, position = self.model.prefill(prompt, prefill)
            if prefill.like is None:
                raise ValueError("model.prefill(prompt, kv) called kv[layer](q, k, v) in no layer")
            check_logits(next_logits, 1, "prefill")
            logits.append(next_logits)
            positions.append(position)
            if not ahead:
                plans.append(self.plan(prefill))
                kept = map(partial(keep, plans[b], prefill), range(len(prefill.layers)))
                # The next prompt needs the room that this one's full cache takes; the last one's is packed from it.
                waiting.append(kept if b + 1 == len(prompts) else list(kept))
        if not ahead:
            self._fill(share(plans, prompts), waiting, new_tokens, prefills[0])
        return torch.cat(logits), positions

    def load(self, prefills: Sequence[Prefill], new_tokens: int) -> None:
        """Plans and packs prompts that somebody else has read. Their dense keys and values are freed."""
        plans = [self.plan(prefill) for prefill in prefills]
        layers = range(len(prefills[0].layers))
        kept = [map(partial(keep, *each), layers) for each in zip(plans, prefills, strict=True)]
        self._fill(plans, kept, new_tokens, prefills[0])

    def _fill(self, plans: list[Plan], kept: list[Iterable[Kept]], new_tokens: int, like: Prefill) -> None:
        self._make_room(plans, new_tokens, like)
        for b in range(len(kept)):
            for layer, of_layer in enumerate(kept[b]):
                self.cache.pack(b, layer, of_layer)
            kept[b] = ()  # it lies in the cache now

    def _record(self, prompt: object, on_layer: Callable[[], None]) -> Prefill:
        ids, prunable = getattr(prompt, "input_ids", None), getattr(prompt, "prunable", None)
        if not isinstance(ids, Tensor) or ids.dim() != 1 or not len(ids) or ids.is_floating_point():
            raise ValueError("a prompt's input_ids must be a tensor (T,) of token numbers, with one token at least")
        if prunable is None:
            prunable = all_but_question(len(ids), self.config)
        if not isinstance(prunable, Tensor) or prunable.shape != ids.shape:
            raise ValueError(f"a prompt's prunable must be a mask (T,), as long as its {len(ids)} tokens")
        spans = getattr(prompt, "spans", ())
        if isinstance(prompt, Question):
            prompt.reading.check(self.fingerprint)
            return PrefillOn(prompt.reading, prunable, self.config, on_layer, spans)
        return Prefill(prunable, self.config, on_layer, spans)

    def _make_room(self, plans: list[Plan], new_tokens: int, like: Prefill) -> None:
        """Reserves a cache for these plans: the one that is there, or a new one if that can't hold them."""
        batch, fits = len(plans), self.cache is not None and self.cache.batch == len(plans)
        if self.policy == "dense":
            slots = max(plan.tokens for plan in plans) + new_tokens
            if not fits or self.cache.slots < slots:
                slots = bucket(slots) if fits else slots  # prompts grow, and each further size would be compiled anew
                self.cache = None  # free the old tensors before new ones are made
                self.cache = DenseCache(slots, batch, like)
                self._compile()
        else:
            capacity = Capacity.of(plans, new_tokens)
            if not fits or not self.cache.capacity.covers(capacity):
                if self.compile:
                    check_pool(capacity.n_pages * self.config.page_size * like.like.shape[-1], like.like.device)
                self.cache = None
                self.cache = HybridCache(capacity, batch, like, self.record)
                self._compile()
        self.cache.reserve(plans, new_tokens)
        self._count_heads(plans)

    def _count_heads(self, plans: list[Plan]) -> None:
        dynamic = torch.stack([plan.dynamic for plan in plans])
        self.stats.dynamic_heads = int(dynamic.sum())
        self.stats.static_heads = dynamic.numel() - self.stats.dynamic_heads
        self.stats.retrieving_layers = int(sum(plan.retrieving for plan in plans).count_nonzero())
        self.stats.attended_tokens = float(torch.stack([plan.attended for plan in plans]).double().mean())

    def stream(
        self,
        prompts: Sequence,
        max_new_tokens: int | Sequence[int] = 128,
        sampling: Sampling | None = None,
        on_layer: Callable[[], None] | None = None,
    ) -> Iterator[list[int | None]]:
        """Generates, yielding one list of B token ids a step; None for a sequence that has ended.

        Args:
            prompts: B prompts, of any lengths; a `Question` is one about a reading.
            max_new_tokens: limit for all, or one for each prompt.
            sampling: default greedy.
            on_layer: called after each layer of each prompt's prefill, for progress.

        Raises:
            BudgetError: the budget can't hold what must be kept.
            RuntimeError: when it goes on after the engine began another generation, or while another thread uses it.
        """
        batch = len(prompts)
        limits = [max_new_tokens] * batch if isinstance(max_new_tokens, int) else list(max_new_tokens)
        if not batch or len(limits) != batch or min(limits) < 1:
            raise ValueError("stream wants at least one prompt, and at least one new token for each")
        return self._generate(prompts, limits, sampling or Sampling(), on_layer)

    @torch.no_grad()
    def _generate(
        self, prompts: Sequence, limits: list[int], sampling: Sampling, on_layer: Callable[[], None] | None
    ) -> Iterator[list[int | None]]:
        start, mine = time.perf_counter(), object()
        with self._alone():
            self._stream, self.stats = mine, Stats()
            logits, positions = self.take_in(prompts, max(limits), on_layer)
            self.begin(positions, max(limits), sampling, logits.device)
            token = self.state.choose(logits, self.greedy).tolist()
            self.stats.ttft_s = time.perf_counter() - start
        compiling = 2 if self.compile and logits.is_cuda else 1  # steps; the second one records CUDA graphs
        ahead = (self.compile and logits.is_cuda) if self.ahead is None else self.ahead
        together = ahead and not self.record  # a step is written down before the next one
        steps = Steps(self.step, max(limits) - 1, logits.device, alone=compiling if together else None)
        alive = list(range(len(prompts)))
        for n in range(1, max(limits) + 1):
            yield [token[b] if b in alive else None for b in range(len(prompts))]
            alive = [b for b in alive if token[b] not in self.eos and n < limits[b]]
            if not alive:
                break
            with self._alone():
                if self._stream is not mine:
                    raise RuntimeError("this engine has begun another generation, which ended this one")
                token = steps.tokens()
                if self.record:
                    self.cache.record_step()
        with self._alone():
            if self._stream is mine:
                self._measure(steps.seconds, slow=compiling)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            raise RuntimeError("this engine is at work in another thread: use an engine for each")
        try:
            yield
        finally:
            self._lock.release()

    def _measure(self, times: list[float], slow: int) -> None:
        """Fills in `stats` at the end; the first `slow` steps compile and record."""
        if len(times) > slow:
            typical = float(torch.tensor(times[slow:]).median())
            self.stats.ms_per_token = typical * 1e3
            self.stats.compile_s = max(0.0, sum(times[:slow]) - slow * typical) if self.compile else 0.0
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
        """For a cache or state of a new size."""
        device = next(self.cache.buffers()).device
        if self.compile and (why := why_uncompiled(device)):
            warnings.warn(f"the decoding step runs uncompiled, since {why}", stacklevel=2)
            self.compile = False
        if self.compile:
            self._decode_step = compiled_step(device)

    def ask(
        self,
        reading: Reading,
        prompts: object | Sequence,
        max_new_tokens: int | Sequence[int] = 128,
        sampling: Sampling | None = None,
    ) -> Result | list[Result]:
        """Answers a question about a reading, or a list of them at once; only what the reading lacks is read.

        Each question keeps what it needs within a budget of its own, as if it were the only one.

        Args:
            prompts: a prompt that begins as the reading does, or several.

        Raises:
            ValueError: a prompt does not go on from this reading, or another model has made it.
        """
        if isinstance(prompts, list | tuple):
            return self.generate([Question(prompt, reading) for prompt in prompts], max_new_tokens, sampling)
        return self.generate([Question(prompts, reading)], max_new_tokens, sampling)[0]

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

    def report(self, processor: "Processor", prompt: "Prompt", token_ids: Sequence[int], sequence: int = 0) -> str:
        """A page of HTML, one file that needs nothing else, on what the last generation kept and retrieved.

        Args:
            processor: that of the model, which made the prompt.
            prompt, token_ids: the prompt and its answer, as generated.
            sequence: its number in the batch.

        Raises:
            ValueError: the engine was not made with `record=True`, or has not generated yet.
        """
        from hybridkv.html import Run, page

        return page(processor, prompt, [Run.of(self, token_ids, sequence)])
