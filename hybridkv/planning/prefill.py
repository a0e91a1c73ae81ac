"""Prefill, and what it reveals: where the prompt's text looks, for every KV head.

Attention over the prompt is dense and causal. On the way, the last text queries (the *window*) are multiplied with all
keys once more, one KV head at a time, which costs window / T of the attention and never holds a T x T matrix. Where the
context itself is text, so are its own last queries.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from hybridkv.config import HybridConfig
from hybridkv.planning.prune import Span

BY_OVERLAP = ("threshold", "ranks")  # classifiers that want to know how much the queries' top sets overlap


@dataclass(frozen=True)
class LayerProfile:
    """One layer's keys and values of one prompt, and what its window queries attend to.

    Attributes:
        k, v: (H, T, D), keys after RoPE.
        score: (H, T) float32, the largest attention probability that any window query of any head in the group gives
            to each token.
        mean_score: (H, T) float32, the mean over window queries and heads of the group.
        context_mass: (H,) mean share of the window's attention on prunable tokens.
        focus: (H,) how surely text singles out one far token of the context: the largest probability that a text query
            gives to one prunable token at least `config.window` before it, mean over the group's heads. Text queries
            are the window and, where the context is text, its own last `config.window` tokens.
        overlap: (H,) mean pairwise Jaccard overlap of the window queries' top sets among prunable tokens; 1 if all
            queries look at the same tokens. NaN unless `config.classifier` is one of BY_OVERLAP.
    """

    k: Tensor
    v: Tensor
    score: Tensor
    mean_score: Tensor
    context_mass: Tensor
    focus: Tensor
    overlap: Tensor


def window_rows(prunable: Tensor, window: int) -> Tensor:
    """Indices (W,) of the window: the last `window` text tokens, or fewer, that come after some prunable token."""
    seen = prunable.cumsum(0) > 0
    return (seen & ~prunable).nonzero()[-window:, 0]


def reading_rows(prunable: Tensor, spans: Sequence[Span], window: int) -> Tensor:
    """Indices of the last `window` prunable tokens that are text, or fewer: the context as it is read."""
    text = prunable.clone()
    for start, t, h, w in spans:
        text[start : start + t * h * w] = False
    return text.nonzero()[-window:, 0]


def window_probabilities(q: Tensor, k: Tensor, rows: Tensor, first: int) -> Tensor:
    """Causal attention of the window queries of one KV head.

    Args:
        q: (G, T, D) the group's queries; k: (T, D); rows: (W,) query positions, none before `first`.

    Returns:
        (G, W, T) float32 probabilities.
    """
    logits = (q[:, rows].float() * q.shape[-1] ** -0.5) @ k.float().T
    # Every window query sees what comes before `first`.
    hidden = torch.arange(first, k.shape[0], device=k.device) > rows[:, None]  # (W, T - first)
    logits[..., first:].masked_fill_(hidden, float("-inf"))
    return logits.softmax(-1)


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


def profile_layer(
    q: Tensor, k: Tensor, v: Tensor, prunable: Tensor, config: HybridConfig, spans: Sequence[Span] = ()
) -> LayerProfile:
    """Profiles one layer of one prompt. q (Hq, T, D); k, v (H, T, D); prunable (T,) bool on the same device."""
    asking, reading = window_rows(prunable, config.window), reading_rows(prunable, spans, config.window)
    rows = torch.cat([reading, asking])
    first = int(rows.min()) if len(rows) else 0
    # A query's own neighbourhood, and what is no context, is nothing that it looks up.
    near = ~prunable | (rows[:, None] - torch.arange(len(prunable), device=rows.device) < config.window)  # (W, T)
    score, mean, mass, focus, overlap = [], [], [], [], []
    by_overlap, unknown = config.classifier in BY_OVERLAP, torch.full((), float("nan"), device=k.device)
    for group, key in zip(rearrange(q, "(h g) t d -> h g t d", h=k.shape[0]), k, strict=True):
        every = window_probabilities(group, key, rows, first)
        p = every[:, len(reading) :]  # (G, W, T)
        if not len(asking):  # no text sees the context: nothing is known, and all scores are 0
            p = every.new_zeros(len(group), 1, len(prunable))
        score.append(p.amax((0, 1)))
        mean.append(p.mean((0, 1)))
        mass.append(mean[-1][prunable].sum())
        overlap.append(jaccard_overlap(p.mean(0)[:, prunable], config.top_share) if by_overlap else unknown)
        focus.append(every.masked_fill_(near, 0.0).amax((1, 2)).mean() if len(rows) else mass[-1])
    return LayerProfile(k, v, *map(torch.stack, (score, mean, mass, focus, overlap)))


class Prefill:
    """Records one prompt's way through a model: `prefill[layer](q, k, v)` is its attention.

    Each layer is called once, in order, with q (1, Hq, T, D) and k, v (1, H, T, D), positions already applied to q
    and k, and gets causal attention (1, Hq, T, D) back. The profiles gather in `layers`.

    Args:
        prunable: (T,) bool, the tokens that may be pruned or moved; the others stay in every head's cache. None
            makes all tokens prunable but the last `config.window`, which are taken for the question.
        config: how to profile.
        on_layer: called after each layer, for progress.
        spans: where pictures lie among the tokens, for neighbourhoods in two dimensions. What is prunable and in none
            of them is text.
    """

    def __init__(
        self,
        prunable: Tensor | None,
        config: HybridConfig,
        on_layer: Callable[[], None] | None = None,
        spans: Sequence[Span] = (),
    ):
        self.config = config
        self.spans = spans
        self.on_layer = on_layer
        self.prunable = prunable
        self.layers: list[LayerProfile] = []

    def __getitem__(self, layer: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return partial(self.attend, layer)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if layer != len(self.layers):
            raise ValueError(
                f"layer {layer} called after {len(self.layers)} layers: a Prefill reads one prompt, in order"
            )
        if q.shape[0] != 1 or k.shape != v.shape or q.shape[2:] != k.shape[2:] or q.shape[1] % k.shape[1]:
            raise ValueError(
                f"prefill wants one sequence, q (1, Hq, T, D) and k, v (1, H, T, D) with H dividing Hq, "
                f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
            )
        if layer == 0:
            self._start(q.shape[2], q.device)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        self.layers.append(profile_layer(q[0], k[0], v[0], self.prunable, self.config, self.spans))
        if self.on_layer:
            self.on_layer()
        return out

    def _start(self, tokens: int, device: torch.device) -> None:
        if self.prunable is None:
            self.prunable = torch.arange(tokens) < tokens - self.config.window
        if self.prunable.shape != (tokens,):
            raise ValueError(f"prunable has shape {tuple(self.prunable.shape)}, the prompt has {tokens} tokens")
        self.prunable = competing(self.prunable, self.config).to(device)


def competing(prunable: Tensor, config: HybridConfig) -> Tensor:
    """The tokens that really may be pruned, (T,) bool: sinks and the most recent ones never are."""
    prunable = prunable.to(torch.bool, copy=True)
    prunable[: config.sinks] = False
    prunable[max(0, len(prunable) - config.recent) :] = False
    return prunable


def outline(prunable: Tensor, config: HybridConfig, layers: int, like: LayerProfile, spans: Sequence[Span]) -> Prefill:
    """The record of a prompt before it is read: shapes without contents, enough to plan and to make room for it.

    Args:
        prunable: (T,) bool. layers: how many the model has. like: a layer of any prompt's record.
    """
    k = like.k.new_empty(1).expand(len(like.k), len(prunable), like.k.shape[-1])  # takes no memory
    unknown = like.context_mass.new_zeros(len(k))
    record = Prefill(competing(prunable, config), config, spans=spans)
    record.layers = [LayerProfile(k, k, unknown, unknown, unknown, unknown, unknown)] * layers
    return record
