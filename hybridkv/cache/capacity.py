"""Where things lie: the sizes of the page pool and of the tables.

The pool is one key and one value tensor of `n_pages * page_size` slots for all layers, lanes and sequences. Page 0, the
*null page*, belongs to no lane: unused entries of tables point to it. Pages below `n_store` are the *store*: chunks of
dynamic lanes, each with a summary of its keys under the same number. The others hold what is read at every step.
"""

from dataclasses import astuple, dataclass

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
    retrieve: int  # most chunks that any lane retrieves; 0 leaves retrieval out of the graph
    rows: int  # dynamic lanes, and one for all others

    @classmethod
    def of(cls, plans: list[Plan], new_tokens: int) -> "Capacity":
        """What these prompts and `new_tokens` more for each need, rounded up to a bucket."""
        store, other, fixed, chunks = 1, 0, 0, 0
        for plan in plans:
            tails = tail_pages(plan.fill, plan.page_size, new_tokens)
            store += int((plan.n_chunks + plan.dynamic * tails).sum())
            other += int((plan.n_fixed + ~plan.dynamic * tails).sum())
            fixed = max(fixed, int((plan.n_fixed + tails).max()))
            chunks = max(chunks, int((plan.dynamic * (plan.n_chunks + tails)).max()))
        retrieve = max(int(plan.n_retrieve.max()) for plan in plans)
        store, other, chunks, retrieve = (bucket(n) for n in (store, other, chunks, retrieve))
        rows = bucket(1 + sum(int(plan.dynamic.sum()) for plan in plans))
        return cls(store + other, store, bucket(fixed), max(chunks, retrieve), retrieve, rows)

    def covers(self, other: "Capacity") -> bool:
        """Whether a cache of this capacity can hold what needs `other`."""
        regions = self.n_store >= other.n_store and self.n_pages - self.n_store >= other.n_pages - other.n_store
        return regions and all(a >= b for a, b in zip(astuple(self)[2:], astuple(other)[2:], strict=True))


def tail_pages(fill: Tensor | int, page_size: int, new_tokens: int) -> Tensor | int:
    """Tail pages that a lane takes in all: the one it starts with, and one for each that its new tokens close."""
    return (fill + new_tokens) // page_size + 1
