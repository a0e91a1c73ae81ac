"""Chunk-wise retrieval: which chunks of a dynamic head the current query needs.

Scoring every chunk with its exact keys would read half the cache, so each chunk has a small summary: a `KeySketch`
(`sketch.py`, ours) or `KeyBounds` (`bounds.py`, Quest's); `ExactKeys` (`exact.py`) is the oracle to compare them with.
All score in the graph of the decoding step, and have the same methods: `pack`, `share`, `append` and `scores`. Lanes
without a summary have row 0, and what they would append goes to the null page.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch._higher_order_ops.while_loop import while_loop

TURN_CHUNKS = 2048  # one turn of the loop over dynamic lanes scores about so many chunks, see `in_turns`


class Summary(Protocol):
    """Summaries of the chunks in a store; `KeySketch` documents the methods."""

    def pack(self, k: Tensor, pages: list[Tensor], row: Tensor, full: int, fitted: int | None = None) -> None: ...

    def share(self, row: Tensor, other: Tensor) -> None: ...

    def append(self, k: Tensor, page: Tensor, fill: Tensor) -> None: ...

    def scores(self, q: Tensor, chunks: Tensor, n_chunks: Tensor, row: Tensor) -> Tensor: ...


def chunk_mass(score: Tensor, n_chunks: Tensor, group: str = "mean") -> Tensor:
    """Softmax over all tokens of each lane's valid chunks, summed over each chunk, mean or max over the group.

    Args:
        score: (L, G, C, page_size), or one bound for all tokens of a chunk: (L, G, C, 1).

    Returns:
        (L, C) float32; -1 where there is no chunk.
    """
    valid = torch.arange(score.shape[2], device=score.device) < n_chunks[:, None]  # (L, C)
    score = score.masked_fill(~valid[:, None, :, None], -1e30)
    weight = summed_at_once(score) if score.is_cpu else summed_by_chunk(score)  # (L, G, C)
    mass = weight / weight.sum(-1, keepdim=True)
    mass = mass.mean(1) if group == "mean" else mass.amax(1)
    return mass.masked_fill(~valid, -1.0)


def summed_at_once(score: Tensor) -> Tensor:
    """Exponentiated scores (L, G, C, S) summed over each chunk, to a scale of each query's own: (L, G, C)."""
    return (score - score.amax((2, 3), keepdim=True)).exp().sum(-1)


def summed_by_chunk(score: Tensor) -> Tensor:
    """The same for GPUs: one kernel that reads the scores once, not two."""
    most = score.amax(-1)
    return (score - most[..., None]).exp().sum(-1) * (most - most.amax(-1, keepdim=True)).exp()


def page_of(first: Tensor, chunk: Tensor) -> Tensor:
    """Pages of each lane's chunks (R, C), which lie one after the other from first (R,) on.

    A lane that shares its first chunks has two runs: first (R, 3) then says where the shared ones begin, where its own
    would if it had all of them, and how many it shares.
    """
    if first.dim() == 1:
        return first[:, None] + chunk
    shared, own, n_shared = first.split(1, 1)  # each (R, 1)
    return torch.where(chunk < n_shared, shared, own) + chunk


def chunk_pages(first: Tensor, n_chunks: Tensor, columns: int) -> Tensor:
    """Pages of each lane's n_chunks (R,) chunks, see `page_of`: (R, columns), 0 where there is none."""
    chunk = torch.arange(columns, device=first.device)
    return torch.where(chunk < n_chunks[:, None], page_of(first, chunk), 0)


