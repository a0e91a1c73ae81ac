"""Where a Hugging Face model meets a cache of ours: the attention and mask functions, and the layers of the cache.

Every decoder of transformers calls `past_key_values.update(k, v, layer_idx)` and hands what comes back to the attention
function that its configuration names. Our layers give back `Routed` keys, which know the layer that they belong to, so
nothing global says which cache a call is for. All other attention (vision towers, sliding layers, other caches) goes
to transformers' own SDPA function.
"""

import weakref
from typing import NoReturn

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicSlidingWindowLayer, StaticSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "hybridkv"
SET_IT = f"call model.set_attn_implementation({NAME!r})"
UNKNOWN = {  # what some models hand to attention, and neither the pages nor SDPA know
    "softcap": "soft-capped attention logits (as in Gemma 2)",
    "s_aux": "attention sinks that are learned (as in gpt-oss)",
}


class Routed:
    """Keys (B, H, T, D) on their way from a cache's layer to the attention function, which alone may look at them."""

    def __init__(self, layer: "RoutedLayer", keys: Tensor):
        self.layer, self.keys = layer, keys

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # what copying and printing ask for
            raise AttributeError(name)
        raise TypeError(
            f"something asked for the keys' {name}, which only attention of the kind {NAME!r} may see: {SET_IT} before "
            "generating. If that was done, this model's own code touches the keys, and hybridkv can't serve it"
        )

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None) -> NoReturn:
        raise TypeError(
            f"{getattr(function, '__name__', function)} got the keys of a hybridkv cache, which only attention of the "
            f"kind {NAME!r} may see: {SET_IT} before generating. If that was done, hybridkv can't serve this model"
        )


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | Routed,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' attention function: query (B, Hq, T, D); key, value (B, H, T, D) -> (B, T, Hq, D)."""
    for name, what in UNKNOWN.items():
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"hybridkv has no {what}")
    if not isinstance(key, Routed):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    for name in ("position_bias", "sliding_window"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"hybridkv has no {name} in layers with full attention")
    if module.training or query.requires_grad:
        raise RuntimeError("a hybridkv cache is for generating: call model.eval(), and it under torch.no_grad()")
    return key.layer.attend(module, query, key.keys, value, attention_mask, scaling), None


def mask(batch_size: int, q_length: int, kv_length: int, *args, device=None, **kwargs) -> Tensor | None:
    """transformers' mask function: (B, 1, T, S) bool, or None where causal attention needs no mask."""
    if q_length == 1 and kv_length == 1:  # a decoding step of our layers, whose pages know their tokens
        return torch.ones(batch_size, 1, 1, 1, dtype=torch.bool, device=device)
    return sdpa_mask(batch_size, q_length, kv_length, *args, device=device, **kwargs)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)  # without one, transformers would use no mask at all


def scaled(q: Tensor, scaling: float | None) -> Tensor:
    """Queries for attention that scales by head_dim ** -0.5, where the model scales by another factor."""
    usual = q.shape[-1] ** -0.5
    return q if scaling is None or scaling == usual else q * (scaling / usual)


def refuse(what: str) -> NoReturn:
    raise NotImplementedError(f"a hybridkv cache has no {what}")


class RoutedLayer(CacheLayerMixin):
    """A decoder layer's place in a `RoutedCache`."""

    is_compileable = True
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, cache: "RoutedCache", index: int):
        super().__init__()
        self.cache, self.index = weakref.ref(cache), index  # which owns this layer: a cycle would keep its memory

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Routed, Tensor]:
        if key_states.shape != value_states.shape:
            raise NotImplementedError(
                f"hybridkv wants keys and values of one shape, got {tuple(key_states.shape)} and "
                f"{tuple(value_states.shape)}"
            )
        if key_states.dtype != value_states.dtype:
            raise NotImplementedError(
                f"keys are {key_states.dtype}, values {value_states.dtype} (as autocast makes them), and hybridkv has "
                "one pool for both: load the model in the type to compute in"
            )
        return Routed(self, key_states), value_states

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, scaling: float | None
    ) -> Tensor:
        return self.cache().attend(self.index, module, q, k, v, attention_mask, scaling)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache().mask_sizes(query_length, self.index)

    def get_seq_length(self) -> int | Tensor:
        return self.cache().length()

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.15

    def reset(self) -> None:
        """The cache itself is reset, not its layers one by one."""


