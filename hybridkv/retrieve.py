"""Chunk-wise retrieval: which chunks of a dynamic head the current query needs.

Scoring every chunk with its exact keys would read half the cache. The *key sketch* is a low-rank int8 copy of the
keys: coordinates in the head's own principal directions. It is stored page by page as (rank, page_size), so that one
fused pass over the pages scores 16 neighbouring tokens per vector instruction.
"""

import torch
from einops import einsum, rearrange
from torch import Tensor


def fit_sketch(k: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Principal directions of each head's keys.

    Args:
        k: (N, T, D) keys of N heads.

    Returns:
        basis (N, D, rank), offset (N, rank) and step (N, rank), all float32: a key's sketch is
        round((k @ basis - offset) / step), in [-127, 127].
    """
    k = k.float()
    mean = k.mean(1, keepdim=True)
    covariance = (k - mean).transpose(1, 2) @ (k - mean)
    basis = torch.linalg.eigh(covariance).eigenvectors[..., -rank:]
    z = k @ basis
    offset = (mean @ basis)[:, 0]
    step = (z - offset[:, None]).abs().amax(1).clamp(min=1e-8) / 127
    return basis, offset, step


def encode(k: Tensor, basis: Tensor, offset: Tensor, step: Tensor) -> Tensor:
    """Sketches of keys, (N, T, D) -> (N, T, rank) int8. Keys outside the fitted range are clamped to it."""
    z = einsum(k.float(), basis.float(), "n t d, n d r -> n t r")
    return ((z - offset[:, None]) / step[:, None]).round().clamp(-127, 127).to(torch.int8)


def chunk_scores(q: Tensor, sketch: Tensor, chunks: Tensor, n_chunks: Tensor, basis: Tensor, step: Tensor) -> Tensor:
    """How much of its attention each lane's query group would give to each of its chunks, by the sketch.

    A chunk's weight is the sum of its tokens' exponentiated scores, normalised over chunks, averaged over the group.
    (The sketch's offset adds the same number to every token of a lane and drops out.)

    Args:
        q: (L, G, D) queries. basis: (L, D, rank), step: (L, rank).
        sketch: (pages, rank, page_size) int8. chunks: (L, C) page numbers, the first n_chunks (L,) are valid.

    Returns:
        (L, C) float32; -1 where there is no chunk.
    """
    projected = einsum(q.float(), basis.float(), "l g d, l d r -> l g r") * step[:, None] * q.shape[-1] ** -0.5
    z = sketch[chunks][:, None]  # (L, 1, C, rank, page_size)
    token = (projected[:, :, None, :, None] * z).sum(-2)  # (L, G, C, page_size)
    valid = torch.arange(chunks.shape[1], device=q.device) < n_chunks[:, None]  # (L, C)
    mass = token.logsumexp(-1).masked_fill(~valid[:, None], -1e30).softmax(-1).mean(1)
    return mass.masked_fill(~valid, -1.0)


def select(scores: Tensor, chunks: Tensor, count: int) -> Tensor:
    """Page numbers of the `count` best chunks of each lane, best first: (L, C), (L, C) -> (L, count)."""
    return chunks.gather(1, scores.topk(count, dim=1).indices)


def pack_sketch(z: Tensor, page_size: int) -> Tensor:
    """Sketches of whole pages in their stored order, (n * page_size, rank) -> (n, rank, page_size)."""
    return rearrange(z, "(n s) r -> n r s", s=page_size)
