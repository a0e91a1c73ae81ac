"""Packing: which page every prompt token of every lane goes to. A lane's budget becomes its number of pages."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hybridkv.cache.capacity import Capacity
from hybridkv.planning.plan import Plan
from hybridkv.planning.prefill import Prefill


@dataclass(frozen=True)
class Placement:
    """Where the prompts of a batch lie. Tables are (layers, B, H, ...) int32 on the CPU.

    Attributes:
        fixed: (layers, B, H, F) full pages that are always read. chunks: (layers, B, H, C) store pages.
        tail: page that new tokens fill. row: number of a dynamic lane among its layer's, from 1; 0 for the others.
        next_page: first free page of the store, and of the rest.
    """

    fixed: Tensor
    chunks: Tensor
    tail: Tensor
    row: Tensor
    next_page: tuple[int, int]


def place(plans: list[Plan], capacity: Capacity) -> Placement:
    """Hands out pages, one after the other, to every lane of every prompt: its full pages, then its tail page.

    The tail page of a dynamic lane lies in the store: it, too, becomes a chunk one day.
    """
    dynamic, n_chunks, n_fixed = (
        torch.stack([getattr(plan, name) for plan in plans], 1) for name in ("dynamic", "n_chunks", "n_fixed")
    )  # each (layers, B, H)

    def hand_out(first: int, full: Tensor, tails: Tensor, columns: int) -> tuple[Tensor, Tensor, int]:
        """Pages (layers, B, H, columns) and tail pages (layers, B, H) from number `first` on, and the next free one."""
        taken = (full + tails).flatten().cumsum(0).view_as(full)
        start = first + taken - full - tails
        column = torch.arange(columns)
        pages = torch.where(column < full[..., None], start[..., None] + column, 0)
        return pages.int(), torch.where(tails > 0, start + full, 0).int(), first + int(taken.flatten()[-1])

    chunks, store_tail, next_store = hand_out(1, n_chunks, dynamic.long(), max(1, capacity.chunks))
    fixed, other_tail, next_other = hand_out(capacity.n_store, n_fixed, (~dynamic).long(), capacity.fixed)
    row = (dynamic.flatten(1).cumsum(1).view_as(dynamic) * dynamic).int()
    return Placement(fixed, chunks, store_tail + other_tail, row, (next_store, next_other))


def lane_slots(placement: Placement, plan: Plan, layer: int, b: int) -> list[Tensor]:
    """Slots of each lane of a layer of prompt `b`, in the order of `lane_tokens`: chunks, fixed pages, tail page."""
    offset, slots = torch.arange(plan.page_size), []
    counts = (plan.n_chunks[layer].tolist(), plan.n_fixed[layer].tolist(), plan.fill[layer].tolist())
    for h, (c, f, fill) in enumerate(zip(*counts, strict=True)):
        full = torch.cat((placement.chunks[layer, b, h, :c], placement.fixed[layer, b, h, :f]))
        last = placement.tail[layer, b, h] * plan.page_size + offset[:fill]
        slots.append(torch.cat(((full[:, None] * plan.page_size + offset).flatten(), last)))
    return slots


def lane_tokens(plan: Plan, prefill: Prefill, layer: int) -> list[Tensor]:
    """Which prompt tokens each lane of a layer stores, in the order of its slots: chunks, fixed pages, tail page."""
    device, size, n_read = prefill.prunable.device, plan.page_size, plan.n_read[layer].tolist()
    everything = torch.arange(plan.tokens, device=device)
    dynamic, whole = plan.dynamic[layer].tolist(), plan.whole[layer].tolist()
    if any(dynamic):
        context = everything[prefill.prunable] if plan.chunk_order is None else plan.chunk_order.to(device)
        in_chunks, in_tail = plan.lane_chunks * size, plan.tokens % size
        fixed = torch.cat((everything[~prefill.prunable], context[in_chunks + in_tail :])).sort().values
        retrieving = torch.cat((context[:in_chunks], fixed, context[in_chunks : in_chunks + in_tail]))
    if not all(a or b for a, b in zip(dynamic, whole, strict=True)):
        order = plan.order(prefill, layer)
    tokens = []
    for head in range(len(dynamic)):
        if dynamic[head]:
            tokens.append(retrieving)
        elif whole[head]:
            tokens.append(everything)
        else:
            tokens.append(order[head, : n_read[head] * size].sort().values)
    return tokens


@dataclass(frozen=True)
class Kept:
    """What a prompt's plan leaves of one layer's keys and values.

    Attributes:
        k, v: (N, D), one lane after the other, each in the order of `lane_tokens`.
        tokens: `lane_tokens`, of each lane.
    """

    k: Tensor
    v: Tensor
    tokens: list[Tensor] = field(default_factory=list)


def keep(plan: Plan, prefill: Prefill, layer: int) -> Kept:
    """Prunes one layer, and forgets its dense keys and values."""
    tokens, read = lane_tokens(plan, prefill, layer), prefill.layers[layer]
    lengths = torch.tensor([len(t) for t in tokens])
    token = torch.cat(tokens)
    head = torch.arange(len(tokens)).repeat_interleave(lengths).to(token.device)
    prefill.layers[layer] = None
    return Kept(read.k[head, token], read.v[head, token], tokens)


def chunk_keys(plan: Plan, kept: Kept, layer: int) -> Tensor:
    """Keys of a layer's dynamic lanes that chunk summaries are made of, (N, T', D): chunks, then the tail page's."""
    dynamic = plan.dynamic[layer]
    lengths = torch.where(dynamic | plan.whole[layer], plan.tokens, plan.n_read[layer] * plan.page_size)
    lanes = [k for k, retrieves in zip(kept.k.split(lengths.tolist()), dynamic.tolist(), strict=True) if retrieves]
    keys = torch.stack(lanes)
    in_chunks, in_tail = plan.lane_chunks * plan.page_size, plan.tokens % plan.page_size
    return torch.cat((keys[:, :in_chunks], keys[:, plan.tokens - in_tail :]), 1)
