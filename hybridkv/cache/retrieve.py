"""Chunk-wise retrieval: which chunks of a dynamic head the current query needs.

Scoring every chunk with its exact keys would read half the cache, so each chunk has a small summary: a `KeySketch`
(`sketch.py`, ours) or `KeyBounds` (`bounds.py`, Quest's); `ExactKeys` (`exact.py`) is the oracle to compare them with.
All score in the graph of the decoding step, and have the same three methods: `pack`, `append` and `scores`. Lanes
without a summary have row 0, and what they would append goes to the null page.
"""

from typing import Protocol

import torch
from torch import Tensor
from torch._higher_order_ops.while_loop import while_loop

TURN_CHUNKS = 2048  # one turn of the loop over dynamic lanes scores about so many chunks, see `in_turns`


class Summary(Protocol):
    """Summaries of the chunks in a store; `KeySketch` documents the methods."""

    def pack(self, k: Tensor, pages: list[Tensor], row: Tensor, full: int) -> None: ...

    def append(self, k: Tensor, page: Tensor, fill: Tensor, row: Tensor) -> None: ...

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
    weight = (score - score.amax((2, 3), keepdim=True)).exp().sum(-1)  # (L, G, C): one pass over the tokens
    mass = weight / weight.sum(-1, keepdim=True)
    mass = mass.mean(1) if group == "mean" else mass.amax(1)
    return mass.masked_fill(~valid, -1.0)


def best_chunks(summary: Summary, q: Tensor, chunks: Tensor, n_chunks: Tensor, row: Tensor, count: int) -> Tensor:
    """Page numbers of the `count` best chunks of each lane, best first, (L, count); of lanes without chunks, any.

    A compiled step on a CPU loops over the lanes that have chunks, and an uncompiled one picks them: the others would
    cost as much. Compiled for a GPU, all lanes are scored, and those without chunks read the null page over and over:
    to leave them out, the step would have to wait for the host.

    Args:
        q: (L, G, D). chunks: (L, C) page numbers, the first n_chunks (L,) are valid. row: (L,) as in the summary.
    """
    if not torch.compiler.is_compiling():
        lane = n_chunks.nonzero()[:, 0]
        mine = [t[lane] for t in (q, chunks, n_chunks, row)]
        return chunks.new_zeros(len(chunks), count).index_copy(0, lane, select(summary.scores(*mine), mine[1], count))
    if not q.is_cpu:
        return select(summary.scores(q, chunks, n_chunks, row), chunks, count)
    return in_turns(summary, q, chunks, n_chunks, row, count)


def in_turns(summary: Summary, q: Tensor, chunks: Tensor, n_chunks: Tensor, row: Tensor, count: int) -> Tensor:
    """`best_chunks` in a loop, for the compiler: each turn takes one lane, or a few where there are many short ones.

    A turn takes the same calls whatever its lane holds, so short lanes share one. The last turn is filled up with a
    lane that is already in it: an eighth of all lanes at most share one, so that little is scored twice.
    """
    through = (n_chunks > 0).cumsum(0)  # (L,) lanes with chunks up to each
    lanes = max(1, min(len(chunks) // 8, TURN_CHUNKS // chunks.shape[1]))

    def more(i: Tensor, best: Tensor) -> Tensor:
        return i < through[-1]

    def choose(i: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
        number = (i + 1 + torch.arange(lanes)).clamp(max=through[-1])  # 1 is the first lane with chunks
        lane = torch.searchsorted(through, number)
        mine = [t.index_select(0, lane) for t in (q, chunks, n_chunks, row)]
        return i + lanes, best.index_copy(0, lane, select(summary.scores(*mine), mine[1], count))

    start = torch.zeros((), dtype=torch.int64), chunks.new_zeros(len(chunks), count)
    return while_loop(more, choose, start)[1]


def select(scores: Tensor, chunks: Tensor, count: int) -> Tensor:
    """Page numbers of the `count` best chunks of each lane, best first: (L, C), (L, C) -> (L, count)."""
    return chunks.gather(1, scores.topk(count, dim=1).indices)
