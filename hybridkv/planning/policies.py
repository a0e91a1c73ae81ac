"""Cache policies of the literature, each a small function from a prompt's record to a `Plan`.

All obey the same budget, keep the same always-kept tokens (text, sinks, recent) and run in the same compiled step, so a
comparison compares policies and nothing else. Where a paper's method does more than choose tokens, the docstring says
what is left out.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from hybridkv.planning.classify import measured_heads
from hybridkv.planning.plan import Plan, Score, budgeted_plan, full_plan, hybrid_plan, neighbourhood_score
from hybridkv.planning.prefill import Prefill

ADAKV_SAFEGUARD = 0.2  # share of a layer's budget that AdaKV spreads evenly over its heads
MADAKV_UNIFORM = (
    0.2  # share of the budget that MadaKV, as we read it, spreads evenly over layers, and over a layer's heads
)
SPARSEMM_UNIFORM = 0.2  # share of the budget that SparseMM spreads evenly over the heads
PYRAMIDKV_BETA = 20  # PyramidKV's last layer gets 1 / beta of the mean budget


def pruned_plan(prefill: Prefill, score: Score, weight: Tensor | None = None) -> Plan:
    """Every head static, keeping its best-scored tokens; heads share by `weight` (layers, H), or equally."""
    return budgeted_plan(prefill, torch.zeros(prefill.shape, dtype=torch.bool), score, weight)


def window_score(prefill: Prefill, layer: int) -> Tensor:
    """SnapKV's score: attention summed over the window's queries, max-pooled over neighbouring tokens, (H, T)."""
    return neighbourhood_score(prefill, layer, "mean", weight=1.0)


def recency(prefill: Prefill, layer: int) -> Tensor:
    """Later tokens are worth more, (H, T)."""
    tokens = len(prefill.prunable)
    return torch.arange(tokens, device=prefill.prunable.device).float().expand(len(prefill.like), -1)


def streaming(prefill: Prefill) -> Plan:
    """StreamingLLM (arXiv 2309.17453): the first tokens and the most recent ones."""
    return pruned_plan(prefill, recency)


def snapkv(prefill: Prefill) -> Plan:
    """SnapKV (arXiv 2404.14469): what the prompt's last queries attend to, clustered by pooling; equal shares.

    Pooling follows `config.pool` in text, at full weight, and `config.pool_side` in pictures.
    """
    return pruned_plan(prefill, window_score)


def lookm(prefill: Prefill) -> Plan:
    """LOOK-M (arXiv 2406.18139), text prior: text is kept, visual tokens compete by the attention of text; no pooling.

    Left out: merging dropped tokens into kept ones.
    """
    return pruned_plan(prefill, lambda prefill, layer: prefill.layers[layer].mean_score)


def pyramidkv(prefill: Prefill) -> Plan:
    """PyramidKV (arXiv 2406.02069): SnapKV's tokens; budgets fall linearly from first to last layer."""
    layers, heads = prefill.shape
    last = 1 / PYRAMIDKV_BETA
    weight = torch.linspace(2 - last, last, layers) if layers > 1 else torch.ones(1)
    return pruned_plan(prefill, window_score, weight[:, None].expand(layers, heads))


def adakv(prefill: Prefill) -> Plan:
    """AdaKV (arXiv 2407.11550): SnapKV's tokens; heads share by how many of their layer's best are theirs."""
    layers, heads = prefill.shape
    prunable = prefill.prunable
    kept = max(1, int(prefill.config.budget * len(prunable)) - int((~prunable).sum())) * heads
    weight = torch.empty(layers, heads)
    for i in range(layers):
        competing = window_score(prefill, i)[:, prunable].flatten()
        best = competing.topk(min(kept, competing.numel())).indices // max(1, int(prunable.sum()))
        share = best.bincount(minlength=heads).cpu() / max(1, best.numel())
        weight[i] = (1 - ADAKV_SAFEGUARD) * share + ADAKV_SAFEGUARD / heads
    return pruned_plan(prefill, window_score, weight)


def in_pictures(prefill: Prefill) -> Tensor:
    """Competing tokens that are visual, (T,) bool; without pictures all that compete."""
    visual = torch.zeros_like(prefill.prunable)
    for start, t, h, w in prefill.spans:
        visual[start : start + t * h * w] = True
    return visual & prefill.prunable if prefill.spans else prefill.prunable


def madakv(prefill: Prefill) -> Plan:
    """MadaKV (arXiv 2506.15724): heads that prefer pictures to text get more of the visual budget; SnapKV's tokens.

    Written from the paper's abstract, which is all that we had of it. It names two parts. *Modality preference
    adaptation* is here: within a layer heads share by how much of the window's attention falls on visual tokens, the
    rest falling on text, all of which is kept anyway. *Hierarchical compression compensation* is here: what equal
    shares would make a layer lose of that attention is its claim on the budget, so that layers that lose little give to
    those that lose much. The formulas are ours, and so is a share MADAKV_UNIFORM that is spread evenly. Left out are
    its own score of tokens, and whatever it does to text.
    """
    layers, heads = prefill.shape
    visual = in_pictures(prefill)
    equal = max(1, int(prefill.config.budget * len(visual)) - int((~prefill.prunable).sum()))  # visual tokens a head
    preference, lost = torch.empty(layers, heads), torch.empty(layers)
    for i in range(layers):
        looks = prefill.layers[i].mean_score[:, visual]  # (H, visual tokens)
        preference[i] = looks.sum(1).cpu()
        lost[i] = float((looks.sum(1) - looks.topk(min(equal, looks.shape[1])).values.sum(1)).clamp(min=0).sum())
    return pruned_plan(prefill, window_score, mostly(lost)[:, None] * mostly(preference))


def mostly(claim: Tensor) -> Tensor:
    """Shares of the last dimension by claims of 0 and more, but for MADAKV_UNIFORM of it, spread evenly."""
    even = torch.full_like(claim, 1 / claim.shape[-1])
    total = claim.sum(-1, keepdim=True)
    share = torch.where(total > 0, claim / total.clamp(min=torch.finfo(claim.dtype).tiny), even)
    return (1 - MADAKV_UNIFORM) * share + MADAKV_UNIFORM * even


def sparsemm(prefill: Prefill) -> Plan:
    """SparseMM (arXiv 2506.05344): heads that look at pictures get more, by an offline score; SnapKV's tokens.

    The score is `HeadProfile.visual`, attention on visual tokens while answering; the paper finds its heads by text
    recognition with bounding boxes. A share SPARSEMM_UNIFORM, our choice, is spread evenly. Wants
    `config.head_profile`.
    """
    visual = measured_heads(prefill).visual
    weight = (1 - SPARSEMM_UNIFORM) * visual / visual.sum() + SPARSEMM_UNIFORM / visual.numel()
    return pruned_plan(prefill, window_score, weight)


def quest(prefill: Prefill) -> Plan:
    """Quest (arXiv 2406.10774): nothing is dropped; every head reads the chunks with the highest bound on their scores.

    Left out: two first layers without compression, which would not fit a small budget. Wants
    `config.retrieval = "bound"`.
    """
    return budgeted_plan(prefill, torch.ones(prefill.shape, dtype=torch.bool))


POLICIES: dict[str, Callable[[Prefill], Plan]] = {
    "hybridkv": hybrid_plan,
    "full": full_plan,
    "streaming": streaming,
    "snapkv": snapkv,
    "lookm": lookm,
    "pyramidkv": pyramidkv,
    "adakv": adakv,
    "madakv": madakv,
    "sparsemm": sparsemm,
    "quest": quest,
}
