"""Static or dynamic: which KV heads have settled where they look once the prompt is read.

Text-centric attention decides. A head whose text queries attend to text, or all to the same few context tokens, can
be pruned by what they point at: *static*. A head whose text queries spread over the context, each somewhere else,
will look somewhere else again while the answer is written: *dynamic*.
"""

from torch import Tensor


def settled_share(context_mass: Tensor, overlap: Tensor) -> Tensor:
    """Share of the window's attention that stays put: 1 - mass on the context x how much its place moves."""
    return 1 - context_mass * (1 - overlap)


def ranks(x: Tensor) -> Tensor:
    """Rank of each element among all, 0 for the smallest; same shape, ties in order of appearance."""
    return x.flatten().argsort(stable=True).argsort(stable=True).view_as(x)


def classify(context_mass: Tensor, overlap: Tensor, share: float | None, threshold: float) -> Tensor:
    """Which KV heads are dynamic.

    Args:
        context_mass, overlap: (layers, H), from the profile.
        share: wanted share of dynamic heads: those with the largest rank(context_mass) + rank(1 - overlap). None
            takes the heads whose settled share is below `threshold`.
        threshold: see `settled_share`.

    Returns:
        (layers, H) bool.
    """
    if share is None:
        return settled_share(context_mass, overlap) < threshold
    wanted = round(share * context_mass.numel())
    movement = ranks(ranks(context_mass) + ranks(1 - overlap))
    return movement >= context_mass.numel() - wanted
