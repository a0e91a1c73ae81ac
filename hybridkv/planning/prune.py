"""Text-prior pruning: a static head keeps the tokens that the prompt's text points at, and their neighbours."""

from collections.abc import Sequence

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
    """
    return score.masked_fill(~prunable, float("inf")).argsort(dim=-1, descending=True, stable=True)
