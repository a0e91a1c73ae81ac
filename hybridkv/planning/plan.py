"""The plan: what every lane (one KV head of one sequence) of a prompt keeps, and what that costs.

A lane is one of three things:

- *whole*: its budget holds the prompt, so it keeps every token;
- *static*: it keeps the `n_read * page_size` tokens that the text points at, and drops the rest;
- *dynamic*: it keeps everything. Tokens that are not prunable, rounded up to full pages, are *fixed*: read at every
  step. The prunable rest is cut into chunks of one page, of which a step reads the best `n_retrieve`.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from hybridkv.cache.capacity import ROW_SCALARS, SCALARS, SHARED, Capacity, Costs, round_down
from hybridkv.planning.budget import BudgetError, allocate
from hybridkv.planning.classify import classify, retrieving_layers
from hybridkv.planning.prefill import Prefill
from hybridkv.planning.prune import keep_order, pooled, tile_order

Score = Callable[[Prefill, int], Tensor]  # (H, T), how much each token of a layer is worth to a static head


@dataclass(frozen=True)
class Plan:
    """What the lanes of one prompt keep. All tensors are (layers, H) on the CPU unless noted.

    Attributes:
        prunable: (T,) bool, the tokens that may be pruned or moved.
        page_size: tokens in a page. head_dim: numbers of a key.
        dynamic: lanes that retrieve chunks.
        retrieving: (layers,) int64, how many lanes of each layer may be dynamic, whatever the prompt: the graph has
            room for so many. Where it is 0 it has no retrieval.
        n_read: prompt pages that a step reads, the partly filled last one included.
        score: what static lanes keep first; asked for layer by layer, when a layer is packed. None if all is kept.
        chunk_order: the prunable tokens in the order in which they fill chunks; None for that of the prompt.
        no_room: everything is kept, against the budget, since what must be kept takes as much as the full cache.
        host: chunks of dynamic lanes are in host memory (`HybridConfig.store`), and the pool has frames for them.
        keep_new: see `HybridConfig.keep_new`.
        owner: (layers, H) int64, the earlier prompt of the batch whose store holds this lane's settled chunks, too, -1
            for none; None for none at all. See `share.py`.
    """

    prunable: Tensor
    page_size: int
    head_dim: int
    dynamic: Tensor
    retrieving: Tensor
    n_read: Tensor
    score: Score | None = None
    chunk_order: Tensor | None = None
    no_room: bool = False
    host: bool = False
    keep_new: int | None = None
    owner: Tensor | None = None

    def order(self, prefill: Prefill, layer: int) -> Tensor:
        """Tokens of a layer's heads from the most to the least worth keeping, (H, T)."""
        return keep_order(self.score(prefill, layer), prefill.prunable)

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
    def settled_chunks(self) -> int:
        """Those of them that do not depend on how long the question is: all, or all but one."""
        return max(1, (int(self.prunable.sum()) - self.page_size + 1) // self.page_size)

    @cached_property
    def settled_tokens(self) -> Tensor:
        """Their tokens, in the order in which they fill them."""
        context = self.prunable.nonzero()[:, 0] if self.chunk_order is None else self.chunk_order
        return context[: self.settled_chunks * self.page_size].cpu()

    @cached_property
    def settled_name(self) -> str:
        """Equal for equal ones."""
        return hashlib.sha256(self.settled_tokens.numpy().tobytes()).hexdigest()

    @property
    def shares(self) -> Tensor:
        """`owner`, -1 for none."""
        return torch.full_like(self.n_read, -1) if self.owner is None else self.owner

    @property
    def n_shared(self) -> Tensor:
        """Chunks that lie in another prompt's store."""
        return (self.shares >= 0) * self.settled_chunks

    @property
    def whole(self) -> Tensor:
        return self.n_read >= self.whole_pages

    @property
    def n_chunks(self) -> Tensor:
        return self.dynamic * self.lane_chunks

    @property
    def n_fixed(self) -> Tensor:
        """Full pages that a step always reads."""
        fixed = torch.where(self.whole, self.tokens // self.page_size, self.n_read)
        return torch.where(self.dynamic, self.always_pages, fixed)

    @property
    def fill(self) -> Tensor:
        """Prompt tokens in the tail page, which new tokens go on filling."""
        return (self.whole | self.dynamic) * (self.tokens % self.page_size)

    @property
    def n_retrieve(self) -> Tensor:
        return self.dynamic * (self.n_read - self.n_fixed - (self.fill > 0).long())

    @property
    def attended(self) -> Tensor:
        """Prompt tokens that a step reads."""
        return (self.n_fixed + self.n_retrieve) * self.page_size + self.fill

    def tails(self, new_tokens: int | None) -> tuple[Tensor, Tensor]:
        """Pages that a lane's tail takes in all, one after the other: in the store, and in the pool of a static lane.

        The one it starts with, and one for each that `new_tokens` close; in the pool no more than `keep_new` asks for.
        None: those that hold tokens of the prompt.
        """
        begun = (self.fill > 0).long()
        if new_tokens is None:
            return begun, begun
        tails = (self.fill + new_tokens) // self.page_size + 1
        if self.keep_new is None:
            return tails, tails
        return tails, tails.minimum(begun + -(-self.keep_new // self.page_size) + 1)

    def lane_columns(self, new_tokens: int | None) -> Tensor:
        """Chunks that each lane may have, wherever they lie, its tail among them; see `tails`."""
        return self.dynamic * (self.n_chunks + self.tails(new_tokens)[0])

    def lane_pages(self, new_tokens: int | None) -> tuple[Tensor, Tensor]:
        """Pages of each lane in the store, and in the rest of the pool, with room for `new_tokens`; see `tails`."""
        stored, kept = self.tails(new_tokens)
        store = self.lane_columns(new_tokens) - self.n_shared
        if self.host:  # frames, and one page for the tail: when that is full it lies in the store already
            return store, self.n_retrieve + self.n_fixed + torch.where(self.dynamic, stored.clamp(max=1), kept)
        return store, self.n_fixed + ~self.dynamic * kept

    def lane_full(self, new_tokens: int | None) -> Tensor:
        """Most pages of each lane's run that a step reads whole."""
        return self.lane_pages(new_tokens)[1].maximum(self.n_fixed)

    def step_bytes(self, costs: Costs) -> int:
        """Bytes of this prompt's cache that a step reads."""
        pages, dynamic = int(self.n_read.sum()) * costs.page, int(self.dynamic.sum())
        summaries = int(self.n_chunks.sum()) * costs.summary + dynamic * costs.basis
        rows = dynamic * (ROW_SCALARS + SHARED * self.host)
        numbers = self.n_read.numel() * SCALARS + rows + self.host * int(self.n_retrieve.sum())
        return pages + summaries + numbers * costs.entry

    def resident_bytes(self, costs: Costs) -> int:
        """Bytes that a cache made for this prompt holds on the device, every tensor of it, room for new tokens apart.

        The arithmetic is that of the tensors' sizes: rounding, spare pages and all tables are in it.
        """
        return Capacity.of([self], None).device_bytes(costs, self.dynamic.shape[1])

    def budget_bytes(self, costs: Costs) -> int:
        """What the budget bounds: what the device holds, or, while the store is there as well, what a step reads."""
        return self.resident_bytes(costs) if self.host else self.step_bytes(costs)


def costs_of(prefill: Prefill) -> Costs:
    return Costs.of(prefill.config, prefill.like.shape[-1], prefill.like.dtype)


def full_bytes(tokens: int, lanes: int, costs: Costs, page_size: int) -> int:
    """Bytes of a plain full cache of this many tokens: no pages, no tables."""
    return tokens * lanes * costs.page // page_size


def full_plan(prefill: Prefill) -> Plan:
    """Keeps everything."""
    config, prunable = prefill.config, prefill.prunable.cpu()
    dynamic = torch.zeros(prefill.shape, dtype=torch.bool)
    plan = Plan(
        prunable,
        config.page_size,
        prefill.like.shape[-1],
        dynamic,
        retrieving=dynamic.sum(1),
        n_read=dynamic.long(),
        chunk_order=tile_order(prunable, prefill.spans, config.page_size) if config.tiles else None,
        host=config.on_host(prefill.like.device),
        keep_new=config.keep_new,
    )
    return replace(plan, n_read=torch.full(prefill.shape, plan.whole_pages))


def hybrid_plan(prefill: Prefill) -> Plan:
    """Static and dynamic heads within `config.budget`; static heads keep what the text points at.

    Raises:
        BudgetError: see `budgeted_plan`.
    """
    layers = retrieving_layers(prefill)
    dynamic = classify(prefill, layers)
    known = prefill.config.classifier == "profile"  # the same heads for every prompt
    room = dynamic.sum(1) if known else layers * dynamic.shape[1]
    return budgeted_plan(prefill, dynamic, static_score, retrieving=room)


def neighbourhood_score(prefill: Prefill, layer: int, reduce: str, weight: float) -> Tensor:
    """The `max` or `mean` attention that the prompt's text gives to each token's neighbourhood, (H, T)."""
    config, read = prefill.config, prefill.layers[layer]
    score = (read.score if reduce == "max" else read.mean_score).masked_fill(~prefill.prunable, 0.0)
    return pooled(score, config.pool, weight, config.pool_side, prefill.spans)


def static_score(prefill: Prefill, layer: int) -> Tensor:
    """What each token is worth to a static head of the method, (H, T)."""
    return neighbourhood_score(prefill, layer, prefill.config.score, prefill.config.pool_weight)


def least_pages(everything: Plan, dynamic: Tensor) -> Tensor:
    """Pages, (layers, H), without which a lane could not hold what is always kept.

    A dynamic head needs one to retrieve beside what it always reads; without it it is no dynamic head.
    """
    has_tail = int(everything.tokens % everything.page_size > 0)
    return (everything.always_pages + dynamic * (has_tail + 1)).minimum(everything.n_read)


def budgeted_plan(
    prefill: Prefill,
    dynamic: Tensor,
    score: Score | None = None,
    weight: Tensor | None = None,
    retrieving: Tensor | None = None,
) -> Plan:
    """The plan that spends `config.budget` on given kinds of heads.

    Args:
        dynamic: (layers, H) bool, heads that retrieve; a head whose budget holds the prompt keeps it whole instead.
        score: how much a token is worth to a static head; may be left out without static heads.
        weight: (layers, H) positive claims of the heads; None for equal claims.
        retrieving: (layers,) int64, how many heads of each layer may be dynamic in any prompt; None for all heads.

    Raises:
        BudgetError: the budget can't hold what must be kept, and `config.strict`.
    """
    config, everything = prefill.config, full_plan(prefill)
    if config.budget == 1:
        return everything
    costs, cap, floor = costs_of(prefill), everything.n_read, least_pages(everything, dynamic)
    full = full_bytes(everything.tokens, cap.numel(), costs, config.page_size)

    def spend(pages: Tensor) -> Plan:
        ours = dynamic & (pages < cap)
        room = torch.full(dynamic.shape[:1], dynamic.shape[1]) if retrieving is None else retrieving
        return replace(everything, dynamic=ours, retrieving=room * dynamic.any(), n_read=pages, score=score)

    def rounded(total: int) -> int:
        """As many pages, or fewer, that with the null page make a pool of a size that is not rounded up."""
        return round_down(total + 1) - 1 if everything.host else total

    weight = torch.ones(cap.shape) if weight is None else weight
    least, allowed = spend(floor), int(config.budget * full)
    page = costs.page + everything.host * costs.entry
    sizes = Capacity.of([least], None)
    charged = sizes.pools * sizes.n_pages - 1 if everything.host else int(floor.sum())
    total = rounded(charged + (allowed - least.budget_bytes(costs)) // page)
    while total > int(floor.sum()):
        plan = spend(allocate(total, dynamic, weight, floor, cap, config.dynamic_weight))
        if plan.budget_bytes(costs) <= allowed:
            return plan
        total = rounded(total - 1)
    needed = least.budget_bytes(costs) / full
    if needed >= 1:
        return replace(everything, no_room=True)
    if needed > config.budget and config.strict:
        always = int((~everything.prunable).sum())
        raise BudgetError(
            f"a budget of {config.budget:g} can't be met: {always} of the {everything.tokens} prompt tokens (text, "
            f"sinks, recent) are kept in every head, and with chunk summaries and tables that takes "
            f"{math.ceil(100 * needed) / 100:.2f} of the full cache. Raise the budget to that, use the full cache, "
            f"or give more pictures or context to prune."
        )
    return least


def check_plan(plan: Plan, prefill: Prefill) -> None:
    """Refuses what a policy may get wrong, so that policies are compared on equal terms.

    Raises:
        ValueError: it is no plan for this prompt, or breaks its rules.
        BudgetError: it spends more than `config.budget`, and `config.strict`.
    """
    if not isinstance(plan, Plan):
        raise ValueError(f"a policy must return a Plan, got {type(plan).__name__}")
    config, everything = prefill.config, full_plan(prefill)

    def check(ok: bool, message: str) -> None:
        if not ok:
            raise ValueError(f"the policy's plan can't be used: {message}")

    check(plan.page_size == config.page_size, f"page_size is {plan.page_size}, the configuration's {config.page_size}")
    check(torch.equal(plan.prunable, everything.prunable), "prunable is not the prompt's")
    check(plan.head_dim == everything.head_dim, f"head_dim is {plan.head_dim}, the model's {everything.head_dim}")
    check(plan.host == everything.host, "host is not what config.store says: start from full_plan(prefill)")
    for name, kind in (("dynamic", torch.bool), ("n_read", torch.int64)):
        table = getattr(plan, name)
        fits = table.dtype == kind and table.shape == prefill.shape and table.device.type == "cpu"
        check(fits, f"{name} must be {kind} {prefill.shape} on the CPU, got {table.dtype} {tuple(table.shape)}")
    check(plan.retrieving.shape == prefill.shape[:1], "retrieving must be a number for each layer")
    check(
        bool((plan.dynamic.sum(1) <= plan.retrieving).all()), "a layer has more dynamic heads than may retrieve there"
    )
    low = (plan.n_read < least_pages(everything, plan.dynamic)).sum()
    check(not low, f"{low} heads have too few pages for the tokens that every head keeps")
    check(not (plan.n_read > everything.n_read).any(), "a head has more pages than the prompt")
    check(not (plan.dynamic & plan.whole).any(), "a head that keeps everything needs no retrieval")
    check(plan.score is not None or bool((plan.whole | plan.dynamic).all()), "static heads need a score")
    costs = costs_of(prefill)
    spent = plan.budget_bytes(costs) / full_bytes(plan.tokens, plan.n_read.numel(), costs, plan.page_size)
    if spent > config.budget < 1 and config.strict and not plan.no_room:
        raise BudgetError(f"the policy's plan takes {spent:.3f} of the full cache, the budget is {config.budget:g}")
