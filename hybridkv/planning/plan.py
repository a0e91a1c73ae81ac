"""The plan: what every lane (one KV head of one sequence) of a prompt keeps, and what that costs.

A lane is one of three things:

- *whole*: its budget holds the prompt, so it keeps every token;
- *static*: it keeps the `pages * page_size` tokens that the text points at, and drops the rest;
- *dynamic*: it keeps everything. Tokens that are not prunable, rounded up to full pages, are *fixed*: read at every
  step. The prunable rest is cut into chunks of one page, of which a step reads the best `n_retrieve`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hybridkv.cache.retrieve import tile_order
from hybridkv.config import HybridConfig
from hybridkv.planning.budget import BudgetError, allocate
from hybridkv.planning.classify import classify
from hybridkv.planning.prefill import LayerProfile, Prefill
from hybridkv.planning.prune import keep_order, pooled

CONTEXT_FLOOR = 0.2  # smallest claim of a head that is weighted by its context mass
SCALARS = 6  # int32 numbers a lane has beside its tables: counts of pages, tail page, tail fill, row of the basis


@dataclass(frozen=True)
class Costs:
    """Bytes of the parts of a cache, for one model, dtype and configuration."""

    page: int  # one page of keys and values
    summary: int  # the summary of one chunk: its key sketch, or its key bounds
    basis: int  # what a dynamic lane needs beside: principal directions, offset and step of the sketch
    entry: int = 4  # one page number in a table

    @classmethod
    def of(cls, config: HybridConfig, head_dim: int, dtype: torch.dtype) -> "Costs":
        page, rank = 2 * config.page_size * head_dim * dtype.itemsize, config.rank(head_dim)
        if config.retrieval == "bound":
            return cls(page, summary=2 * head_dim * dtype.itemsize, basis=0)
        return cls(page, summary=config.page_size * rank, basis=rank * head_dim * dtype.itemsize + 2 * rank * 4)


@dataclass(frozen=True)
class Plan:
    """What the lanes of one prompt keep. All tensors are (layers, H) on the CPU unless noted.

    Attributes:
        prunable: (T,) bool, the tokens that may be pruned or moved.
        page_size: tokens in a page.
        dynamic: lanes that retrieve chunks.
        pages: prompt pages that a step reads, the partly filled last one included.
        order: for each layer (H, T), tokens from the most to the least worth keeping; empty when all is kept.
        chunk_order: the prunable tokens in the order in which they fill chunks; None for that of the prompt.
    """

    prunable: Tensor
    page_size: int
    dynamic: Tensor
    pages: Tensor
    order: tuple[Tensor, ...] = ()
    chunk_order: Tensor | None = None

    @property
    def tokens(self) -> int:
        return self.prunable.numel()

    @property
    def whole_pages(self) -> int:
        """Pages of a lane that keeps everything."""
        return -(-self.tokens // self.page_size)

    @property
    def always_pages(self) -> int:
        """Pages of the tokens that every lane keeps."""
        return -(-int((~self.prunable).sum()) // self.page_size)

    @property
    def lane_chunks(self) -> int:
        """Chunks of a dynamic lane: what is left of the prompt beside its fixed pages, in whole pages."""
        return max(0, self.tokens - self.always_pages * self.page_size) // self.page_size

    @property
    def whole(self) -> Tensor:
        return self.pages >= self.whole_pages

    @property
    def n_chunks(self) -> Tensor:
        return self.dynamic * self.lane_chunks

    @property
    def n_fixed(self) -> Tensor:
        """Full pages that a step always reads."""
        fixed = torch.where(self.whole, self.tokens // self.page_size, self.pages)
        return torch.where(self.dynamic, self.always_pages, fixed)

    @property
    def fill(self) -> Tensor:
        """Prompt tokens in the tail page, which new tokens go on filling."""
        return (self.whole | self.dynamic) * (self.tokens % self.page_size)

    @property
    def n_retrieve(self) -> Tensor:
        return self.dynamic * (self.pages - self.n_fixed - (self.fill > 0).long())

    @property
    def attended(self) -> Tensor:
        """Prompt tokens that a step reads."""
        return (self.n_fixed + self.n_retrieve) * self.page_size + self.fill

    def step_bytes(self, costs: Costs) -> int:
        """Bytes of this prompt's cache that a step reads: what the budget promises to bound."""
        lanes = self.pages.numel()
        pages = int(self.pages.sum()) * costs.page
        summaries = int(self.n_chunks.sum()) * costs.summary + int(self.dynamic.sum()) * costs.basis
        entries = int((self.n_fixed + self.n_chunks).sum()) + lanes * (1 + SCALARS)  # one for the tail page
        return pages + summaries + entries * costs.entry


def full_bytes(tokens: int, lanes: int, costs: Costs, page_size: int) -> int:
    """Bytes of a plain full cache of this many tokens: no pages, no tables."""
    return tokens * lanes * costs.page // page_size


