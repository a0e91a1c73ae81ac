"""The cache: one page pool for all layers, lanes and sequences, and the tables that say who reads what.

    cache = HybridCache(Capacity.of(plans, new_tokens), len(plans), prefills[0])
    cache.load(prefills, plans, new_tokens)
    out = cache[layer](q, k, v)  # inside the compiled step, for every layer
    cache.advance(active)  # once at the end of the step

A decoding step only reads and writes tensors of fixed size: nothing depends on a value, so nothing synchronises or
recompiles, and another prompt is loaded into the same tensors.
"""

import weakref
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from hybridkv.cache.attention import attend_pages
from hybridkv.cache.bounds import KeyBounds
from hybridkv.cache.capacity import Capacity
from hybridkv.cache.exact import ExactKeys
from hybridkv.cache.pack import Kept, Placement, chunk_keys, keep, lane_slots, place
from hybridkv.cache.recording import Recording
from hybridkv.cache.retrieve import best_chunks
from hybridkv.cache.sketch import KeySketch
from hybridkv.planning.plan import Costs, Plan, full_bytes
from hybridkv.planning.prefill import Prefill


@dataclass(frozen=True)
class CacheBytes:
    """What a loaded cache costs, in bytes, for the prompts of all its sequences unless noted.

    Attributes:
        full: a plain full cache of the prompts.
        resident: held on the device: pages taken for the prompts, their chunk summaries, and every other tensor whole.
        step: read by one decoding step; what the budget bounds.
        new: pages and summaries taken for generated tokens, on top of `resident`.
        allocated: all tensors, spare pages included.
    """

    full: int
    resident: int
    step: int
    new: int
    allocated: int


IN_ROWS = ("n_chunks", "n_retrieve")  # what a plan says of dynamic lanes only


def of(layer: Tensor, table: Tensor) -> Tensor:
    """A layer's part of a table, as a tensor of its own."""
    return table.index_select(0, layer.view(1))[0]


def write_behind(table: Tensor, count: Tensor, value: Tensor) -> None:
    """Writes value (N, L) behind the first `count` (N, L) entries of each line of a table (N, L, columns), in place."""
    columns = table.shape[2]
    start = torch.arange(count.numel(), device=table.device) * columns
    table.view(-1).index_copy_(0, start + count.flatten().clamp(max=columns - 1), value.flatten().int())


