"""Key sketches: a low-rank int8 copy of a dynamic lane's keys, their coordinates in its own principal directions.

Stored page by page, tokens side by side, and four coordinates of a token in one int32 word: vector units load and widen
whole words many times faster than runs of 16 bytes.
"""

from collections.abc import Sequence

import torch
from einops import einsum, rearrange
from torch import Tensor, nn

from hybridkv.cache.retrieve import chunk_mass
from hybridkv.config import WORD, HybridConfig


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
    # On the CPU always: 0.6 ms for a head of 128 (a core of an AMD EPYC). An H100 took 13 to 14 ms for a layer's heads.
    basis = torch.linalg.eigh(covariance.cpu()).eigenvectors[..., -rank:].to(k.device)
    z = k @ basis
    offset = (mean @ basis)[:, 0]
    step = (z - offset[:, None]).abs().amax(1).clamp(min=1e-8) / 127
    return basis, offset, step


def encode(k: Tensor, basis: Tensor, offset: Tensor, step: Tensor) -> Tensor:
    """Sketches of keys, (N, T, D) -> (N, T, rank) int8. Keys outside the fitted range are clamped to it."""
    z = einsum(k.float(), basis.float(), "n t d, n d r -> n t r")
    return ((z - offset[:, None]) / step[:, None]).round().clamp(-127, 127).to(torch.int8)


def to_words(z: Tensor) -> Tensor:
    """Four int8 in each int32, the first in the lowest bits: (..., rank) -> (..., rank / 4)."""
    parts = rearrange(z.int() & 255, "... (w j) -> ... w j", j=WORD).unbind(-1)
    return parts[0] | parts[1] << 8 | parts[2] << 16 | parts[3] << 24


def from_words(words: Tensor, j: int) -> Tensor:
    """The j-th int8 of every word, as float32."""
    return (words << 8 * (WORD - 1 - j) >> 8 * (WORD - 1)).float()


def sketch_scores(
    q: Tensor, sketch: Tensor, chunks: Tensor, n_chunks: Tensor, basis: Tensor, step: Tensor, group: str = "mean"
) -> Tensor:
    """How much of its attention each lane's query group would give to each of its chunks, by the sketch.

    A chunk's weight is the sum of its tokens' exponentiated scores, normalised over chunks, then the group's `mean` or
    `max`. (The sketch's offset adds the same number to every token of a lane and drops out.)

    Args:
        q: (L, G, D) queries. basis: (L, D, rank), step: (L, rank).
        sketch: (pages, rank / 4, page_size) int32, see `to_words`.
        chunks: (L, C) page numbers, the first n_chunks (L,) are valid.

    Returns:
        (L, C) float32; -1 where there is no chunk.
    """
    # Scaled before the projection: what follows it would be fused into every term of the loop over tokens, which would
    # take twice as long to compile.
    basis = basis.float() * (step * q.shape[-1] ** -0.5)[:, None]
    if q.is_cpu:
        projected = einsum(q.float(), basis, "l g d, l d r -> l g r")
    else:  # a sum is one kernel with what it reads and writes, a matmul four
        projected = (q.float()[..., None] * basis[:, None]).sum(2)
        if q.dtype != torch.float32:
            projected = projected.half()  # for a GPU's matrix units; exact for int8, and 8 times finer than bfloat16
    return chunk_mass(token_scores(projected, sketch, chunks), n_chunks, group)


def token_scores(q: Tensor, sketch: Tensor, chunks: Tensor) -> Tensor:
    """Dot products with the sketches of each lane's tokens: (L, G, rank), as stored, (L, C) -> (L, G, C, page_size).

    Compiled for a CPU, the sums are written out: one loop loads and unpacks every word once for all query heads of the
    group, and keeps their sums in registers. Before a matmul it would write four bytes for each one, and read them
    again. The matmul is done in q's dtype; the result is float32.
    """
    if torch.compiler.is_compiling() and q.is_cpu:
        return written_out(q, sketch, chunks)
    words = rearrange(sketch[chunks], "l c w s -> l w c s")
    z = torch.stack([from_words(words, j).to(q.dtype) for j in range(WORD)], 2)  # in the order that a matmul reads
    return einsum(q, rearrange(z, "l w j c s -> l (w j) c s"), "l g r, l r c s -> l g c s").float()


def written_out(q: Tensor, sketch: Tensor, chunks: Tensor) -> Tensor:
    """`token_scores`, sum by sum, for the compiler.

    Indices are tensors: in a `while_loop`, each slice x[:, 3] would become a call that copies. There are hundreds of
    terms, and compiling takes as long as there are operations: three a term, the indices made once.
    """

    lane = torch.arange(len(q), device=q.device)
    at = [torch.full((1,), i, device=q.device) for i in range(max(q.shape[1:]))]
    q = q[..., None, None]  # (L, G, rank, 1, 1): a number for every chunk and slot
    words = [sketch[chunks, at[w]] for w in range(sketch.shape[1])]  # rank / 4 of (L, C, S)
    z = [from_words(word, j) for word in words for j in range(WORD)]
    heads = [sum(q[lane, at[g], at[r]] * z[r] for r in range(len(z))) for g in range(q.shape[1])]
    return torch.stack(heads, 1)


