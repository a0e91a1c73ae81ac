"""Attention of a decoding step over the pages of a pool: one FlexAttention call, or its plain twin.

Lanes are the batch; the G query heads of a lane are G query rows. Each lane reads its own list of full pages and its
one partly filled tail page. The pool is shared: keys and values broadcast over the batch.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

Q_BLOCK = 128  # query rows a block of the mask stands for; a group is far smaller
WIDE = 1 << 31  # from so many numbers on, kernels for GPUs count in 64 bits

# Before, the compiler for CPUs fuses loops of a step so that a table is written before its old contents were read
# (seen with 2.11, two sequences: `fill` in `HybridCache.advance`). Its code for GPUs is right.
COMPILES_FOR_CPUS = torch.__version__ >= "2.13"


class PoolError(ValueError):
    """A pool that compiled attention can't read."""


def check_pool(numbers: int, device: torch.device) -> None:
    """Refuses a pool that compiled attention can't read. (Larger caches have several pools; one layer has one.)

    Args:
        numbers: of its keys: slots times head_dim.

    Raises:
        PoolError: it is too large. Before torch 2.13, FlexAttention's split kernel stores through pointers that take
            no 64-bit offsets.
    """
    if numbers >= WIDE and device.type == "cuda" and torch.__version__ < "2.13":
        raise PoolError(
            f"the keys of one layer would be {numbers:,} numbers, and compiled attention on a GPU reads fewer than "
            f"{WIDE:,} with torch {torch.__version__}: use torch 2.13, fewer or shorter prompts, a smaller budget, "
            "policy 'dense', or no compiling"
        )


def why_uncompiled(device: torch.device) -> str | None:
    """Why a compiled step would be wrong there; None if it is right."""
    if device.type != "cpu" or COMPILES_FOR_CPUS:
        return None
    return f"torch {torch.__version__!s} compiles it wrongly for CPUs: use torch 2.13 or later"


def attend_pages(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    pages: Tensor,
    n_pages: Tensor,
    tail: Tensor,
    fill: Tensor,
    layer: Tensor,
    page_size: int,
) -> Tensor:
    """Attention over each lane's pages.

    Args:
        q: (L, 1, G, D).
        keys, values: (1, 1, slots, D), the pool.
        pages: (L, P) int32 page numbers, of which the first n_pages (L,) int32, less than P, are read whole. Not views
            into larger tables: FlexAttention's CPU kernel forgets a view's storage offset. (`index_select` makes none.)
        tail, fill: (layers, L) int32; of page tail[layer], slots up to and including fill[layer] are read. They come
            whole because FlexAttention wants what a mask captures to be inputs of the graph, not computed in it.
        layer: () int64.

    Returns:
        (L, 1, G, D). Compiled, only the listed pages are read. Uncompiled, FlexAttention would ignore the lists, so
        the pages are gathered and attended to densely: same result, more memory.
    """
    if not torch.compiler.is_compiling():
        return attend_gathered(q, keys, values, pages, n_pages, tail, fill, layer, page_size)

    def mask_mod(lane: Tensor, _head: Tensor, _row: Tensor, slot: Tensor) -> Tensor:
        return (slot // page_size != tail[layer, lane]) | (slot % page_size <= fill[layer, lane])

    slots = keys.shape[2]
    tails = tail.index_select(0, layer.view(1))[0]  # (L,)
    if q.is_cpu:
        lists = tail_apart(pages, n_pages, tails, slots // page_size)
    else:
        # Where the kernel counts in 64 bits it compiles only with counts in int64, and with pages in int32.
        lists = tail_last(pages, n_pages.long() if keys.numel() >= WIDE else n_pages, tails)
    block_mask = BlockMask.from_kv_blocks(
        *lists,
        BLOCK_SIZE=(Q_BLOCK, page_size),
        mask_mod=mask_mod,
        seq_lengths=(q.shape[2], slots),
        compute_q_blocks=False,
    )
    scale = q.shape[-1] ** -0.5
    if q.is_cpu:
        # FlexAttention's CPU kernel misreads a query that is only a view, and a clone may be optimised away. Halving is
        # exact and makes the query a tensor of its own; the scale takes it back.
        return flex_attention(q * 0.5, keys, values, block_mask=block_mask, scale=2 * scale)
    options = kernel_options(page_size)
    return flex_attention(q, keys, values, block_mask=block_mask, scale=scale, kernel_options=options)


def kernel_options(page_size: int) -> dict[str, int]:
    """What a GPU's kernel is told. A small page is a small tile, of which three should be in flight at a time.

    On an H200, 7B's heads, 32,768 tokens, a tenth of them in pages of 16: 13.5 to 10.8 us a layer, and 52 to 29 in a
    batch of 8. Larger tiles may not fit into the shared memory of smaller GPUs three times.
    """
    return {"num_stages": 3} if page_size <= 32 else {}


def tail_last(pages: Tensor, n_pages: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
    """One list of partial blocks, (L, 1, 1) counts and (L, 1, 1, P) pages.

    On GPUs the split-KV kernel divides a lane's own list over its splits only if there is no list of full blocks;
    with one, it divides the whole pool, and a lane with few pages would run on few splits.
    """
    column = torch.arange(pages.shape[1], device=pages.device)
    indices = torch.where(column == n_pages[:, None], tail[:, None], pages)
    return (n_pages + 1)[:, None, None], indices[:, None, None]


def tail_apart(pages: Tensor, n_pages: Tensor, tail: Tensor, pool_pages: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The tail as a partial block, the others as full blocks, which skip the mask: faster on CPUs.

    FlexAttention's CPU kernel wants the partial list to be as wide as the pool, though it reads only the first entry
    of each row here. Rows that overlap, each starting one entry after the one before, make that L times cheaper.
    """
    lanes = tail.shape[0]
    partial = F.pad(tail, (0, pool_pages - 1)).as_strided((lanes, 1, 1, pool_pages), (1, 1, 1, 1))
    return torch.ones_like(n_pages)[:, None, None], partial, n_pages[:, None, None], pages[:, None, None]


def attend_gathered(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    pages: Tensor,
    n_pages: Tensor,
    tail: Tensor,
    fill: Tensor,
    layer: Tensor,
    page_size: int,
) -> Tensor:
    """`attend_pages`, the slow and obvious way: copies each lane's slots together and masks the rest."""
    tail, fill = (t.index_select(0, layer.view(1))[0] for t in (tail, fill))
    listed = torch.cat((pages, tail[:, None]), dim=1)  # (L, P + 1)
    read = torch.arange(pages.shape[1], device=q.device) < n_pages[:, None]  # (L, P)
    filled = torch.arange(page_size, device=q.device) <= fill[:, None]
    mask = torch.cat((read.repeat_interleave(page_size, 1), filled), dim=1)  # (L, S)

    def gather(pool: Tensor) -> Tensor:
        rows = rearrange(pool, "1 1 (n s) d -> n (s d)", s=page_size).index_select(0, listed.flatten())
        return rearrange(rows, "(l p) (s d) -> l 1 (p s) d", l=len(listed), s=page_size)

    return F.scaled_dot_product_attention(q, gather(keys), gather(values), attn_mask=mask[:, None, None])
