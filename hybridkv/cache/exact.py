"""The oracle that retrieval is compared with: chunks scored with the keys themselves.

It is charged what a sketch would cost, since it is not meant to be used but to say what a sketch loses.
"""

import torch
from einops import einsum, rearrange
from torch import Tensor, nn

from hybridkv.cache.retrieve import chunk_mass
from hybridkv.config import HybridConfig


class ExactKeys(nn.Module):
    """A copy of a store's keys. Same interface as `KeySketch`."""

    def __init__(self, pages: int, rows: int, dim: int, config: HybridConfig, like: Tensor):
        super().__init__()
        self.page_size, self.group = config.page_size, config.group
        self.register_buffer("keys", like.new_zeros(pages * self.page_size, dim), persistent=False)

    def pack(self, k: Tensor, pages: list[Tensor], row: Tensor, full: int, *sketch: object) -> None:
        slot = torch.arange(self.page_size, device=k.device)
        for lane, numbers in enumerate(pages):
            slots = (numbers[:, None] * self.page_size + slot).flatten()
            self.keys[slots[: k.shape[1]]] = k[lane]

    def share(self, row: Tensor, other: Tensor) -> None:
        """Nothing belongs to a row."""

    def append(self, k: Tensor, page: Tensor, fill: Tensor) -> None:
        self.keys.index_copy_(0, page * self.page_size + fill, k)

    def scores(self, q: Tensor, chunks: Tensor, n_chunks: Tensor, row: Tensor) -> Tensor:
        keys = rearrange(self.keys, "(n s) d -> n s d", s=self.page_size)[chunks]  # (L, C, page_size, D)
        token = einsum(q.float(), keys.float(), "l g d, l c s d -> l g c s") * q.shape[-1] ** -0.5
        return chunk_mass(token, n_chunks, self.group)