class RoutedCache(Cache):
    """A cache whose layers with full attention are ours; sliding layers are transformers' own.

    Subclasses say what attention is (`attend`), how many tokens were read (`length`), and how large masks are
    (`mask_sizes`).

    Args:
        config: the model's.
        static: sliding layers in tensors of one size, which can be compiled.
        room: tokens that there may be in all.
    """

    def __init__(self, config, static: bool, room: int):
        self.kinds, self.window, self.static = *layer_kinds(config), static
        super().__init__(layers=self.new_layers(room))

    @property
    def n_layers(self) -> int:
        """Layers that are ours."""
        return self.kinds.count("full_attention")

    def new_layers(self, room: int) -> list[CacheLayerMixin]:
        layers, ours = [], 0
        for kind in self.kinds:
            if kind == "full_attention":
                layers.append(RoutedLayer(self, ours))
                ours += 1
            elif self.static:
                layers.append(StaticSlidingWindowLayer(max_cache_len=room, sliding_window=self.window))
            else:
                layers.append(DynamicSlidingWindowLayer(sliding_window=self.window))
        return layers

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
        """One layer's attention: q (B, Hq, T, D); k, v (B, H, T, D), the new tokens' -> (B, T, Hq, D)."""
        raise NotImplementedError

    def length(self) -> int | Tensor:
        raise NotImplementedError

    def mask_sizes(self, query_length: int, index: int) -> tuple[int, int]:
        raise NotImplementedError

    def expect(self, ids: Tensor | None, embeddings: Tensor | None) -> None:
        """Called with what the model is about to read, ids (B, T) or embeddings (B, T, C)."""

    def reorder_cache(self, beam_idx: Tensor) -> NoReturn:
        refuse("beam search")

    def crop(self, tokens_to_remove: int) -> NoReturn:
        refuse("assisted decoding: nothing that was read can be taken back")

    def batch_repeat_interleave(self, repeats: int) -> NoReturn:
        refuse("way to repeat its sequences: give it num_return_sequences")

    def batch_select_indices(self, indices: Tensor) -> NoReturn:
        refuse("way to choose among its sequences")

    def activate_past_recording(self) -> NoReturn:
        refuse("assisted decoding, nor prompt lookup")

    def __deepcopy__(self, memo: dict) -> NoReturn:
        raise TypeError("a hybridkv cache can't be copied: make another one")

    def __reduce__(self) -> NoReturn:
        raise TypeError("a hybridkv cache can't be copied or pickled: make another one")


def layer_kinds(config) -> tuple[list[str], int | None]:
    """What each decoder layer attends to, and how far sliding layers do.

    Raises:
        NotImplementedError: a kind of layer that is neither full nor sliding attention, or none is full.
    """
    text = config.get_text_config(decoder=True)
    window, kinds = getattr(text, "sliding_window", None), getattr(text, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention" if window else "full_attention"] * text.num_hidden_layers
    other = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if getattr(text, "attention_chunk_size", None):
        other = other or ["chunked_attention"]
    if getattr(text, "num_kv_shared_layers", None):
        other = other or ["shared"]
    if other:
        raise NotImplementedError(f"hybridkv has no layers of the kind {other[0]}")
    if "full_attention" not in kinds:
        raise NotImplementedError(
            f"all layers of this model are sliding ones, {window} tokens wide: there is nothing for hybridkv to prune"
        )
    return list(kinds), window


def check_model(model: PreTrainedModel) -> None:
    """Refuses what can be seen to be impossible before anything is computed."""
    if not hasattr(getattr(model, "config", None), "get_text_config"):
        raise ValueError(f"model must be a model of transformers, not {type(model).__name__}")
    text = model.config.get_text_config(decoder=True)
    if getattr(model.config, "is_encoder_decoder", False):
        raise NotImplementedError("hybridkv is for decoders: this model has an encoder that its decoder attends to")
    if getattr(text, "attn_logit_softcapping", None) is not None:
        raise NotImplementedError("hybridkv has no soft-capped attention logits (as in Gemma 2)")
    if text._attn_implementation != NAME:
        raise RuntimeError(f"the model's attention is {text._attn_implementation!r}: {SET_IT} first")
    if model.training:
        raise RuntimeError("a hybridkv cache is for generating: call model.eval() first")
    devices = {str(parameter.device) for parameter in model.parameters()}
    if len(devices) > 1 or devices == {"meta"}:  # where weights are that were offloaded
        raise NotImplementedError(
            f"the model's weights are on {', '.join(sorted(devices))}, and hybridkv has one pool on one device: load "
            "it with device_map={'': DEVICE}"
        )
