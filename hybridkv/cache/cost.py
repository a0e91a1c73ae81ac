"""What a loaded cache costs, in bytes."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from einops import rearrange

from hybridkv.cache.capacity import Capacity
from hybridkv.planning.plan import Plan, full_bytes

if TYPE_CHECKING:
    from hybridkv.cache.hybrid import HybridCache


@dataclass(frozen=True)
class CacheBytes:
    """What a loaded cache costs, in bytes, for the prompts of all its sequences unless noted.

    Attributes:
        full: a plain full cache of the prompts.
        resident: held on the device by a cache that is made for these prompts: every tensor, spare pages included, room
            for new tokens apart. With the store on the host it is what the budget bounds.
        host: held in host memory: the store, room for new tokens included.
        step: read by one decoding step; with the store on the device it is what the budget bounds.
        new: pages and summaries taken for generated tokens, on top of `resident`.
        allocated: all tensors on the device, room for new tokens included. A cache that is kept from a larger prompt
            holds more than one that is made for these.
    """

    full: int
    resident: int
    host: int
    step: int
    new: int
    allocated: int

    @property
    def budget(self) -> int:
        """What the budget bounds."""
        return self.resident if self.host else self.step


def count_bytes(cache: "HybridCache", plans: list[Plan]) -> CacheBytes:
    """See `HybridCache.count_bytes`; plans: of the prompts that are loaded."""
    costs = cache.costs
    lanes = cache.row.shape[1]
    begun, dynamic, n_fixed, fill = (
        rearrange(torch.stack([getattr(p, name) for p in plans], 1), "l b h -> l (b h)")
        for name in ("n_chunks", "dynamic", "n_fixed", "fill")
    )
    # Tail pages that started empty hold generated tokens only.
    chunks = begun.clone()
    for n, layer in enumerate(cache.retrieving.tolist()):
        lane = cache.lane[n][cache.lane[n] < lanes].long().cpu()
        chunks[layer, lane] = cache.n_chunks[n, : len(lane)].cpu().long()
    summed = int((dynamic * (chunks - begun + (fill == 0))).sum())
    pages = int((dynamic & (fill == 0)).sum()) if cache.capacity.host else summed
    pages += int((~dynamic * (cache.n_full.cpu() - n_fixed + (fill == 0))).sum())
    elsewhere = ("store.keys", "store.values", "recording.chosen")
    return CacheBytes(
        full=sum(full_bytes(plan.tokens, plan.n_read.numel(), costs, cache.page_size) for plan in plans),
        resident=Capacity.of(plans, None).device_bytes(costs, lanes),
        host=cache.capacity.host_bytes(costs),
        step=sum(plan.step_bytes(costs) for plan in plans),
        new=pages * (costs.page + cache.capacity.host * costs.entry) + summed * costs.summary,
        allocated=sum(t.nbytes for name, t in cache.named_buffers() if name not in elsewhere),
    )
