"""A page pool: keys and values of the layers that lie in it. Most caches have one for all: see `capacity.py`."""

import torch
from torch import Tensor, nn

from hybridkv.cache.capacity import Capacity


class Pool(nn.Module):
    """Tensors of a `Capacity`'s size.

    Buffers:
        keys, values: (1, 1, slots, D).
        held: (pages,) int32, the chunk that each frame holds, -1 for none; with the store on the host.
        before: () int64, pages of the store that lie in the pools before this one; where there are several and the
            store is on the device.
    """

    def __init__(self, capacity: Capacity, page_size: int, like: Tensor):
        super().__init__()
        slots, self.shifted = capacity.n_pages * page_size, capacity.shifted
        for name in ("keys", "values"):
            self.register_buffer(name, like.new_zeros(1, 1, slots, like.shape[-1]), persistent=False)
        if capacity.host:
            held = torch.full((capacity.n_pages,), -1, dtype=torch.int32, device=like.device)
            self.register_buffer("held", held, persistent=False)
        if self.shifted:
            self.register_buffer("before", torch.zeros((), dtype=torch.int64, device=like.device), persistent=False)

    def write(self, k: Tensor, v: Tensor, slots: Tensor) -> None:
        """Puts keys and values (N, D) into slots (N,) int64."""
        self.keys.index_copy_(2, slots, k[None, None])
        self.values.index_copy_(2, slots, v[None, None])

    def read(self, stored: Tensor, fill: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
        """Keys and values (N, D) of slots fill (N,) of pages (N,), see `pages_of`; of the null page's, anything."""
        slots = self.pages_of(stored).clamp(min=0) * page_size + fill
        return self.keys[0, 0].index_select(0, slots), self.values[0, 0].index_select(0, slots)

    def pages_of(self, stored: Tensor) -> Tensor:
        """Pages of the pool, where the store is on the device: stored, pages of the store, of any shape."""
        return stored - self.before if self.shifted else stored
