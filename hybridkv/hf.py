"""HybridKV in any Hugging Face model.

    from hybridkv.hf import HybridKVCache

    model.set_attn_implementation("hybridkv")
    cache = HybridKVCache(model, inputs, budget=0.1, max_new_tokens=256)
    model.generate(**inputs, past_key_values=cache, max_new_tokens=256)

Importing this module registers the name `hybridkv` with transformers, and does nothing else. What the model calls is in
`hf_serving.py`, whether the prompt is the right one in `hf_prompt.py`, how it is read in `hf_prefill.py`, what may be
pruned of it in `hf_inputs.py`.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import CompileConfig, PreTrainedModel

from hybridkv.cache.attention import check_pool, why_uncompiled
from hybridkv.cache.capacity import Capacity, bucket
from hybridkv.cache.hybrid import HybridCache
from hybridkv.cache.pack import keep
from hybridkv.config import HybridConfig
from hybridkv.decode import CPU_OPTIONS
from hybridkv.engine import Engine, Stats
from hybridkv.hf_calibrate import calibrate
from hybridkv.hf_prefill import BatchPrefill
from hybridkv.hf_prompt import announced, check_owner, watch
from hybridkv.hf_serving import RoutedCache, check_model, layer_kinds, scaled
from hybridkv.planning.head_profile import HeadProfile
from hybridkv.planning.plan import Plan
from hybridkv.planning.policies import POLICIES
from hybridkv.planning.prefill import NotRead, Prefill

__all__ = ["HybridKVCache", "calibrate", "compile"]


class HybridKVCache(RoutedCache):
    """A compressed key-value cache for one call of `model.generate`; `reset` makes it ready for the next one.

    Args:
        model: any decoder of transformers whose attention is `hybridkv`; its weights on one device.
        inputs: what goes to `generate`, a dict or token ids (B, T). Batches are padded on the left.
        max_new_tokens: room for so many; as for `generate`.
        policy: a name in `policies.POLICIES`, or a function from a `Prefill` to a `Plan`.
        prunable: (B, T) or (T,) bool, the tokens that may be pruned; the others stay in every head's cache. None takes
            image and video tokens, and of a prompt without any all but the last `window` (32).
        num_return_sequences: as for `generate`.
        head_profile: of `calibrate`. With it, `classifier` is `profile` unless that, or `retrieving_layers`, is given.
        settings: fields of `HybridConfig`: `budget`, `strict`, `page_size`, ...

    Raises:
        ValueError: the inputs or the settings can't be used.
        NotImplementedError: the model can't.
        RuntimeError: the model's attention is not set, or it is in training.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        inputs: Mapping | Tensor,
        *,
        max_new_tokens: int,
        policy: str | Callable[[Prefill], Plan] = "hybridkv",
        prunable: Tensor | None = None,
        num_return_sequences: int = 1,
        head_profile: HeadProfile | None = None,
        **settings,
    ):
        check_model(model)
        if inputs is None:  # for `reset` the same again, and here there is none
            raise ValueError("inputs must be what generate gets, a dict or token ids, not NoneType")
        if not callable(policy) and (not isinstance(policy, str) or policy not in POLICIES):
            raise ValueError(f"policy must be one of {', '.join(POLICIES)}, or a function, got {policy!r}")
        if head_profile is not None and not settings.keys() & {"classifier", "retrieving_layers"}:
            settings["classifier"] = "profile"
        # The engine knows what a policy makes of a prompt. It has no model here, and reads nothing.
        self._planner = Engine(nn.Module(), HybridConfig(head_profile=head_profile, **settings), policy, compile=False)
        self._model, self._copies = weakref.ref(model), num_return_sequences
        self._store: HybridCache | None = None
        self._length = self._active = None  # tensors: () tokens read, padding included; (B,) bool
        self._announce(inputs, prunable, max_new_tokens)
        super().__init__(model.config, static=True, room=bucket(self._announced.tokens + self.max_new_tokens))
        self._begin()
        watch(model)

    def reset(
        self,
        inputs: Mapping | Tensor | None = None,
        *,
        max_new_tokens: int | None = None,
        prunable: Tensor | None = None,
    ) -> None:
        """Forgets the prompt, and expects the next one; the memory is kept, and with it what was compiled, if it fits.

        Args:
            inputs: what goes to `generate` next; None for the same again.
            max_new_tokens: None for as many as before.
            prunable: as for the cache.
        """
        before = self._announced.tokens + self.max_new_tokens, len(self._announced.layouts)
        if inputs is None and prunable is not None:
            raise ValueError("prunable goes with inputs: give both")
        self._announce(inputs, prunable, self.max_new_tokens if max_new_tokens is None else max_new_tokens)
        room, batch = self._announced.tokens + self.max_new_tokens, len(self._announced.layouts)
        if bucket(room) > bucket(before[0]) or batch != before[1]:
            self.layers = self.new_layers(bucket(room))
        self._begin()

    def stats(self) -> Stats:
        """What the prompts cost, in the words of `Engine.stats`; times are not taken.

        Bytes are those of layers with full attention; sliding layers' are not counted.

        Raises:
            RuntimeError: nothing was generated yet.
        """
        if not self._loaded:
            raise RuntimeError("the cache is empty: generate first")
        dynamic = torch.stack([plan.dynamic for plan in self._plans])
        return Stats(
            static_heads=int((~dynamic).sum()),
            dynamic_heads=int(dynamic.sum()),
            retrieving_layers=int(sum(plan.retrieving for plan in self._plans).count_nonzero()),
            attended_tokens=float(torch.stack([plan.attended for plan in self._plans]).double().mean()),
            bytes=self._store.count_bytes(),
        )

    def _announce(self, inputs: Mapping | Tensor | None, prunable: Tensor | None, max_new_tokens: int) -> None:
        for name, count in (("max_new_tokens", max_new_tokens), ("num_return_sequences", self._copies)):
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise ValueError(f"{name} must be a positive number, got {count!r}")
        if inputs is not None:
            self._announced = announced(self._model().config, inputs, self._planner.config, prunable, self._copies)
        self.max_new_tokens = max_new_tokens

    def _begin(self) -> None:
        for layer in self.layers:
            layer.reset()
        self._prefill = BatchPrefill(self._announced, self.n_layers, self._planner.config)
        self._plans: list[Plan] = []
        self._ahead = self._loaded = False
        self._steps = 0

    @property
    def _is_user_defined(self) -> bool:
        return True

    @_is_user_defined.setter
    def _is_user_defined(self, value: bool) -> None:
        """transformers sets it when `generate` begins with a cache of the user's."""
        if self._loaded:
            raise RuntimeError("this cache holds a prompt already: call cache.reset(inputs) before the next generate")
        self._begin()  # whatever a call that failed has left

    def expect(self, ids: Tensor | None, embeddings: Tensor | None) -> None:
        if not self._loaded:
            with self._anew_if_it_fails():
                self._prefill.expect(ids, embeddings)

    def length(self) -> int | Tensor:
        return self._length if self._loaded else self._prefill.seen

    def mask_sizes(self, query_length: int, index: int) -> tuple[int, int]:
        if not self._loaded:
            return self._prefill.seen + query_length, 0
        if index == 0 and not torch.compiler.is_compiling():  # once a step, before it is computed
            self._count(query_length)
        return query_length, 0

    def _count(self, new: int) -> None:
        if new != 1:
            raise RuntimeError(
                f"this cache holds a prompt, and goes on by one token at a time, not {new}: call cache.reset(inputs) "
                "before the next prompt"
            )
        self._steps += 1
        if self._steps > self.max_new_tokens:
            raise RuntimeError(
                f"the cache has room for {self.max_new_tokens} new tokens: make it, or call cache.reset, with a larger "
                "max_new_tokens"
            )

    def attend(
        self,
        index: int,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None,
    ) -> Tensor:
        if not self._loaded:
            return self._read(index, module, q, k, v, attention_mask, scaling)
        step = one_region if torch.compiler.is_compiling() else one_layer
        out = step(self._store[index], scaled(q, scaling), k, v)  # (B, Hq, 1, D)
        if index == self.n_layers - 1:
            self._store.advance(self._active)
            self._length.add_(1)
        return out.transpose(1, 2)

    @torch.compiler.disable(reason="hybridkv: only decoding steps can be compiled; leave out prefill_chunk_size")
    @torch.no_grad()
    def _read(
        self, index: int, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None
    ) -> Tensor:
        """One layer of the prompt, or of a chunk of it."""
        with self._anew_if_it_fails():
            if index == 0:
                check_owner(self._model(), module)
            out, complete = self._prefill.attend(index, module, q, k, v, mask, scaling)
            if complete:
                self._keep(index)
        return out

    @contextmanager
    def _anew_if_it_fails(self) -> Iterator[None]:
        """A prompt that could not be read leaves nothing behind. (transformers 5.17 and later say when one begins.)"""
        try:
            yield
        except Exception:
            self._begin()
            raise

    def _keep(self, index: int) -> None:
        """Packs what was read. It is planned as early as the policy allows, see `Engine.read`."""
        prefills = self._prefill.prefills
        if index == 0:
            outlines = [prefill.outline(self.n_layers, prefills[0].like) for prefill in prefills]
            try:
                self._make_room([self._planner.plan(outline) for outline in outlines], outlines[0])
                self._ahead = True
            except NotRead:
                pass
        if self._ahead:
            self._pack(index)
        if index == self.n_layers - 1:
            if not self._ahead:
                self._make_room([self._planner.plan(prefill) for prefill in prefills], prefills[0])
                for layer in range(self.n_layers):
                    self._pack(layer)
            self._loaded, self._prefill = True, None

    def _make_room(self, plans: list[Plan], like: Prefill) -> None:
        """Reserves a store for these plans: the one that is there, or a new one if that can't hold them."""
        capacity, batch, key = Capacity.of(plans, self.max_new_tokens), len(plans), like.like
        store = self._store
        if store is None or store.batch != batch or not store.capacity.covers(capacity):
            check_pool(capacity.n_pages * like.config.page_size * key.shape[-1], key.device)
            self._store = store = None
            with torch.inference_mode(False):  # its tensors outlive a `generate` in inference mode
                self._store = HybridCache(capacity, batch, like)
        self._store.reserve(plans, self.max_new_tokens)
        self._plans = plans
        if self._length is None or len(self._active) != batch:
            with torch.inference_mode(False):
                self._length = torch.zeros((), dtype=torch.int64, device=key.device)
                self._active = torch.ones(batch, dtype=torch.bool, device=key.device)
            for tensor in (self._length, self._active):
                torch._dynamo.mark_static_address(tensor)  # as transformers' own, so that CUDA graphs can be used
        self._length.fill_(self._announced.tokens)

    def _pack(self, layer: int) -> None:
        for b, (plan, prefill) in enumerate(zip(self._plans, self._prefill.prefills, strict=True)):
            self._store.pack(b, layer, keep(plan, prefill, layer))


def one_layer(layer: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return layer(q, k, v)


@torch.compiler.nested_compile_region
def one_region(layer: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One layer's attention; under `torch.compile` all layers share one compiled region."""
    return layer(q, k, v)


def compile(model: PreTrainedModel) -> None:
    """Makes `generate` compile its decoding step into one graph, on whatever device.

    On GPUs it does so by itself, but is content with several graphs. Only caches that can be compiled are: this one is,
    transformers' `DynamicCache` is not. Settings for it are part of `model.generation_config`.

    Raises:
        ValueError: on a CPU, with torch before 2.13.
    """
    if why := why_uncompiled(model.device):
        raise ValueError(f"the decoding step can't be compiled: {why}")
    on_gpu = model.device.type == "cuda"
    how = {"mode": "reduce-overhead"} if on_gpu else {"mode": None, "options": CPU_OPTIONS}
    # Sliding layers of transformers count their tokens in Python: only as a dynamic number does that not recompile.
    sliding = "sliding_attention" in layer_kinds(model.config)[0]
    config = CompileConfig(fullgraph=True, dynamic=None if sliding else False, **how)
    config._compile_all_devices = True
    model.generation_config.compile_config = config