def pack_sketch(z: Tensor, page_size: int) -> Tensor:
    """Sketches of whole pages as they are stored, (n * page_size, rank) int8 -> (n, rank / 4, page_size) int32."""
    return rearrange(to_words(z), "(n s) w -> n w s", s=page_size)


class KeySketch(nn.Module):
    """Key sketches of a store of `pages` pages, for `rows` - 1 dynamic lanes.

    Args:
        like: a tensor with the dtype and device of the keys.
    """

    def __init__(self, pages: int, rows: int, dim: int, config: HybridConfig, like: Tensor):
        super().__init__()
        self.page_size, self.rank, self.group = config.page_size, config.rank(dim), config.group
        self.words = self.rank // WORD

        def buffer(name: str, *shape: int, dtype: torch.dtype) -> None:
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=like.device), persistent=False)

        size = pages * self.words * self.page_size
        buffer("sketch", size, dtype=torch.int32)  # flat, so that appending stays in place
        buffer("basis", rows, dim, self.rank, dtype=like.dtype)
        buffer("offset", rows, self.rank, dtype=torch.float32)
        buffer("step", rows, self.rank, dtype=torch.float32)
        self.step.fill_(1.0)  # rows that are not used encode, too, and must not divide by 0

    def pack(
        self,
        k: Tensor,
        pages: list[Tensor],
        row: Tensor,
        full: int,
        fitted: int | None = None,
        fits: dict | None = None,
        heads: Sequence[int] = (),
    ) -> None:
        """Fits and stores the summaries of dynamic lanes.

        Args:
            k: (N, T, D) keys in the order of the lanes' pages: `full` full pages, then a partly filled tail page, if
                there are keys for it.
            pages: N tensors of page numbers, tail page last. row: (N,).
            fitted: of how many pages the sketch is made; None for the full ones, 0 for a sketch that is `share`d.
            fits, heads: sketches that were fitted to the same keys before, by head and rank, and which the N heads are.
        """
        fitted = full if fitted is None else fitted
        if fitted:
            basis, offset, step = self._fit(k[:, : fitted * self.page_size], fits, heads)
            self.basis[row], self.offset[row], self.step[row] = basis.to(self.basis.dtype), offset, step
        z = encode(k, self.basis[row], self.offset[row], self.step[row])
        sketch, tail = self.sketch.view(-1, self.words, self.page_size), full * self.page_size
        for lane, numbers in enumerate(pages):
            sketch[numbers[:full]] = pack_sketch(z[lane, :tail], self.page_size)
            sketch[numbers[full], :, : z.shape[1] - tail] = to_words(z[lane, tail:]).T

    def _fit(self, k: Tensor, fits: dict | None, heads: Sequence[int]) -> Sequence[Tensor]:
        """`fit_sketch`, of what was not fitted before."""
        if fits is None:
            return fit_sketch(k, self.rank)
        keys = [(head, self.rank) for head in heads]
        new = [n for n, key in enumerate(keys) if key not in fits]
        if new:
            found = [t.cpu() for t in fit_sketch(k[new], self.rank)]
            fits.update({keys[n]: [t[i].clone() for t in found] for i, n in enumerate(new)})
        return [torch.stack(parts).to(k.device) for parts in zip(*(fits[key] for key in keys), strict=True)]

    def share(self, row: Tensor, other: Tensor) -> None:
        """Rows (N,) read chunks that were summed up for the others (N,), and sum up theirs in the same way."""
        for table in (self.basis, self.offset, self.step):
            table[row] = table[other]

    def append(self, k: Tensor, page: Tensor, fill: Tensor) -> None:
        """Adds one key of each row, (rows, D), to a page (rows,) int64, behind the `fill` (rows,) that are there."""
        z = to_words(encode(k[:, None], self.basis, self.offset, self.step)[:, 0])  # (rows, words)
        at = (page[:, None] * self.words + torch.arange(self.words, device=k.device)) * self.page_size + fill[:, None]
        self.sketch.index_copy_(0, at.flatten(), z.flatten())

    def scores(self, q: Tensor, chunks: Tensor, n_chunks: Tensor, row: Tensor) -> Tensor:
        """See `sketch_scores`; row: (L,)."""
        sketch = self.sketch.view(-1, self.words, self.page_size)
        return sketch_scores(q, sketch, chunks, n_chunks, self.basis[row], self.step[row], self.group)
