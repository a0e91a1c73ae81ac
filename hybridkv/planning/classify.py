"""Static or dynamic: which KV heads have settled where they look once the prompt is read.

Text-centric attention decides. A head in which some word of the text surely singles out one far token of the context
does so again for words that are written, and then needs another one: *dynamic*. A head that attends to text, to what is
near, or to much of the context at once, can be pruned by what the prompt's text points at: *static*.
"""

import torch
from einops import rearrange
from torch import Tensor

from hybridkv.planning.head_profile import HeadProfile
from hybridkv.planning.prefill import Prefill, window_probabilities, window_rows

BY_DEFAULT = 0.75  # of the layers retrieve where a profile says which need it
TOP_SHARE = 0.1  # of the prunable tokens are in a query's top set, for `overlap`


def retrieving_layers(prefill: Prefill) -> Tensor:
    """The layers that dynamic heads may be in, (layers,) bool: the neediest by the head profile, or all.

    A property of the model, not of the prompt, since it is part of the compiled graph.
    """
    config = prefill.config
    share = config.retrieving_layers
    if share is None:  # heads of a profile are found wherever they are
        share = 1 if config.classifier == "profile" else BY_DEFAULT
    if config.head_profile is None or share == 1:
        return torch.ones(prefill.shape[0], dtype=torch.bool)
    return highest(measured_heads(prefill).need.sum(1), share)


def classify(prefill: Prefill, layers: Tensor) -> Tensor:
    """Which KV heads are dynamic, (layers, H) bool on the CPU; `config.classifier` says how it is found out.

    Args:
        layers: (layers,) bool, where they may be.

    Raises:
        ValueError: the offline head profile is missing, or for another model.
    """
    config = prefill.config
    match config.classifier:
        case "focus":
            return highest(of_heads(prefill, "focus"), config.dynamic_share, layers)
        case "profile":
            return highest(measured_heads(prefill).need, config.dynamic_share, layers)
        case "threshold":
            settled = settled_share(of_heads(prefill, "context_mass"), overlap(prefill))
            return (settled < config.threshold) & layers[:, None]
    raise ValueError(f"there is no classifier {config.classifier!r}")


def of_heads(prefill: Prefill, name: str) -> Tensor:
    """A statistic of `LayerProfile` for every head, (layers, H) on the CPU."""
    return torch.stack([getattr(layer, name) for layer in prefill.layers]).cpu()


def measured_heads(prefill: Prefill) -> HeadProfile:
    """The configuration's offline head profile, which must be this model's.

    Raises:
        ValueError: there is none, or it is of another shape.
    """
    profile = prefill.config.head_profile
    if profile is None:
        raise ValueError("this needs an offline head profile: make one with python -m hybridkv.calibrate")
    if profile.need.shape != prefill.shape:
        measured = tuple(profile.need.shape)
        raise ValueError(f"the head profile is for {measured} layers and KV heads, this model has {prefill.shape}")
    return profile


def ranks(x: Tensor) -> Tensor:
    """Rank of each element among all, 0 for the smallest; same shape, ties in order of appearance."""
    return x.flatten().argsort(stable=True).argsort(stable=True).view_as(x)


def highest(x: Tensor, share: float, rows: Tensor | None = None) -> Tensor:
    """The largest of x, as many as a `share` of all elements, bool: one at least, unless the share is 0.

    Args:
        rows: (len(x),) bool, the rows they may be in; if these hold fewer, all of them.
    """
    count = max(round(share * x.numel()), share > 0)
    allowed = torch.ones_like(x, dtype=torch.bool) if rows is None else rows[:, None].expand_as(x)
    return (ranks(x.double().masked_fill(~allowed, -torch.inf)) >= x.numel() - count) & allowed


def settled_share(context_mass: Tensor, overlap: Tensor) -> Tensor:
    """Share of the window's attention that stays put: 1 - mass on the context x how much its place moves."""
    return 1 - context_mass * (1 - overlap)


def overlap(prefill: Prefill) -> Tensor:
    """How much the window's queries look at the same tokens, `jaccard_overlap`: (layers, H) on the CPU."""
    prunable, rows = prefill.prunable, window_rows(prefill.prunable, prefill.config.window)
    first, out = int(rows.min()) if len(rows) else 0, []
    for layer in prefill.layers:
        keys = layer.k  # (H, T, D)
        for group, key in zip(rearrange(layer.q, "(h g) w d -> h g w d", h=len(keys)), keys, strict=True):
            p = window_probabilities(group, key, rows, first)  # (G, W, T)
            out.append(jaccard_overlap(p.mean(0)[:, prunable], TOP_SHARE))
    return torch.stack(out).view(prefill.shape).cpu()


def jaccard_overlap(probabilities: Tensor, top_share: float) -> Tensor:
    """Mean pairwise Jaccard overlap of the top sets of W distributions over N tokens, (W, N) -> scalar."""
    queries, tokens = probabilities.shape
    if queries < 2 or tokens == 0:
        return probabilities.new_ones(())
    size = max(1, round(top_share * tokens))
    top = probabilities.topk(size, dim=-1).indices
    member = torch.zeros_like(probabilities).scatter_(1, top, 1.0)
    shared = member @ member.T  # (W, W) sizes of the intersections; every set has `size` members
    jaccard = shared / (2 * size - shared)
    return (jaccard.sum() - queries) / (queries * (queries - 1))
