"""Measures a head profile (`hybridkv.calibrate`) of a Hugging Face model.

profile = hybridkv.hf.calibrate(model, samples)
cache = HybridKVCache(model, inputs, head_profile=profile, max_new_tokens=256)
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hybridkv.calibrate import NEW_TOKENS
from hybridkv.calibrate import calibrate as measure
from hybridkv.config import HybridConfig
from hybridkv.hf_inputs import Layout, layouts
from hybridkv.hf_serving import RoutedCache, check_model, scaled
from hybridkv.planning.head_profile import HeadProfile
from hybridkv.planning.need import Observer
from hybridkv.planning.prefill import Prefill, Window


@dataclass(frozen=True)
class Sample:
    """One prompt: what the model reads, and what of it is context."""

    inputs: dict
    layout: Layout

    @property
    def prunable(self) -> Tensor:
        return self.layout.prunable

    @property
    def spans(self) -> tuple:
        return self.layout.spans


class WatchedCache(RoutedCache):
    """Records a prompt in a `Prefill`, or answers it from an `Observer`.

    Args:
        seen: tokens that were read already.
    """

    def __init__(self, config, watcher: Prefill | Observer, seen: int = 0):
        super().__init__(config, static=False, room=0)
        self.config, self.watcher, self.seen = config, watcher, seen
        self.rows: Tensor | None = None  # of the window, found once a prompt

    def length(self) -> int:
        return self.seen

    def mask_sizes(self, query_length: int, index: int) -> tuple[int, int]:
        return query_length, 0

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
        if index == self.n_layers - 1:
            self.seen += q.shape[2]
        if isinstance(self.watcher, Observer):
            return self.watcher.attend(index, scaled(q, scaling), k, v).transpose(1, 2)
        if self.rows is None:
            self.rows = Window.of(self.watcher.prunable, self.watcher.config, self.watcher.spans).rows.to(q.device)
        self.watcher.record(index, scaled(q, scaling)[0, :, self.rows], k[0], v[0])
        return sdpa_attention_forward(module, q, k, v, attention_mask, scaling=scaling)[0]

    def answering(self, observer: Observer) -> "WatchedCache":
        """The prompt, read by all the observer's variants."""
        other = WatchedCache(self.config, observer, self.seen)
        for n, layer in enumerate(self.layers):
            if layer.is_sliding:
                other.layers[n] = copy.deepcopy(layer)
                other.layers[n].batch_repeat_interleave(observer.variants)
        return other


class Watched(nn.Module):
    """A model of transformers with the two methods that measuring calls. It knows positions by itself."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def prefill(self, sample: Sample, prefill: Prefill) -> tuple[Tensor, int]:
        self.prompt = self.cache = WatchedCache(self.model.config, prefill)
        out = self.model(**sample.inputs, past_key_values=self.cache, use_cache=True)
        return out.logits[:, -1], self.cache.seen

    def step(self, token: Tensor, position: Tensor, observer: Observer) -> Tensor:
        if self.cache.watcher is not observer:
            self.cache = self.prompt.answering(observer)
        return self.model(input_ids=token[:, None], past_key_values=self.cache, use_cache=True).logits[:, -1]


def calibrate(
    model: PreTrainedModel,
    samples: Sequence[Mapping | Tensor],
    *,
    prunable: Sequence[Tensor] | None = None,
    max_new_tokens: int = NEW_TOKENS,
    **settings,
) -> HeadProfile:
    """Which KV heads of a model need retrieval, and which look at pictures, measured on sample prompts.

    Of layers with full attention; the others have no heads here.

    Args:
        model: whose attention is `hybridkv`.
        samples: one prompt each, as for `generate`, without padding; a handful that are like those to come.
        prunable: what may be pruned of each, (T,) bool; None as for `HybridKVCache`.
        max_new_tokens: longest answer that is looked at.
        settings: fields of `HybridConfig`; `budget` is what heads are pruned to.

    Raises:
        ValueError: nothing to measure: a budget that prunes nothing, or no prompt that got an answer.
    """
    check_model(model)
    config = HybridConfig(**{"strict": False} | settings)
    read = []
    for n, sample in enumerate(samples):
        found = layouts(model.config, sample, config, None if prunable is None else prunable[n])
        inputs = {"input_ids": sample} if isinstance(sample, Tensor) else sample
        if len(found) != 1 or found[0].pad:
            raise ValueError(f"sample {n} must be one prompt without padding: a batch of one")
        read.append(Sample({name: to(value, model.device) for name, value in inputs.items()}, found[0]))
    eos = model.generation_config.eos_token_id
    eos = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    with torch.no_grad():
        return measure(Watched(model), read, config, eos, max_new_tokens, model.config.model_type)


def to(value: object, device: torch.device) -> object:
    return value.to(device) if isinstance(value, Tensor) else value
