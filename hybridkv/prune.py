"""Text-prior pruning: a static head keeps the tokens that the prompt's text points at, and their neighbours."""

import torch.nn.functional as F
from torch import Tensor


def pooled(score: Tensor, width: int) -> Tensor:
    """Largest score within `width` neighbouring tokens, (H, T) -> (H, T): evidence rarely stands on one token."""
    return F.max_pool1d(score[:, None], width, stride=1, padding=width // 2)[:, 0]


def keep_order(score: Tensor, prunable: Tensor) -> Tensor:
    """Tokens of every head from the most to the least worth keeping, (H, T) -> (H, T) int64.

    What is not prunable comes first, then prunable tokens by score; a head with room for n tokens keeps the first n.
    """
    return score.masked_fill(~prunable, float("inf")).argsort(dim=-1, descending=True, stable=True)
