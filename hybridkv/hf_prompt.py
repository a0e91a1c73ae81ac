"""Whether a Hugging Face model reads the prompt that a cache was made for."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hybridkv.config import HybridConfig
from hybridkv.hf_inputs import Layout, has_pictures, layouts
from hybridkv.hf_serving import RoutedCache, refuse


@dataclass(frozen=True)
class Announced:
    """What a cache was told that `generate` will read.

    Attributes:
        layouts: of B sequences, copies included.
        ids: (B, T) int64, padding included; embeddings: (B, T, about 8), some numbers of each. None where not given.
        pictures: whether pixels come with them.
    """

    layouts: list[Layout]
    ids: Tensor | None
    embeddings: Tensor | None
    pictures: bool

    @property
    def tokens(self) -> int:
        """T, padding included."""
        return self.layouts[0].pad + len(self.layouts[0].prunable)

    def check(self, ids: Tensor | None, embeddings: Tensor | None, start: int) -> None:
        """Compares what a model gets from token `start` on, ids (B, T') or embeddings (B, T', C).

        Raises:
            ValueError: it is something else.
        """
        for mine, theirs in ((self.ids, ids), (self.embeddings, some_of(embeddings))):
            if mine is not None and theirs is not None:
                mine = mine[:, start : start + theirs.shape[1]].to(theirs.device, theirs.dtype)
                if not torch.equal(mine, theirs):
                    raise ValueError(
                        "the model reads another prompt than the cache was made for: make it, or call cache.reset, "
                        "with what goes to generate"
                    )
                return
        made, read = ("inputs_embeds", "input_ids") if self.ids is None else ("input_ids", "inputs_embeds")
        raise ValueError(f"the model reads {read}, the cache was made with {made}: give it {read}, too")


def announced(
    model_config, inputs: Mapping | Tensor, config: HybridConfig, prunable: Tensor | None, copies: int
) -> Announced:
    """See `layouts`."""
    found = layouts(model_config, inputs, config, prunable, copies)
    inputs = {"input_ids": inputs} if isinstance(inputs, Tensor) else inputs
    ids, embeddings = inputs.get("input_ids"), some_of(inputs.get("inputs_embeds"))
    # Copies: who uses the tensors again for the next prompt must not change what was announced.
    return Announced(
        found,
        None if ids is None else ids.repeat_interleave(copies, 0),
        None if embeddings is None else embeddings.repeat_interleave(copies, 0),
        has_pictures(inputs),
    )


def some_of(embeddings: Tensor | None) -> Tensor | None:
    """Enough numbers of each token's embedding (B, T, C) to tell it from another's: (B, T, about 8)."""
    return None if embeddings is None else embeddings[..., :: max(1, embeddings.shape[-1] // 8)]


def watch(model: nn.Module) -> None:
    """Lets caches see what the model is about to read, by a hook that stays in the model and changes nothing.

    It finds its cache in the call, so that one does for all caches, at once and one after the other.
    """
    outermost = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), model)
    if look not in outermost._forward_pre_hooks.values():
        outermost.register_forward_pre_hook(look, with_kwargs=True)


def look(model: nn.Module, args: tuple, kwargs: dict) -> None:
    """A forward pre-hook: what can be refused is, before anything is computed."""
    if torch.compiler.is_compiling():
        return
    for cache in (*args, *kwargs.values()):  # transformers 5.24 has another name for what was past_key_values
        if isinstance(cache, RoutedCache):
            if kwargs.get("use_cache") is False:
                raise ValueError("with use_cache=False no cache is used: leave that out, or past_key_values")
            if kwargs.get("output_attentions"):
                refuse("attention weights to give: leave output_attentions out")
            cache.expect(args[0] if args else kwargs.get("input_ids"), kwargs.get("inputs_embeds"))


def check_owner(model: nn.Module | None, attention: nn.Module) -> None:
    """Refuses to serve an attention module of another model than the cache's own, which may be gone."""
    if model is None or all(attention is not module for module in model.modules()):
        raise ValueError("the cache was made for another model: make one for this")
