"""Where things lie: the sizes of the page pool, of the store and of the tables, and what they take in bytes.

The pool is one key and one value tensor of `n_pages * page_size` slots for all layers, lanes and sequences. Each lane
owns one run of pages in it: what a step always reads, then its tail page and those that follow it. Page 0, the *null
page*, belongs to no lane. The *store* holds the chunks of dynamic lanes, each lane's one after the other, and each
with a summary of its keys under the same number; it, too, has a null page. On the device the store is the first part
of the pool. On the host it is tensors of its own, and a dynamic lane's run begins with its *frames*: as many pages as
it retrieves chunks.

A cache that is too large for one pool has several, of equal size so that one compiled region serves all layers, and
each layer lies in one of them, which numbers its pages from its own null page on. There is one store: where it is on
the device, its pages are counted through all pools.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from hybridkv.config import HybridConfig

if TYPE_CHECKING:
    from hybridkv.planning.plan import Plan

SCALARS = 7  # int32 numbers of a lane: start, n_full, tail, fill, ring, end, row
ROW_SCALARS = 6  # and of a dynamic lane: first, n_chunks, n_retrieve, lane, last, fetched
SHARED = 2  # and where the store is on the host: own, n_shared
INDEX = 8  # bytes of a layer's number, and of a pool's
LARGEST = (1 << 31) - 1  # numbers of a pool's keys: with more, FlexAttention's kernels for GPUs count in 64 bits


def bucket(n: int, bits: int = 3) -> int:
    """Rounds up to one of `1 << bits` sizes an octave, so that prompts of similar length share one compiled step."""
    unit = max(1, 1 << max(0, n.bit_length() - 1 - bits))
    return -(-n // unit) * unit


FINE = 4  # bits of the sizes that a prompt's pages are rounded to


def round_down(n: int) -> int:
    """The largest number of pages up to n that is no rounded size but itself, see `prompt_room`."""
    unit = max(1, 1 << max(0, n.bit_length() - 1 - FINE))
    return n // unit * unit


@dataclass(frozen=True)
class Costs:
    """Bytes of the parts of a cache, for one model, dtype and configuration."""

    page: int  # one page of keys and values
    summary: int  # the summary of one chunk: its key sketch, or its key bounds
    basis: int  # what a dynamic lane needs beside: principal directions, offset and step of the sketch
    entry: int = 4  # one number in a table

    @classmethod
    def of(cls, config: HybridConfig, head_dim: int, dtype: torch.dtype) -> "Costs":
        page, rank = 2 * config.page_size * head_dim * dtype.itemsize, config.rank(head_dim)
        if config.retrieval == "bound":
            return cls(page, summary=2 * head_dim * dtype.itemsize, basis=0)
        return cls(page, summary=config.page_size * rank, basis=rank * head_dim * dtype.itemsize + 2 * rank * 4)


def spread(needs: list[int], pools: int) -> tuple[list[int], int]:
    """The pool of each layer, the neediest first into whichever holds least; and the most pages that one holds."""
    held, pool = [0] * pools, [0] * len(needs)
    for layer in sorted(range(len(needs)), key=lambda layer: -needs[layer]):
        pool[layer] = held.index(min(held))
        held[pool[layer]] += needs[layer]
    return pool, max(held)


def split(needs: list[int], pages: int, most: int) -> tuple[tuple[int, ...], int]:
    """Pools of equal size that hold as little as possible in all.

    Args:
        needs: pages of each layer. pages: of one pool for all, rounded up.
        most: pages that a pool may have; a layer that needs more gets them all the same.

    Returns:
        the pool of each layer, and the pages of each pool, its null page included.
    """
    best = (0,) * len(needs), pages
    if pages <= most:
        return best
    least = None
    for pools in range(2, len(needs) + 1):
        pool, held = spread(needs, pools)
        if held >= most and pools < len(needs):
            continue
        size = pages // pools  # what is spare is shared; what is missing comes on top, rounded as well
        size += bucket(held + 1 - size) if held >= size else 0
        size = min(size, max(most, held + 1))
        if least is None or pools * size < least:
            best, least = (tuple(pool), size), pools * size
    return best


@dataclass(frozen=True)
class Capacity:
    """Sizes of a cache's tensors; what `torch.compile` specialises on."""

    n_pages: int  # pages in each pool, null page included, and its part of the store if that is on the device
    n_store: int  # pages in the store, null page included
    host: bool  # whether the store is in host memory
    full: int  # most pages that a lane reads whole at every step; frames are among them
    chunks: int  # most chunks of a lane
    retrieve: int  # most chunks that any lane retrieves
    rows: int  # most lanes of any layer that may be dynamic
    retrieving: tuple[bool, ...]  # for each layer, whether its graph retrieves
    pool: tuple[int, ...]  # for each layer, the pool that it lies in
    needs: tuple[int, ...] = field(compare=False)  # for each layer, the pages that it takes there

    @classmethod
    def of(cls, plans: "list[Plan]", new_tokens: int | None) -> "Capacity":
        """What these prompts and `new_tokens` more for each need, rounded up; None: what the prompts themselves fill.

        Prompts are rounded one by one: what a plan was charged for rounding is what it takes in any batch.
        """
        host = plans[0].host
        filled = [[int(part.sum()) for part in plan.lane_pages(None)] for plan in plans]
        of_layers = [[part.sum(1) for part in plan.lane_pages(new_tokens)] for plan in plans]
        wanted = [[int(part.sum()) for part in parts] for parts in of_layers]
        store, rest = (
            sum(bucket(of_plan[part] + null, FINE) for of_plan in filled)
            + bucket(sum(all_of[part] - of_plan[part] for all_of, of_plan in zip(wanted, filled, strict=True)))
            for part, null in ((0, 1), (1, host))
        )
        full = max(int(plan.lane_full(new_tokens).max()) for plan in plans)
        chunks = max(int(plan.lane_columns(new_tokens).max()) for plan in plans)
        retrieve = max(int(plan.n_retrieve.max()) for plan in plans)
        room = torch.stack([plan.retrieving for plan in plans]).sum(0)  # (layers,) lanes that may be dynamic
        if room.any():  # the graph retrieves, even if no lane of these prompts does
            chunks, retrieve = max(chunks, 1), max(retrieve, 1)
        full, chunks, retrieve = bucket(full), bucket(chunks), bucket(retrieve)
        rows, retrieving = int(room.max()), tuple((room > 0).tolist())
        needs = sum(kept if host else stored + kept for stored, kept in of_layers).tolist()
        most = LARGEST // (plans[0].page_size * plans[0].head_dim)
        pool, pages = split(needs, rest if host else store + rest, most)
        chunks = max(chunks, retrieve)
        return cls(pages, store, host, full, chunks, retrieve, rows, retrieving, pool, tuple(needs))

    def covers(self, other: "Capacity") -> bool:
        """Whether a cache of this capacity can hold what needs `other`."""
        names = ("n_store", "full", "chunks", "retrieve", "rows")
        sizes = all(getattr(self, name) >= getattr(other, name) for name in names)
        layers = all(a or not b for a, b in zip(self.retrieving, other.retrieving, strict=True))
        held = [0] * self.pools
        for pool, pages in zip(self.pool, other.needs, strict=True):
            held[pool] += pages
        return sizes and layers and self.host == other.host and max(held) < self.n_pages

    @property
    def pools(self) -> int:
        return max(self.pool) + 1

    @property
    def shifted(self) -> bool:
        """Whether a page of the store has another number in the pool that it lies in."""
        return self.pools > 1 and not self.host

    def device_bytes(self, costs: Costs, lanes: int) -> int:
        """Bytes of a cache's tensors on the device, all tables included; lanes: over all sequences, of one layer."""
        layers, retrieving = len(self.retrieving), sum(self.retrieving)
        pages = self.pools * self.n_pages * (costs.page + self.host * costs.entry) + self.n_store * costs.summary
        rows = retrieving * self.rows * ((ROW_SCALARS + SHARED * self.host) * costs.entry + costs.basis)
        numbers = (2 * layers + retrieving + self.shifted * self.pools) * INDEX
        return pages + rows + layers * lanes * SCALARS * costs.entry + numbers

    def host_bytes(self, costs: Costs) -> int:
        """Bytes of its store in host memory."""
        return self.host * self.n_store * costs.page
