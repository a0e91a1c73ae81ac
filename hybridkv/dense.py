"""The honest reference for speed: a full cache in plain tensors, read by SDPA, compiled like the rest.

Same interface as `HybridCache`, no pages, no tables. The group's query heads are query rows, which is the fastest way
to do grouped-query decoding with SDPA.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from hybridkv.pages import bucket
from hybridkv.profile import Prefill


class DenseCache(nn.Module):
    """A full cache of `batch` sequences with room for `slots` tokens each (rounded up to a bucket)."""

    def __init__(self, slots: int, batch: int, like: Prefill):
        super().__init__()
        heads, _, dim = like.layers[0].k.shape
        self.layers, self.heads, self.slots = len(like.layers), heads, bucket(slots)
        for i in range(self.layers):
            for name in ("keys", "values"):
                pool = like.layers[0].k.new_zeros(1, 1, batch * heads * self.slots, dim)
                self.register_buffer(f"{name}{i}", pool, persistent=False)
        length = torch.zeros(batch, dtype=torch.int64, device=pool.device)
        self.register_buffer("length", length, persistent=False)

    def __getitem__(self, layer: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return partial(self.attend, getattr(self, f"keys{layer}"), getattr(self, f"values{layer}"))

    def attend(self, keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Appends one token's k, v (B, H, 1, D) to a layer's pool and attends: q (B, Hq, 1, D) -> (B, Hq, 1, D).

        In the pool (1, 1, L * S, D), lane l owns slots l * S to (l + 1) * S.
        """
        lane = torch.arange(k.shape[0] * self.heads, device=k.device)
        slots = lane * self.slots + self.length.repeat_interleave(self.heads)
        keys.index_copy_(2, slots, rearrange(k, "b h 1 d -> 1 1 (b h) d"))
        values.index_copy_(2, slots, rearrange(v, "b h 1 d -> 1 1 (b h) d"))
        keys, values = (rearrange(t, "1 1 (b h s) d -> b h s d", h=self.heads, s=self.slots) for t in (keys, values))
        mask = torch.arange(self.slots, device=k.device) <= self.length[:, None]  # (B, S)
        q = rearrange(q, "b (h g) 1 d -> b h g d", h=self.heads)
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask[:, None, None])
        return rearrange(out, "b h g d -> b (h g) 1 d")

    def advance(self, active: Tensor) -> None:
        """Counts the token that every active sequence, (B,) bool, just appended."""
        self.length.add_(active)

    @torch.no_grad()
    def load(self, prefills: list[Prefill], new_tokens: int) -> None:
        """Copies prompts in, in place of whatever the cache held. Each prefill's keys and values are freed."""
        for b, prefill in enumerate(prefills):
            tokens = len(prefill.prunable)
            if tokens + new_tokens > self.slots:
                raise ValueError(f"{tokens} prompt and {new_tokens} new tokens do not fit into {self.slots} slots")
            for i, profile in enumerate(prefill.layers):
                for name, value in (("keys", profile.k), ("values", profile.v)):
                    pool = getattr(self, f"{name}{i}").view(-1, self.heads, self.slots, value.shape[-1])
                    pool[b, :, :tokens] = value
                prefill.layers[i] = None
            self.length[b] = tokens