def full_plan(prefill: Prefill) -> Plan:
    """Keeps everything."""
    config, shape = prefill.config, (len(prefill.layers), prefill.layers[0].k.shape[0])
    plan = Plan(
        prefill.prunable.cpu(),
        config.page_size,
        dynamic=torch.zeros(shape, dtype=torch.bool),
        pages=torch.zeros(shape, dtype=torch.long),
        chunk_order=tile_order(prefill.prunable.cpu(), prefill.spans, config.page_size) if config.tiles else None,
    )
    return replace(plan, pages=torch.full(shape, plan.whole_pages))


def hybrid_plan(prefill: Prefill) -> Plan:
    """Static and dynamic heads within `config.budget`; static heads keep what the text points at.

    Raises:
        BudgetError: see `budgeted_plan`.
    """
    mass, overlap, focus = text_attention(prefill)
    weight = None
    if prefill.config.head_weight == "context":
        weight = mass.clamp(min=CONTEXT_FLOOR)
    return budgeted_plan(prefill, classify(mass, overlap, focus, prefill.config), static_scores(prefill), weight)


def known_plan(prefill: Prefill) -> Plan:
    """`hybrid_plan` from a prompt's `outline`, for heads that an offline profile classifies.

    All but the order of the tokens, which `layer_order` gives once a layer is read.
    """
    unknown = torch.zeros(len(prefill.layers), len(prefill.layers[0].k))
    return budgeted_plan(prefill, classify(unknown, unknown, unknown, prefill.config))


def layer_order(prefill: Prefill, layer: int) -> Tensor:
    """Tokens of a layer's heads from the most to the least worth keeping, (H, T)."""
    (score,) = static_scores(prefill, [prefill.layers[layer]])
    return keep_order(score, prefill.prunable)


def text_attention(prefill: Prefill) -> tuple[Tensor, Tensor, Tensor]:
    """What the prompt's profile says of every head: context mass, overlap and focus, (layers, H) on the CPU."""
    names = ("context_mass", "overlap", "focus")
    return tuple(torch.stack([getattr(layer, name) for layer in prefill.layers]).cpu() for name in names)


def neighbourhood_scores(
    prefill: Prefill, reduce: str, weight: float, layers: Sequence[LayerProfile] = ()
) -> list[Tensor]:
    """The `max` or `mean` attention that the prompt's text gives to each token's neighbourhood, (H, T) a layer."""
    config = prefill.config
    scores = (layer.score if reduce == "max" else layer.mean_score for layer in layers or prefill.layers)
    masked = (score.masked_fill(~prefill.prunable, 0.0) for score in scores)
    return [pooled(score, config.pool, weight, config.pool_side, prefill.spans) for score in masked]


def static_scores(prefill: Prefill, layers: Sequence[LayerProfile] = ()) -> list[Tensor]:
    """What each token is worth to a static head, (H, T) a layer; of some layers, or all."""
    return neighbourhood_scores(prefill, prefill.config.score, prefill.config.pool_weight, layers)


def budgeted_plan(
    prefill: Prefill, dynamic: Tensor, score: Sequence[Tensor] = (), weight: Tensor | None = None
) -> Plan:
    """The plan that spends `config.budget` on given kinds of heads.

    Args:
        dynamic: (layers, H) bool, heads that retrieve; a head whose budget holds the prompt keeps it whole instead.
        score: for each layer (H, T), how much a token is worth to a static head; may be left out without static heads.
        weight: (layers, H) positive claims of the heads; None for equal claims.

    Raises:
        BudgetError: the budget can't hold what must be kept, and `config.strict`.
    """
    config, key, everything = prefill.config, prefill.layers[0].k, full_plan(prefill)
    if config.budget == 1:
        return everything
    cap = everything.pages
    # A dynamic head needs a page to retrieve beside what it always reads; without one it is no dynamic head.
    needs = everything.always_pages + dynamic * (int(everything.tokens % config.page_size > 0) + 1)
    floor = needs.minimum(cap)

    costs = Costs.of(config, key.shape[-1], key.dtype)
    full = full_bytes(everything.tokens, cap.numel(), costs, config.page_size)
    # Charged up front, at least what `step_bytes` will count: every lane's table at its longest, and the summaries.
    overhead = cap.numel() * (everything.whole_pages + 1 + SCALARS) * costs.entry
    overhead += int(dynamic.sum()) * (everything.lane_chunks * costs.summary + costs.basis)
    total = int(config.budget * full - overhead) // costs.page
    if total < int(floor.sum()) and config.strict:
        least = math.ceil(100 * (int(floor.sum()) * costs.page + overhead) / full) / 100
        always = int((~everything.prunable).sum())
        raise BudgetError(
            f"a budget of {config.budget:g} can't be met: {always} of the {everything.tokens} prompt tokens (text, "
            f"sinks, recent) are kept in every head, and with chunk summaries and tables that takes {least:.2f} of the "
            f"full cache. Raise the budget to that, use the full cache, or give more pictures or context to prune."
        )
    weight = torch.ones(cap.shape) if weight is None else weight
    pages = allocate(max(total, int(floor.sum())), dynamic, weight, floor, cap, config.dynamic_weight)
    order = tuple(keep_order(s, prefill.prunable) for s in score)
    return replace(everything, dynamic=dynamic & (pages < cap), pages=pages, order=order)
