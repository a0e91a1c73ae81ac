"""Key bounds, Quest's summary of a chunk (arXiv 2406.10774): the smallest and largest value of each key dimension."""

import torch
from einops import rearrange
from torch import Tensor, nn

from hybridkv.cache.retrieve import chunk_mass
from hybridkv.config import HybridConfig


def bound_scores(q: Tensor, low: Tensor, high: Tensor, chunks: Tensor, n_chunks: Tensor, group: str = "mean") -> Tensor:
    """An upper bound on the score of any key in each chunk, turned into mass like `sketch_scores`.

    Args:
        q: (L, G, D) queries. low, high: (pages, D). chunks: (L, C) page numbers, the first n_chunks (L,) are valid.

    Returns:
        (L, C) float32; -1 where there is no chunk.
    """
    q = q.float()[:, :, None] * q.shape[-1] ** -0.5  # (L, G, 1, D)
    bound = torch.maximum(q * low[chunks][:, None], q * high[chunks][:, None]).sum(-1)  # (L, G, C)
    return chunk_mass(bound[..., None], n_chunks, group)


class KeyBounds(nn.Module):
    """Smallest and largest key values of each page of a store. Same interface as `KeySketch`."""

    def __init__(self, pages: int, rows: int, dim: int, config: HybridConfig, like: Tensor):
        super().__init__()
        self.page_size, self.group = config.page_size, config.group
        for name in ("low", "high"):
            self.register_buffer(name, like.new_zeros(pages, dim), persistent=False)

    def pack(self, k: Tensor, pages: list[Tensor], row: Tensor, full: int, *sketch: object) -> None:
        tail = full * self.page_size
        for lane, numbers in enumerate(pages):
            chunks = rearrange(k[lane, :tail], "(n s) d -> n s d", s=self.page_size)
            self.low[numbers[:full]], self.high[numbers[:full]] = chunks.amin(1), chunks.amax(1)
            if k.shape[1] > tail:
                self.low[numbers[full]], self.high[numbers[full]] = k[lane, tail:].amin(0), k[lane, tail:].amax(0)

    def share(self, row: Tensor, other: Tensor) -> None:
        """Nothing belongs to a row."""

    def append(self, k: Tensor, page: Tensor, fill: Tensor) -> None:
        first = (fill == 0)[:, None]  # the page's last owner left its bounds behind
        self.low.index_copy_(0, page, torch.where(first, k, torch.minimum(self.low[page], k)))
        self.high.index_copy_(0, page, torch.where(first, k, torch.maximum(self.high[page], k)))

    def scores(self, q: Tensor, chunks: Tensor, n_chunks: Tensor, row: Tensor) -> Tensor:
        return bound_scores(q, self.low, self.high, chunks, n_chunks, self.group)
