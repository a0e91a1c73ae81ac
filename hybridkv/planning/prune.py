"""In which order tokens are kept by static heads, and cut into chunks for dynamic ones.

Text-prior pruning: a static head keeps the tokens that the prompt's text points at, and their neighbours.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

Span = tuple[int, int, int, int]  # a picture's or video's tokens in a prompt: the first one, then time, height, width


def pooled(score: Tensor, width: int, weight: float = 1.0, side: int = 1, spans: Sequence[Span] = ()) -> Tensor:
    """Largest score in each token's neighbourhood: evidence rarely stands on one token.

    In text, neighbours count `weight` times: with 1 whole stretches crowd out tokens that are looked at themselves.

    Args:
        score: (H, T), 0 for tokens that do not compete.
        width: neighbouring tokens of text, odd.
        weight: what a text neighbour's score is worth, at most 1.
        side: neighbouring tokens along both sides of a picture, odd.
        spans: where pictures lie; their raster lines are no neighbours.

    Returns:
        (H, T)
    """
    near = F.max_pool1d(score[:, None], width, stride=1, padding=width // 2)[:, 0]
    out = score.maximum(weight * near)
    for start, t, h, w in spans:
        inside = slice(start, start + t * h * w)
        picture = rearrange(score[:, inside], "n (t h w) -> n t h w", t=t, h=h)
        out[:, inside] = F.max_pool2d(picture, side, stride=1, padding=side // 2).flatten(1)
    return out


def keep_order(score: Tensor, prunable: Tensor) -> Tensor:
    """Tokens of every head from the most to the least worth keeping, (H, T) -> (H, T) int64.

    What is not prunable comes first, then prunable tokens by score; a head with room for n tokens keeps the first n.

    Raises:
        ValueError: a score is not a number: nothing could be said of what is kept.
    """
    if score.isnan().any():
        raise ValueError("scores of tokens must be numbers, got NaN: the prompt's attention, or the policy, overflows")
    return score.masked_fill(~prunable, float("inf")).argsort(dim=-1, descending=True, stable=True)


def tile_order(prunable: Tensor, spans: Sequence[Span], page_size: int) -> Tensor:
    """The prunable tokens, pictures tile by tile. Keys carry their positions, so any tokens may share a chunk.

    Args:
        prunable: (T,) bool. spans: where pictures lie. page_size: tokens of a tile, at most twice as wide as high.

    Returns:
        (N,) int64 token numbers.
    """
    place = torch.arange(len(prunable))
    height = 1 << (page_size.bit_length() - 1) // 2
    width = page_size // height
    for start, t, h, w in spans:
        frame, row, col = torch.meshgrid(torch.arange(t), torch.arange(h), torch.arange(w), indexing="ij")
        tile = (frame * h + row // height) * w + col // width  # grows along tiles, tile row by tile row
        inside = ((tile * height + row % height) * width + col % width).flatten().argsort()
        place[start + inside] = torch.arange(start, start + t * h * w)
    context = prunable.nonzero()[:, 0]
    return context[place[context].argsort()]
