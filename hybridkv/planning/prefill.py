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


@dataclass(frozen=True)
class LayerProfile:
    """One layer's keys and values of one prompt, and what its window queries attend to.

    Attributes:
        k, v: (H, T, D), keys after RoPE.
        q: (Hq, W, D), the window's queries, for statistics that only some methods want.
        score: (H, T) float32, the largest attention probability that any window query of any head in the group gives
            to each token.
        mean_score: (H, T) float32, the mean over window queries and heads of the group.
        context_mass: (H,) mean share of the window's attention on prunable tokens.
        focus: (H,) how surely text singles out one far token of the context: the largest probability that a text query
            gives to one prunable token at least `config.window` before it, mean over the group's heads. Text queries
            are the window and, where the context is text, its own last `config.window` tokens.
    """

    k: Tensor
    v: Tensor
    q: Tensor
    score: Tensor
    mean_score: Tensor
    context_mass: Tensor
    focus: Tensor


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
        q: (G, W, D) the window's queries of the group; k: (T, D); rows: (W,) their positions, none before `first`.

    Returns:
        (G, W, T) float32 probabilities.
    """
    logits = (q.float() * q.shape[-1] ** -0.5) @ k.float().T
    # Every window query sees what comes before `first`.
    hidden = torch.arange(first, k.shape[0], device=k.device) > rows[:, None]  # (W, T - first)
    logits[..., first:].masked_fill_(hidden, float("-inf"))
    return logits.softmax(-1)


@dataclass(frozen=True)
class Window:
    """The queries of a prompt that say where its text looks: the same in every layer, so found once.

    Attributes:
        asking: (A,) the window. reading: (N,) the context's own last queries, where it is text.
        rows: (N + A,) the latter, then the former.
        first: the first of them all.
        near: (N + A, T) bool, what is no lookup of a query of these two: its own neighbourhood, and what is no context.
    """

    asking: Tensor
    reading: Tensor
    rows: Tensor
    first: int
    near: Tensor

    @classmethod
    def of(cls, prunable: Tensor, config: HybridConfig, spans: Sequence[Span] = ()) -> "Window":
        asking, reading = window_rows(prunable, config.window), reading_rows(prunable, spans, config.window)
        rows = torch.cat((reading, asking))
        back = rows[:, None] - torch.arange(len(prunable), device=rows.device)  # (N + A, T) how far before the query
        return cls(asking, reading, rows, int(rows.min()) if len(rows) else 0, ~prunable | (back < config.window))


def profile_layer(q: Tensor, k: Tensor, v: Tensor, prunable: Tensor, window: Window) -> LayerProfile:
    """Profiles one layer of one prompt.

    Args:
        q: (Hq, N + A, D), the queries of `window.rows`. k, v: (H, T, D). prunable: (T,) bool on the same device.
    """
    asking, rows = window.asking, window.rows
    score, mean, mass, focus = [], [], [], []
    for group, key in zip(rearrange(q, "(h g) t d -> h g t d", h=k.shape[0]), k, strict=True):
        every = window_probabilities(group, key, rows, window.first)
        p = every[:, len(window.reading) :]  # (G, A, T)
        if not len(asking):  # no text sees the context: nothing is known, and all scores are 0
            p = every.new_zeros(len(group), 1, len(prunable))
        score.append(p.amax((0, 1)))
        mean.append(p.mean((0, 1)))
        mass.append((mean[-1] * prunable).sum())
        focus.append(every.masked_fill_(window.near, 0.0).amax((1, 2)).mean() if len(rows) else mass[-1])
    return LayerProfile(k, v, q[:, len(window.reading) :], *map(torch.stack, (score, mean, mass, focus)))


def owned(t: Tensor) -> Tensor:
    """The same numbers in memory of their own: a part of a joined projection would keep the whole of it."""
    return t if t.untyped_storage().nbytes() == t.nbytes else t.clone(memory_format=torch.contiguous_format)


class NotRead(RuntimeError):
    """A layer was asked for of a prompt that is planned before it is read."""


class Unread(Sequence):
    """The layers of a prompt that is yet to be read: how many there will be, and no more."""

    def __init__(self, n_layers: int):
        self.n_layers = n_layers

    def __len__(self) -> int:
        return self.n_layers

    def __getitem__(self, layer: int) -> LayerProfile:
        raise NotRead(f"layer {layer} is not read yet")


class Prefill:
    """Records one prompt's way through a model: `prefill[layer](q, k, v)` is its attention.

    Each layer is called once, in order, with q (1, Hq, T, D) and k, v (1, H, T, D), positions already applied to q
    and k, and gets causal attention (1, Hq, T, D) back.

    Args:
        prunable: (T,) bool, the tokens that may be pruned or moved; the others stay in every head's cache. None
            makes all tokens prunable but the last `config.window`, which are taken for the question.
        config: how to profile.
        on_layer: called after each layer.
        spans: where pictures lie among the tokens, for neighbourhoods in two dimensions. What is prunable and in none
            of them is text.

    Attributes:
        prunable: as given, less sinks and recent tokens.
        layers: a `LayerProfile` of each layer that was read; None once its keys and values are packed.
        like: (H, 0, D), the shape, dtype and device of every layer's keys; None before the first layer.
        window: the queries that it looks at; None before the first layer.
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
        self.prunable = None if prunable is None else competing(prunable, config)
        self.layers: list[LayerProfile | None] | Unread = []
        self.like: Tensor | None = None
        self.window: Window | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(layers, KV heads)"""
        return len(self.layers), len(self.like)

    def __getitem__(self, layer: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return partial(self.attend, layer)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[0] != 1 or k.shape != v.shape or q.shape[2:] != k.shape[2:] or q.shape[1] % k.shape[1]:
            raise ValueError(
                f"prefill wants one sequence, q (1, Hq, T, D) and k, v (1, H, T, D) with H dividing Hq, "
                f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
            )
        self._expect(layer, k[0])
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        self.record(layer, q[0, :, self.window.rows], k[0], v[0])
        return out

    def record(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Notes one layer whose attention was computed elsewhere.

        Args:
            q: (Hq, N + A, D), the queries of `Window.rows`. k, v: (H, T, D).
        """
        self._expect(layer, k)
        self.layers.append(profile_layer(q, owned(k), owned(v), self.prunable, self.window))
        if self.on_layer:
            self.on_layer()

    def _expect(self, layer: int, k: Tensor) -> None:
        if layer != len(self.layers):
            raise ValueError(
                f"layer {layer} called after {len(self.layers)} layers: a Prefill reads one prompt, in order"
            )
        if self.like is None:
            self._start(k)
        if k[:, :0].shape != self.like.shape:
            raise ValueError(f"layer {layer} has keys {tuple(k.shape)}, those before it {tuple(self.like.shape)}")

    def _start(self, k: Tensor) -> None:
        tokens = k.shape[1]
        if self.prunable is None:
            self.prunable = competing(all_but_question(tokens, self.config), self.config)
        if self.prunable.shape != (tokens,):
            raise ValueError(f"prunable has shape {tuple(self.prunable.shape)}, the prompt has {tokens} tokens")
        self.prunable, self.like = self.prunable.to(k.device), k[:, :0].clone()
        self.window = Window.of(self.prunable, self.config, self.spans)

    def fits(self, plan: object, layer: int) -> dict | None:
        """Where sketches of a layer's settled chunks are kept for later prompts: nowhere."""
        return None

    def outline(self, n_layers: int, like: Tensor) -> "Prefill":
        """This record before anything is read: enough to plan, if the policy looks at no layer.

        Args:
            like: of any prompt that the same model has begun to read.
        """
        record = Prefill(self.prunable, self.config, spans=self.spans)
        record.layers, record.like = Unread(n_layers), like
        return record


def all_but_question(tokens: int, config: HybridConfig) -> Tensor:
    """What is prunable where nobody says: all but the last `config.window` tokens, (tokens,) bool."""
    return torch.arange(tokens) < tokens - config.window


def competing(prunable: Tensor, config: HybridConfig) -> Tensor:
    """The tokens that really may be pruned, (T,) bool: sinks and the most recent ones never are."""
    prunable = prunable.to(torch.bool, copy=True)
    prunable[: config.sinks] = False
    prunable[max(0, len(prunable) - config.recent) :] = False
    return prunable