class CacheLayer(nn.Module):
    """One layer of a cache: what takes the place of attention in a decoding step.

    A module, since `torch.compile` traces one layer for all only if what differs between them are modules and tensors.
    (Layers that retrieve and layers that do not are two graphs.)

    Args:
        nth: number of the layer among those that retrieve; None if it does not.
    """

    def __init__(self, cache: "HybridCache", layer: int, nth: int | None, device: torch.device):
        super().__init__()
        self.cache = weakref.ref(cache)  # which owns this layer: a cycle would keep a dropped cache's memory
        self.retrieves = nth is not None
        self.register_buffer("layer", torch.tensor(layer, device=device), persistent=False)
        self.register_buffer("nth", torch.tensor(nth or 0, device=device), persistent=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `HybridCache.attend`."""
        return self.cache().attend(self.layer, self.nth if self.retrieves else None, q, k, v)


class HybridCache(nn.Module):
    """See the module. Sizes follow `capacity`; shapes, dtype and device follow a record of the same model.

    Tables of all lanes are (layers, L, ...). Those of dynamic lanes are (N, R, ...): N layers that retrieve, R rows in
    each, one for each of its dynamic lanes; `lane` says which one a row is, and is L for rows that are not used.

    With `record`, what is kept and retrieved is written down: see `recording.py`.
    """

    def __init__(self, capacity: Capacity, batch: int, like: Prefill, record: bool = False):
        super().__init__()
        config, key = like.config, like.like
        (layers, heads), dim = like.shape, key.shape[-1]
        self.config, self.capacity, self.batch, self.heads = config, capacity, batch, heads
        self.page_size = config.page_size
        self.costs = Costs.of(config, dim, key.dtype)
        retrieving = [layer for layer in range(layers) if capacity.retrieving[layer]]
        lanes, rows = (layers, batch * heads), (len(retrieving), capacity.rows)

        def buffer(name: str, *shape: int, dtype: torch.dtype = torch.int32) -> None:
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=key.device), persistent=False)

        slots = capacity.n_pages * self.page_size
        buffer("keys", 1, 1, slots, dim, dtype=key.dtype)
        buffer("values", 1, 1, slots, dim, dtype=key.dtype)
        buffer("fixed", *lanes, capacity.fixed)
        for name in ("n_fixed", "tail", "fill", "row"):  # as many as plan.SCALARS
            buffer(name, *lanes)
        buffer("chunks", *rows, capacity.chunks)
        for name in ("n_chunks", "n_retrieve", "lane"):  # as many as plan.ROW_SCALARS
            buffer(name, *rows)
        self.register_buffer(
            "retrieving", torch.tensor(retrieving, dtype=torch.int64, device=key.device), persistent=False
        )
        buffer("next_page", 2)  # the first free page of the store, and of the rest
        nth = {layer: n for n, layer in enumerate(retrieving)}
        self.layers = nn.ModuleList(CacheLayer(self, layer, nth.get(layer), key.device) for layer in range(layers))
        summary = {"sketch": KeySketch, "bound": KeyBounds, "exact": ExactKeys}[config.retrieval]
        self.summary = summary(capacity.n_store, len(retrieving) * capacity.rows, dim, config, key)
        self.recording = Recording((*rows, capacity.retrieve), key.device) if record else None
        self._plans: list[Plan] = []
        self._placement: Placement | None = None

    def __getitem__(self, layer: int) -> "CacheLayer":
        return self.layers[layer]

    def attend(self, layer: Tensor, nth: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One layer's attention in a decoding step: appends one token, then reads the pages that the plan lists.

        Args:
            layer: () int64, a tensor so that all layers compile to the same graph.
            nth: () int64, its number among those that retrieve; None if it does not.
            q: (B, Hq, 1, D). k, v: (B, H, 1, D). Positions already applied to q and k.

        Returns:
            (B, Hq, 1, D)
        """
        q = rearrange(q, "b (h g) 1 d -> (b h) 1 g d", h=self.heads)
        slots = (of(layer, self.tail) * self.page_size + of(layer, self.fill)).long()  # (L,)
        self.keys.index_copy_(2, slots, rearrange(k, "b h 1 d -> 1 1 (b h) d"))
        self.values.index_copy_(2, slots, rearrange(v, "b h 1 d -> 1 1 (b h) d"))
        if nth is not None:
            self._summarise(layer, nth, rearrange(k, "b h 1 d -> (b h) d"))
        pages, n_pages = self._to_read(layer, nth, q[:, 0])
        out = attend_pages(q, self.keys, self.values, pages, n_pages, self.tail, self.fill, layer, self.page_size)
        return rearrange(out, "(b h) 1 g d -> b (h g) 1 d", b=self.batch)

    def _rows(self, nth: Tensor) -> Tensor:
        """Numbers (R,) of a retrieving layer's rows among those of all layers."""
        return nth * self.capacity.rows + torch.arange(self.capacity.rows, device=nth.device)

    def _summarise(self, layer: Tensor, nth: Tensor, k: Tensor) -> None:
        """Adds k (L, D) to the chunk summaries of the tail pages of lanes that have any.

        (All layers at once, at the end of a step, would be fewer calls, but there torch 2.13 reads keys that the
        compiled regions of the layers have not written yet.)
        """
        lane = of(nth, self.lane)
        page, fill = (F.pad(of(layer, table), (0, 1)).index_select(0, lane) for table in (self.tail, self.fill))
        self.summary.append(k.index_select(0, lane.clamp(max=len(k) - 1)), page.long(), fill, self._rows(nth))

    def _to_read(self, layer: Tensor, nth: Tensor | None, q: Tensor) -> tuple[Tensor, Tensor]:
        """Pages (L, P) that a step reads whole, those retrieved for q (L, G, D) first, and how many (L,) there are."""
        fixed, n_fixed = of(layer, self.fixed), of(layer, self.n_fixed)
        if nth is None:
            return fixed, n_fixed
        asking = q.index_select(0, of(nth, self.lane).clamp(max=len(q) - 1))  # (R, G, D)
        chunks, n_chunks, n_retrieve = (of(nth, table) for table in (self.chunks, self.n_chunks, self.n_retrieve))
        best = best_chunks(self.summary, asking, chunks, n_chunks, self._rows(nth), n_retrieve, self.capacity.retrieve)
        if self.recording is not None:
            self.recording.note(nth, best)
        found = self._fetch(best)
        row = of(layer, self.row)
        mine = (row - 1).clamp(min=0)
        k = torch.where(row > 0, n_retrieve.index_select(0, mine), 0)  # (L,)
        column = torch.arange(found.shape[1] + fixed.shape[1], device=q.device)
        from_found = found.index_select(0, mine).gather(1, column.clamp(max=found.shape[1] - 1).expand(len(q), -1))
        from_fixed = fixed.gather(1, (column - k[:, None]).clamp(0, fixed.shape[1] - 1))
        return torch.where(column < k[:, None], from_found, from_fixed), n_fixed + k

    def _fetch(self, pages: Tensor) -> Tensor:
        """Where the pool holds these store pages. The store is part of the pool, so they are there already."""
        return pages

    def _of_rows(self, table: Tensor) -> Tensor:
        """What a table of all lanes, (layers, L), says of the dynamic ones: (N, R); 0 for rows that are not used."""
        return F.pad(table.index_select(0, self.retrieving), (0, 1)).gather(1, self.lane.long())

    def advance(self, active: Tensor) -> None:
        """Counts the token that every lane of the active sequences, (B,) bool, just appended.

        A full tail page is closed: it joins the lane's fixed pages, or its chunks if the lane retrieves, and the next
        free page becomes the tail. A sequence that is not active writes over its last slot until it is replaced.
        """
        retrieves = self.row > 0  # (layers, L), as everything here
        fill = self.fill + active.repeat_interleave(self.heads)
        closed = fill == self.page_size
        tail, taken = self.tail, []
        for region, closing in enumerate((closed & retrieves, closed & ~retrieves)):
            nth = closing.flatten().cumsum(0).view_as(closing)
            tail = torch.where(closing, self.next_page[region] + nth - 1, tail)
            taken.append(closing.sum())
        self.next_page.add_(torch.stack(taken))
        self.fill.copy_(torch.where(closed, 0, fill))
        self.tail.copy_(tail)
        # Behind the last valid entry of a table lies the tail page, which closing makes valid.
        self.n_fixed.add_(closed & ~retrieves)
        if self.capacity.retrieve:
            self.n_chunks.add_(self._of_rows(closed.int()))
        self._note_tails()

    def _note_tails(self) -> None:
        """Writes every lane's tail page behind the last valid entry of its table."""
        # A dynamic lane has no use for it in its table of fixed pages: there it gets the null page.
        write_behind(self.fixed, self.n_fixed, torch.where(self.row == 0, self.tail, 0))
        if self.capacity.retrieve:
            write_behind(self.chunks, self.n_chunks, self._of_rows(self.tail))

    @torch.no_grad()
    def load(self, prefills: list[Prefill], plans: list[Plan], new_tokens: int) -> None:
        """Packs prompts that are read, in place of whatever the cache held. Their dense keys and values are freed.

        Args:
            prefills, plans: one for each sequence of the batch.
            new_tokens: tokens that may be generated; room for them is checked here.
        """
        if len(prefills) != len(plans):
            raise ValueError(f"{len(prefills)} prefills do not go with {len(plans)} plans")
        self.reserve(plans, new_tokens)
        for layer in range(len(self.layers)):
            for b, (plan, prefill) in enumerate(zip(plans, prefills, strict=True)):
                self.pack(b, layer, keep(plan, prefill, layer))

    @torch.no_grad()
    def reserve(self, plans: list[Plan], new_tokens: int) -> None:
        """Makes room for prompts and sets all tables; `pack` then fills in what the pages hold, layer by layer."""
        if len(plans) != self.batch:
            raise ValueError(f"a cache for {self.batch} sequences got {len(plans)} plans")
        if not self.capacity.covers(Capacity.of(plans, new_tokens)):
            raise ValueError("these prompts do not fit: make a cache with Capacity.of(plans, new_tokens)")
        self._plans, self._placement = list(plans), place(plans, self.capacity)
        tables = {name: torch.stack([getattr(p, name) for p in plans], 1) for name in ("n_fixed", "fill", *IN_ROWS)}
        tables |= {name: getattr(self._placement, name) for name in ("fixed", "tail", "row", "chunks")}
        tables = {name: rearrange(table, "l b h ... -> l (b h) ...") for name, table in tables.items()}
        for name in ("n_fixed", "fill", "fixed", "tail", "row"):
            getattr(self, name).copy_(tables[name])
        self.lane.fill_(self.batch * self.heads)
        for name in (*IN_ROWS, "chunks"):
            getattr(self, name).zero_()
        for n, layer in enumerate(self.retrieving.tolist()):
            lane = tables["row"][layer].nonzero()[:, 0]
            self.lane[n, : len(lane)] = lane.to(self.lane)
            for name in (*IN_ROWS, "chunks"):
                getattr(self, name)[n, : len(lane)] = tables[name][layer, lane].to(self.lane)
        self.next_page.copy_(torch.tensor(self._placement.next_page))
        self._note_tails()
        if self.recording is not None:
            self.recording.begin(plans)

    @torch.no_grad()
    def pack(self, b: int, layer: int, kept: Kept) -> None:
        """Copies what is kept of one layer of prompt `b` into its slots and sums up its chunks."""
        plan, placement, device = self._plans[b], self._placement, self.keys.device
        slots = torch.cat(lane_slots(placement, plan, layer, b)).to(device)
        self.keys.index_copy_(2, slots, kept.k[None, None])
        self.values.index_copy_(2, slots, kept.v[None, None])
        dynamic = plan.dynamic[layer].nonzero()[:, 0].tolist()
        if dynamic:
            chunks, tail, row = (table[layer, b] for table in (placement.chunks, placement.tail, placement.row))
            pages = [torch.cat((chunks[h, : plan.lane_chunks], tail[h : h + 1])).to(device) for h in dynamic]
            row = sum(self.capacity.retrieving[:layer]) * self.capacity.rows + row[dynamic].long() - 1
            self.summary.pack(chunk_keys(plan, kept, layer), pages, row.to(device), plan.lane_chunks)
        if self.recording is not None:
            self.recording.keep(b, kept)

    def record_step(self) -> None:
        """Adds the step that has just run to the records. Synchronises."""
        self.recording.take(self.lane, self.chunks, self.n_chunks, self.n_retrieve, self.retrieving.tolist())

    def count_bytes(self) -> CacheBytes:
        """What the loaded prompts and the tokens generated so far cost. Synchronises: not for the decoding loop."""
        costs, plans = self.costs, self._plans
        first = (1, self.capacity.n_store)  # of the store, of the rest
        now = self.next_page.tolist()
        # Tail pages that started empty hold generated tokens only.
        fresh = [
            sum(int(((plan.fill == 0) & kind(plan)).sum()) for plan in plans)
            for kind in (lambda p: p.dynamic, lambda p: ~p.dynamic)
        ]
        prompt = [at - start - new for at, start, new in zip(self._placement.next_page, first, fresh, strict=True)]
        generated = [end - at + new for end, at, new in zip(now, self._placement.next_page, fresh, strict=True)]

        def pages(count: list[int]) -> int:
            return count[0] * (costs.page + costs.summary) + count[1] * costs.page

        pooled = ("keys", "values", "summary.sketch", "summary.low", "summary.high", "summary.keys")
        tables = sum(t.nbytes for name, t in self.named_buffers() if name not in pooled and "recording" not in name)
        null_page = costs.page + costs.summary
        lanes = self.n_fixed.shape[0] * self.heads
        return CacheBytes(
            full=sum(full_bytes(plan.tokens, lanes, costs, self.page_size) for plan in plans),
            resident=pages(prompt) + null_page + tables,
            step=sum(plan.step_bytes(costs) for plan in plans),
            new=pages(generated),
            allocated=sum(t.nbytes for name, t in self.named_buffers() if "recording" not in name),
        )
