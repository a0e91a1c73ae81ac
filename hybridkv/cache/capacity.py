"""Where things lie: the sizes of the page pool and of the tables.

The pool is one key and one value tensor of `n_pages * page_size` slots for all layers, lanes and sequences. Page 0, the
*null page*, belongs to no lane: unused entries of tables point to it. Pages below `n_store` are the *store*: chunks of
dynamic lanes, each with a summary of its keys under the same number. The others hold what is read at every step.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hybridkv.planning.plan import Plan


def bucket(n: int) -> int:
    """Rounds up to one of eight sizes an octave, so that prompts of similar length share one compiled step."""
    unit = max(1, 1 << max(0, n.bit_length() - 4))
    return -(-n // unit) * unit


@dataclass(frozen=True)
class Capacity:
    """Sizes of a cache's tensors; what `torch.compile` specialises on."""

    n_pages: int  # pages in the pool, null page and store included
    n_store: int  # pages in the store, null page included
    fixed: int  # columns of the table of fixed pages
    chunks: int  # columns of the table of chunks
    retrieve: int  # most chunks that any lane retrieves
    rows: int  # most lanes of any layer that may be dynamic
    retrieving: tuple[bool, ...]  # for each layer, whether its graph retrieves

    @classmethod
    def of(cls, plans: list[Plan], new_tokens: int) -> "Capacity":
        """What these prompts and `new_tokens` more for each need, rounded up to a bucket."""
        store, other, fixed, chunks = 1, 0, 0, 0
        room = torch.stack([plan.retrieving for plan in plans]).sum(0)  # (layers,) lanes that may be dynamic
        for plan in plans:
            tails = tail_pages(plan.fill, plan.page_size, new_tokens)
            store += int((plan.n_chunks + plan.dynamic * tails).sum())
            other += int((plan.n_fixed + ~plan.dynamic * tails).sum())
            fixed = max(fixed, int((plan.n_fixed + tails).max()))
            chunks = max(chunks, int((plan.dynamic * (plan.n_chunks + tails)).max()))
        retrieve = max(int(plan.n_retrieve.max()) for plan in plans)
        if room.any():  # the graph retrieves, even if no lane of these prompts does
            chunks, retrieve = max(chunks, 1), max(retrieve, 1)
        store, other, chunks, retrieve = (bucket(n) for n in (store, other, chunks, retrieve))
        rows, retrieving = int(room.max()), tuple((room > 0).tolist())
        return cls(store + other, store, bucket(fixed), max(chunks, retrieve), retrieve, rows, retrieving)

    def covers(self, other: "Capacity") -> bool:
        """Whether a cache of this capacity can hold what needs `other`."""
        regions = self.n_store >= other.n_store and self.n_pages - self.n_store >= other.n_pages - other.n_store
        tables = all(getattr(self, name) >= getattr(other, name) for name in ("fixed", "chunks", "retrieve", "rows"))
        return regions and tables and all(a or not b for a, b in zip(self.retrieving, other.retrieving, strict=True))


def tail_pages(fill: Tensor | int, page_size: int, new_tokens: int) -> Tensor | int:
    """Tail pages that a lane takes in all: the one it starts with, and one for each that its new tokens close."""
    return (fill + new_tokens) // page_size + 1
