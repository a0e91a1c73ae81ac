"""Packing: which page every prompt token of every lane goes to. A lane's budget becomes its number of pages."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hybridkv.cache.capacity import Capacity
from hybridkv.planning.plan import Plan
from hybridkv.planning.prefill import Prefill


@dataclass(frozen=True)
class Placement:
    """Where the prompts of a batch lie: one run of pages for each lane. Tables are (layers, B, H) int32 on the CPU.

    Pages of the pool are numbers in the one that the layer lies in.

    Attributes:
        first: a dynamic lane's first page in the store, where its chunks lie, then its tail pages.
        own, n_shared: of a lane that shares its first `n_shared` chunks, these lie where `first` says, in another's
            run, and the others in its own, which would begin at page `own` if it had all of them. Else first and 0.
        start: first page of a lane's run in the pool: frames if the store is on the host, then pages that are fixed.
        n_full: pages of the run that a step reads whole.
        tail: page that new tokens fill; it lies behind those that are read whole.
        ring, end: when page `end` would be the next tail, it is page `ring`.
        row: number of a dynamic lane among its layer's, from 1; 0 for the others.
        before: what a page of the store has to be lowered by to be a page of the pool; 0 if the store is on the host.
    """

    first: Tensor
    own: Tensor
    n_shared: Tensor
    start: Tensor
    n_full: Tensor
    tail: Tensor
    ring: Tensor
    end: Tensor
    row: Tensor
    before: Tensor


def runs(pages: Tensor) -> Tensor:
    """Where each lane's pages begin, (layers, B, H), one lane's behind those of the one before."""
    return pages.flatten().cumsum(0).view_as(pages) - pages


def place(plans: list[Plan], capacity: Capacity, new_tokens: int) -> Placement:
    """Hands out runs of pages, one after the other, to every lane of every prompt, with room for its new tokens.

    The tail page of a dynamic lane lies in the store: it, too, becomes a chunk one day. Where the store is on the host,
    it lies in the pool as well, and the next one takes its place.
    """
    host = capacity.host
    stored, kept = (torch.stack(part, 1) for part in zip(*(plan.lane_pages(new_tokens) for plan in plans), strict=True))
    dynamic, n_chunks, n_fixed, fill, n_retrieve, shares, n_shared = (
        torch.stack([getattr(plan, name) for plan in plans], 1)
        for name in ("dynamic", "n_chunks", "n_fixed", "fill", "n_retrieve", "shares", "n_shared")
    )  # each (layers, B, H)

    run, start, before = (torch.zeros_like(stored) for _ in range(3))
    in_stores = 0  # of the pools before this one
    for pool in range(capacity.pools):
        mine = torch.tensor([other == pool for other in capacity.pool])
        its = int(stored[mine].sum())
        run[mine] = 1 + in_stores + runs(stored[mine])
        start[mine] = 1 + its * (not host) + runs(kept[mine])
        before[mine] = in_stores * (not host)
        in_stores += its
    run = run * dynamic
    own, end_of_run = run - n_shared, run + stored
    first = torch.where(n_shared > 0, run.gather(1, shares.clamp(min=0)), run)
    n_full = n_fixed + n_retrieve * host
    in_store = dynamic & (not host)
    tail = torch.where(in_store, own + n_chunks - before, start + n_full)
    # A page that holds tokens of the prompt is not written over, but for what lies in the store, too.
    ring = torch.where(dynamic, tail, tail + (fill > 0))
    end = torch.where(in_store, end_of_run - before, start + kept)
    row = dynamic.flatten(1).cumsum(1).view_as(dynamic) * dynamic
    return Placement(*(table.int() for table in (first, own, n_shared, start, n_full, tail, ring, end, row, before)))


@dataclass(frozen=True)
class Slots:
    """Where one layer of a prompt goes: for each kept token its slot in the pool and in the store, -1 for none.

    What a lane shares has none: it is there already.
    """

    pool: Tensor
    store: Tensor


def layer_slots(placement: Placement, plan: Plan, layer: int, b: int) -> Slots:
    """Slots of a layer's kept tokens, lane by lane in the order of `lane_tokens`: chunks, fixed pages, tail page."""
    size, pool, store = plan.page_size, [], []
    offset = torch.arange(size)
    counts = (plan.n_chunks, plan.n_fixed, plan.fill, placement.n_full[:, b], placement.own[:, b])
    counts = (*counts, *(getattr(placement, name)[:, b] for name in ("n_shared", "start", "tail", "before")))
    for c, f, fill, n_full, own, n_shared, start, tail, before in zip(
        *(t[layer].tolist() for t in counts), strict=True
    ):
        chunks = (own - before) * size + torch.arange(c * size)
        chunks[: n_shared * size] = -1
        fixed = (start + n_full - f) * size + torch.arange(f * size)
        last = tail * size + offset[:fill]
        if c == 0 and own == 0:
            pool.append(torch.cat((fixed, last)))
            store.append(torch.full_like(pool[-1], -1))
        elif plan.host:
            nowhere = torch.full_like(chunks, -1)
            pool.append(torch.cat((nowhere, fixed, last)))
            behind = (own + c) * size + offset[:fill]
            store.append(torch.cat((chunks, torch.full_like(fixed, -1), behind)))
        else:
            pool.append(torch.cat((chunks, fixed, last)))
            store.append(torch.full_like(pool[-1], -1))
    return Slots(torch.cat(pool), torch.cat(store))


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
        q: (Hq, D), the last query of the prompt's window; None if it has none.
        fits: sketches of the same settled chunks, by head and rank, to which new ones are added; None where nobody
            keeps them.
    """

    k: Tensor
    v: Tensor
    tokens: list[Tensor] = field(default_factory=list)
    q: Tensor | None = None
    fits: dict | None = None


def keep(plan: Plan, prefill: Prefill, layer: int) -> Kept:
    """Prunes one layer, and forgets its dense keys and values."""
    tokens, read = lane_tokens(plan, prefill, layer), prefill.layers[layer]
    lengths = torch.tensor([len(t) for t in tokens])
    token = torch.cat(tokens)
    head = torch.arange(len(tokens)).repeat_interleave(lengths).to(token.device)
    prefill.layers[layer] = None
    q = read.q[:, -1].clone() if read.q.shape[1] else None
    return Kept(read.k[head, token], read.v[head, token], tokens, q, prefill.fits(plan, layer))


def chunk_keys(plan: Plan, kept: Kept, layer: int) -> Tensor:
    """Keys of a layer's dynamic lanes that chunk summaries are made of, (N, T', D): chunks, then the tail page's."""
    dynamic = plan.dynamic[layer]
    lengths = torch.where(dynamic | plan.whole[layer], plan.tokens, plan.n_read[layer] * plan.page_size)
    lanes = [k for k, retrieves in zip(kept.k.split(lengths.tolist()), dynamic.tolist(), strict=True) if retrieves]
    keys = torch.stack(lanes)
    in_chunks, in_tail = plan.lane_chunks * plan.page_size, plan.tokens % plan.page_size
    return torch.cat((keys[:, :in_chunks], keys[:, plan.tokens - in_tail :]), 1)