def best_chunks(
    summary: Summary,
    q: Tensor,
    first: Tensor,
    n_chunks: Tensor,
    row: Tensor,
    k: Tensor,
    count: int,
    columns: int,
    favour: Tensor | None = None,
) -> Tensor:
    """Numbers of each row's `k` best chunks, (R, count) int64, of which the first k are meant; of rows without, any.

    A compiled step on a CPU loops over the rows that have chunks, and an uncompiled one picks them: the others would
    cost as much. Compiled for a GPU, all rows are scored, and those without chunks read the null page over and over:
    to leave them out, the step would have to wait for the host.

    Args:
        q: (R, G, D). first: (R,) or (R, 3), where each row's n_chunks (R,) chunks lie in the store, see `page_of`.
        row: (R,) as in the summary.
        k: (R,) how many are wanted, at most n_chunks and `count`.
        columns: chunks that a row may have.
        favour: (R, columns) what a chunk's mass is multiplied by, see `HostStore.favour`; None for nothing.
    """
    lanes = (q, first, n_chunks, row, k, *(() if favour is None else (favour,)))

    def choose(q: Tensor, first: Tensor, n_chunks: Tensor, row: Tensor, k: Tensor, *favour: Tensor) -> Tensor:
        mass = summary.scores(q, chunk_pages(first, n_chunks, columns), n_chunks, row)
        return select(mass * favour[0] if favour else mass, k, count)

    if not torch.compiler.is_compiling():
        some = n_chunks.nonzero()[:, 0]
        best = choose(*(t[some] for t in lanes))
        return best.new_zeros(len(q), count).index_copy(0, some, best)
    if not q.is_cpu:
        return choose(*lanes)
    return in_turns(choose, lanes, n_chunks, count, columns)


def in_turns(choose: Callable[..., Tensor], lanes: tuple[Tensor, ...], n_chunks: Tensor, count: int, columns: int):
    """`best_chunks` in a loop, for the compiler: each turn takes one row, or a few where there are many short ones.

    A turn takes the same calls whatever its row holds, so short rows share one. The last turn is filled up with a
    row that is already in it: an eighth of all rows at most share one, so that little is scored twice.
    """
    through = (n_chunks > 0).cumsum(0)  # (R,) rows with chunks up to each
    rows = max(1, min(len(n_chunks) // 8, TURN_CHUNKS // columns))

    def more(i: Tensor, best: Tensor) -> Tensor:
        return i < through[-1]

    def turn(i: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
        number = (i + 1 + torch.arange(rows)).clamp(max=through[-1])  # 1 is the first row with chunks
        some = torch.searchsorted(through, number)
        return i + rows, best.index_copy(0, some, choose(*(t.index_select(0, some) for t in lanes)))

    start = torch.zeros((), dtype=torch.int64), torch.zeros(len(n_chunks), count, dtype=torch.int64)
    return while_loop(more, turn, start)[1]


def select(mass: Tensor, k: Tensor, count: int) -> Tensor:
    """Numbers of each row's k (R,) best chunks, in any order: mass (R, C) -> (R, count) int64, the first k.

    On a CPU the best `count` are sorted, so that the first k of them are the best k, too.
    """
    return mass.topk(count, dim=1).indices if mass.is_cpu else by_threshold(mass, k, count)


def by_threshold(mass: Tensor, k: Tensor, count: int) -> Tensor:
    """Columns of each row's k largest masses, found without a sort, which takes a GPU several times as long.

    A binary search for the k-th largest, among the upper 16 bits of the floats: of numbers that are not negative these
    are in the numbers' order, and tell apart what differs by 1 in 128. Ties go to the first columns.

    Args:
        mass: (R, C); negative where there is no chunk, NaN counts as 0. k: (R,), at most the number of chunks.
        count: columns of the result, at least the largest k.

    Returns:
        (R, count) int64, in the order of the columns; 0 behind the first k.
    """
    bits = torch.where(mass > 0, mass.float().view(torch.int32) >> 16, torch.where(mass < 0, -1, 0))  # (R, C)
    k = k[:, None]
    least = torch.zeros_like(k, dtype=torch.int32)  # (R, 1), the largest number that k columns reach
    for bit in reversed(range(15)):
        higher = least | (1 << bit)
        least = torch.where((bits >= higher).sum(1, keepdim=True) >= k, higher, least)
    above, tied = bits > least, bits == least
    taken = above | (tied & (tied.cumsum(1) <= k - above.sum(1, keepdim=True)))
    # The n-th that is taken is where the count reaches n. (Scattering column numbers is a call of its own on GPUs.)
    nth = torch.arange(1, count + 1, device=mass.device).expand(len(mass), -1)
    return torch.where(nth <= k, torch.searchsorted(taken.cumsum(1), nth.contiguous()), 0)
