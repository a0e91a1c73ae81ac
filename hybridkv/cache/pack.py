"""Packing: which page every prompt token of every lane goes to. A lane's budget becomes its number of pages."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hybridkv.cache.capacity import Capacity
from hybridkv.planning.plan import Plan


@dataclass(frozen=True)
class Placement:
    """Where the prompts of a batch lie. Tables are (layers, B, H, ...) int32 on the CPU.

    Attributes:
        fixed: (layers, B, H, F) full pages that are always read. chunks: (layers, B, H, C) store pages.
        tail: page that new tokens fill. row: number of a dynamic lane among all, from 1; 0 for the others.
        next_page: first free page of the store, and of the rest.
        slots: slots[layer][b][h] are a lane's slots in the order of `lane_tokens`.
    """

    fixed: Tensor
    chunks: Tensor
    tail: Tensor
    row: Tensor
    next_page: tuple[int, int]
    slots: list[list[list[Tensor]]]


def place(plans: list[Plan], capacity: Capacity) -> Placement:
    """Hands out pages, one after the other, to every lane of every prompt."""
    shape = (plans[0].dynamic.shape[0], len(plans), plans[0].dynamic.shape[1])
    dynamic = torch.stack([plan.dynamic for plan in plans], dim=1)
    row = (dynamic.flatten().cumsum(0) * dynamic.flatten()).view(shape).int()
    fixed = torch.zeros(*shape, capacity.fixed, dtype=torch.int32)
    chunks = torch.zeros(*shape, max(1, capacity.chunks), dtype=torch.int32)
    tail = torch.zeros(shape, dtype=torch.int32)
    store, rest = 1, capacity.n_store  # page 0 is nobody's
    slots = [[[] for _ in plans] for _ in range(shape[0])]
    counts = [(plan.n_chunks.tolist(), plan.n_fixed.tolist(), plan.fill.tolist()) for plan in plans]
    offset = torch.arange(plans[0].page_size)
    for layer in range(shape[0]):
        for b, (n_chunks, n_fixed, fill) in enumerate(counts):
            for h in range(shape[2]):
                c, f = n_chunks[layer][h], n_fixed[layer][h]
                chunks[layer, b, h, :c] = torch.arange(store, store + c)
                fixed[layer, b, h, :f] = torch.arange(rest, rest + f)
                store, rest = store + c, rest + f
                if dynamic[layer, b, h]:  # the tail page, too, becomes a chunk one day
                    tail[layer, b, h], store = store, store + 1
                else:
                    tail[layer, b, h], rest = rest, rest + 1
                full = torch.cat((chunks[layer, b, h, :c], fixed[layer, b, h, :f])).long()
                last = int(tail[layer, b, h]) * len(offset) + offset[: fill[layer][h]]
                slots[layer][b].append(torch.cat(((full[:, None] * len(offset) + offset).flatten(), last)))
    return Placement(fixed, chunks, tail, row, (store, rest), slots)


def lane_tokens(plan: Plan, layer: int, order: Tensor | None = None) -> list[Tensor]:
    """Which prompt tokens each lane of a layer stores, in the order of its slots: chunks, fixed pages, tail page.

    Args:
        order: (H, T) tokens from the most to the least worth keeping, for a plan that does not know them.
    """
    if plan.order:
        order = plan.order[layer]
    size, device = plan.page_size, torch.device("cpu") if order is None else order.device
    prunable = plan.prunable.to(device)
    everything = torch.arange(plan.tokens, device=device)
    in_chunks = plan.lane_chunks * size
    in_tail = plan.tokens % size
    context = everything[prunable] if plan.chunk_order is None else plan.chunk_order.to(device)
    retrieved = torch.cat((everything[~prunable], context[in_chunks + in_tail :])).sort().values
    dynamic = torch.cat((context[:in_chunks], retrieved, context[in_chunks : in_chunks + in_tail]))
    tokens = []
    for head, (is_dynamic, whole, pages) in enumerate(
        zip(plan.dynamic[layer].tolist(), plan.whole[layer].tolist(), plan.pages[layer].tolist(), strict=True)
    ):
        if is_dynamic:
            tokens.append(dynamic)
        elif whole:
            tokens.append(everything)
        else:
            tokens.append(order[head, : pages * size].sort().values)
    return tokens
