"""The honest reference for speed: a full cache in plain tensors, read by SDPA, compiled like the rest.

Same interface as `HybridCache`, no pages, no tables. Each device gets what is fastest there: on CPUs the group's query
heads are query rows; on GPUs they stay heads, which takes a nineteenth of the time on an H100 at 32,768 tokens
(`docs/speed.md`).
"""

import weakref

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from hybridkv.cache.capacity import bucket
from hybridkv.cache.pack import Kept
from hybridkv.planning.plan import Plan
from hybridkv.planning.prefill import Prefill


def dense_slots(tokens: int) -> int:
    """Slots for so many tokens: at most a sixty-fourth more, or 15, since a step reads all slots.

    Prompts of nearly the same length share a compiled step all the same. Kernels want masks of aligned rows.
    """
    return -(-bucket(tokens, 6) // 16) * 16


def attend_rows(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """The group's query heads as query rows. q (B, Hq, 1, D); keys, values (B, H, S, D); mask (B, 1, 1, S)."""
    rows = rearrange(q, "b (h g) 1 d -> b h g d", h=keys.shape[1])
    out = F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask)
    return rearrange(out, "b h g d -> b (h g) 1 d")


def attend_heads(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """The query heads as they are, `enable_gqa`, as most code does. Same arguments as `attend_rows`."""
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=q.shape[1] != keys.shape[1])


class DenseLayer(nn.Module):
    """One layer of the cache: keys and values (1, 1, L * S, D), where lane l owns slots l * S to (l + 1) * S."""

    def __init__(self, cache: "DenseCache", slots: int, like: Tensor):
        super().__init__()
        self.cache = weakref.ref(cache)  # which owns this layer: a cycle would keep a dropped cache's memory
        for name in ("keys", "values"):
            self.register_buffer(name, like.new_zeros(1, 1, slots, like.shape[-1]), persistent=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Appends one token's k, v (B, H, 1, D) and attends: q (B, Hq, 1, D) -> (B, Hq, 1, D)."""
        return (attend_rows if q.is_cpu else attend_heads)(q, *self.append(k, v))

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Writes one token's k, v (B, H, 1, D). Returns keys and values (B, H, S, D) and their mask (B, 1, 1, S)."""
        cache = self.cache()
        heads, size, length = cache.heads, cache.slots, cache.length
        lane = torch.arange(k.shape[0] * heads, device=k.device)
        slots = lane * size + length.repeat_interleave(heads)
        self.keys.index_copy_(2, slots, rearrange(k, "b h 1 d -> 1 1 (b h) d"))
        self.values.index_copy_(2, slots, rearrange(v, "b h 1 d -> 1 1 (b h) d"))
        keys, values = (rearrange(t, "1 1 (b h s) d -> b h s d", h=heads, s=size) for t in (self.keys, self.values))
        mask = torch.arange(size, device=k.device) <= length[:, None]  # (B, S)
        return keys, values, mask[:, None, None]


class DenseCache(nn.Module):
    """A full cache of `batch` sequences with room for `slots` tokens each, rounded up: see `dense_slots`."""

    def __init__(self, slots: int, batch: int, like: Prefill):
        super().__init__()
        layers, self.heads = like.shape
        self.batch, self.slots = batch, dense_slots(slots)
        lanes = batch * self.heads
        self.layers = nn.ModuleList(DenseLayer(self, lanes * self.slots, like.like) for _ in range(layers))
        length = torch.zeros(batch, dtype=torch.int64, device=like.like.device)
        self.register_buffer("length", length, persistent=False)

    def __getitem__(self, layer: int) -> DenseLayer:
        return self.layers[layer]

    def advance(self, active: Tensor) -> None:
        """Counts the token that every active sequence, (B,) bool, just appended."""
        self.length.add_(active)

    @torch.no_grad()
    def reserve(self, plans: list[Plan], new_tokens: int) -> None:
        """Makes room for prompts, one for each sequence; `pack` then fills in their keys and values."""
        longest = max(plan.tokens for plan in plans)
        if len(plans) != self.batch or longest + new_tokens > self.slots:
            raise ValueError(
                f"{len(plans)} prompts of up to {longest} tokens and {new_tokens} new ones do not fit into "
                f"{self.batch} x {self.slots} slots"
            )
        self.length.copy_(torch.tensor([plan.tokens for plan in plans]))

    @torch.no_grad()
    def pack(self, b: int, layer: int, kept: Kept) -> None:
        """Copies one layer of prompt `b` in, of which everything is kept."""
        for pool, value in ((self.layers[layer].keys, kept.k), (self.layers[layer].values, kept.v)):
            lanes = rearrange(value, "(h t) d -> h t d", h=self.heads)
            pool.view(-1, self.heads, self.slots, value.shape[-1])[b, :, : lanes.shape[1]] = lanes
