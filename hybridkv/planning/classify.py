"""Static or dynamic: which KV heads have settled where they look once the prompt is read.

Text-centric attention decides. A head in which some word of the text surely singles out one far token of the context
does so again for words that are written, and then needs another one: *dynamic*. A head that attends to text, to what is
near, or to much of the context at once, can be pruned by what the prompt's text points at: *static*.
"""

import torch
from torch import Tensor

from hybridkv.config import HybridConfig
from hybridkv.planning.head_profile import HeadProfile
from hybridkv.planning.prefill import BY_OVERLAP


def settled_share(context_mass: Tensor, overlap: Tensor) -> Tensor:
    """Share of the window's attention that stays put: 1 - mass on the context x how much its place moves."""
    return 1 - context_mass * (1 - overlap)


def ranks(x: Tensor) -> Tensor:
    """Rank of each element among all, 0 for the smallest; same shape, ties in order of appearance."""
    return x.flatten().argsort(stable=True).argsort(stable=True).view_as(x)


def movement(context_mass: Tensor, overlap: Tensor) -> Tensor:
    """Rank of each head by how much it looks at the context and how much that moves: (layers, H), 0 is most settled."""
    return ranks(ranks(context_mass) + ranks(1 - overlap))


def classify(context_mass: Tensor, overlap: Tensor, focus: Tensor, config: HybridConfig) -> Tensor:
    """Which KV heads are dynamic.

    Args:
        context_mass, overlap, focus: (layers, H), from the prompt's profile.
        config: `classifier` chooses the ranking, `dynamic_share` how many of its last heads are dynamic.

    Returns:
        (layers, H) bool.

    Raises:
        ValueError: the offline head profile is for another model, or the prompt was read for another classifier.
    """
    heads = context_mass.numel()
    if config.classifier in BY_OVERLAP and overlap.isnan().any():
        raise ValueError(f"this prompt was not read for the classifier {config.classifier!r}: read it again")
    match config.classifier:
        case "threshold":
            return settled_share(context_mass, overlap) < config.threshold
        case "focus":
            order = focus
        case "ranks":
            order = movement(context_mass, overlap)
        case "reversed":
            order = -focus
        case "random":  # other heads for every prompt, the same at every run
            seed = int(context_mass.double().sum() * 1e6)
            order = torch.randperm(heads, generator=torch.Generator().manual_seed(seed)).view_as(context_mass)
        case "profile":
            order = HeadProfile.load(config.head_profile, context_mass.shape).need
    count = max(round(config.dynamic_share * heads), config.dynamic_share > 0)  # of a small model, one at least
    return ranks(order) >= heads - count
