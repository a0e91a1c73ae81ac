"""One budget, handed down: total -> head types -> layers -> heads. Everything is counted in whole pages."""

import torch
from torch import Tensor


class BudgetError(ValueError):
    """A budget that can't hold what must be kept; the message names the smallest one that can."""


def split(total: int, weight: Tensor, floor: Tensor, cap: Tensor) -> Tensor:
    """Splits `total` pages in proportion to `weight`, each share between its floor and its cap.

    Solves for the level at which clamp(level * weight, floor, cap) sums to `total`, then rounds by largest remainder.

    Args:
        total: pages; more than the caps hold is not handed out.
        weight: (N,) positive. floor, cap: (N,) int64, floor <= cap, floor.sum() <= total.

    Returns:
        (N,) int64 that sums to min(total, cap.sum()) exactly.
    """
    if total >= int(cap.sum()):
        return cap
    if total < int(floor.sum()):
        raise BudgetError(f"{total} pages can't hold floors of {int(floor.sum())}")
    if total == int(floor.sum()):
        return floor
    weight, low, high = weight.double(), floor.double(), cap.double()
    # The sum of shares is linear in the level between the points at which one leaves its floor or meets its cap.
    points = (torch.stack((low, high)) / weight).flatten().sort().values  # (2 N,)
    sums = (points[:, None] * weight).clamp(min=low, max=high).sum(1)
    i = int(torch.searchsorted(sums, total))  # not 0: total is above the sum of the floors
    level = points[i - 1] + (points[i] - points[i - 1]) * (total - sums[i - 1]) / (sums[i] - sums[i - 1])
    exact = (level * weight).clamp(min=low, max=high)
    pages = exact.floor().long()
    # Shares at their floor or cap are whole, so every share with a remainder has room for one more page.
    remainder = torch.where(pages < cap, exact - pages, -torch.inf)
    pages[remainder.argsort(descending=True, stable=True)[: total - int(pages.sum())]] += 1
    return pages


def allocate(total: int, dynamic: Tensor, weight: Tensor, floor: Tensor, cap: Tensor, dynamic_weight: float) -> Tensor:
    """Hands `total` pages down to every KV head.

    Args:
        total: pages for the whole cache of one sequence.
        dynamic: (layers, H) bool.
        weight: (layers, H) positive, a head's claim within its layer; a layer's claim is the sum over its heads.
        floor, cap: (layers, H) int64, what a head needs at least and can use at most.
        dynamic_weight: claim of a dynamic head against a static one of the same weight.

    Returns:
        (layers, H) int64, at most `total` in sum, and exactly `total` unless all heads are at their caps.
    """
    pages = torch.zeros_like(floor)
    types = [(kind, w) for kind, w in ((~dynamic, 1.0), (dynamic, dynamic_weight)) if kind.any()]

    def sums(x: Tensor) -> Tensor:
        return torch.stack([x[kind].sum() for kind, _ in types])

    claim = sums(weight.double()) * torch.tensor([w for _, w in types], dtype=torch.double)
    for (kind, _), of_type in zip(types, split(total, claim, sums(floor), sums(cap)).tolist(), strict=True):
        layers = kind.any(1).nonzero()[:, 0].tolist()
        by_layer = [torch.stack([x[i][kind[i]].sum() for i in layers]) for x in (weight, floor, cap)]
        for i, of_layer in zip(layers, split(of_type, *by_layer).tolist(), strict=True):
            heads = kind[i]
            pages[i, heads] = split(of_layer, weight[i, heads], floor[i, heads], cap[i, heads])
    return pages
