"""The cache: a page pool for all layers, lanes and sequences, and the tables that say who reads what.

    cache = HybridCache(Capacity.of(plans, new_tokens), len(plans), prefills[0])
    cache.load(prefills, plans, new_tokens)
    out = cache[layer](q, k, v)  # inside the compiled step, for every layer, one after the other
    cache.advance(active)  # once at the end of the step

A decoding step only reads and writes tensors of fixed size: nothing depends on a value, so nothing synchronises or
recompiles, and another prompt is loaded into the same tensors.
"""

import weakref

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from hybridkv.cache.attention import attend_pages, why_uncompiled
from hybridkv.cache.bounds import KeyBounds
from hybridkv.cache.capacity import Capacity, Costs
from hybridkv.cache.cost import CacheBytes, count_bytes
from hybridkv.cache.exact import ExactKeys
from hybridkv.cache.pack import Kept, Placement, chunk_keys, keep, layer_slots, place
from hybridkv.cache.pool import Pool
from hybridkv.cache.recording import Recording
from hybridkv.cache.retrieve import best_chunks, chunk_pages, page_of, select
from hybridkv.cache.sketch import KeySketch
from hybridkv.cache.store import DeviceStore, HostStore, at_once
from hybridkv.planning.plan import Plan
from hybridkv.planning.prefill import Prefill

LANE_TABLES = ("start", "n_full", "tail", "fill", "ring", "end", "row")  # as many as capacity.SCALARS
ROW_TABLES = ("first", "n_chunks", "n_retrieve", "lane", "last", "fetched")  # as many as capacity.ROW_SCALARS
RUNS = ("first", "own", "n_shared")  # `page_of` wants them side by side; the last two with the store on the host


def of(layer: Tensor, table: Tensor) -> Tensor:
    """A layer's part of a table, as a tensor of its own."""
    return table.index_select(0, layer.view(1))[0]


class CacheLayer(nn.Module):
    """One layer of a cache: what takes the place of attention in a decoding step.

    A module, since `torch.compile` traces one layer for all only if what differs between them are modules and tensors.
    (Layers that retrieve and layers that do not are two graphs.)

    Args:
        nth: number of the layer among those that retrieve; None if it does not.
        pool: which it lies in. A module of its own: one taken out of a list would be one more thing to trace anew.
    """

    def __init__(self, cache: "HybridCache", layer: int, nth: int | None, pool: Pool, device: torch.device):
        super().__init__()
        self.cache = weakref.ref(cache)  # which owns this layer: a cycle would keep a dropped cache's memory
        self.retrieves, self.begins, self.pool = nth is not None, nth == 0, pool
        self.register_buffer("layer", torch.tensor(layer, device=device), persistent=False)
        self.register_buffer("nth", torch.tensor(nth or 0, device=device), persistent=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `HybridCache.attend`."""
        return self.cache().attend(self.layer, self.nth if self.retrieves else None, self.pool, q, k, v)


class HybridCache(nn.Module):
    """See the module. Sizes follow `capacity`; shapes, dtype and device follow a record of the same model.

    Tables of all lanes are (layers, L). Those of dynamic lanes are (N, R): N layers that retrieve, R rows in each, one
    for each of its dynamic lanes; `lane` says which one a row is, and is L for rows that are not used; `last` is the
    store's slot of the token before; `fetched` counts the chunks that it has brought into frames. `Placement` says what
    the others hold.

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

        for name in LANE_TABLES:
            buffer(name, *lanes)
        for name in ROW_TABLES[1:]:
            buffer(name, *rows)
        buffer("runs", *rows, *([len(RUNS)] if capacity.host else []))
        self.register_buffer(
            "retrieving", torch.tensor(retrieving, dtype=torch.int64, device=key.device), persistent=False
        )
        nth = {layer: n for n, layer in enumerate(retrieving)}
        self.pools = nn.ModuleList(Pool(capacity, self.page_size, key) for _ in range(capacity.pools))
        self.layers = nn.ModuleList(
            CacheLayer(self, layer, nth.get(layer), self.pools[capacity.pool[layer]], key.device)
            for layer in range(layers)
        )
        summary = {"sketch": KeySketch, "bound": KeyBounds, "exact": ExactKeys}[config.retrieval]
        self.summary = summary(capacity.n_store, len(retrieving) * capacity.rows, dim, config, key)
        self.store: DeviceStore | HostStore = DeviceStore()
        if capacity.host:
            self.store = HostStore(capacity.n_store, self.page_size, key, config.stickiness)
        self.recording = Recording((*rows, capacity.retrieve), key.device) if record else None
        self._plans: list[Plan] = []
        self._placement: Placement | None = None

    @property
    def first(self) -> Tensor:
        """(N, R), see `Placement`."""
        return self.runs[..., 0] if self.capacity.host else self.runs

    def __getitem__(self, layer: int) -> "CacheLayer":
        """A layer's attention in a step. The first that retrieves catches up, for all of them: see `catch_up`.

        So it has to be asked for anew in every step, outside of what layers are compiled into.
        """
        if self.layers[layer].begins:
            self.catch_up()
        return self.layers[layer]

    def attend(self, layer: Tensor, nth: Tensor | None, pool: Pool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One layer's attention in a decoding step: appends one token, then reads the pages that the plan lists.

        Args:
            layer: () int64, a tensor so that all layers compile to the same graph.
            nth: () int64, its number among those that retrieve; None if it does not.
            pool: which it lies in.
            q: (B, Hq, 1, D). k, v: (B, H, 1, D). Positions already applied to q and k.

        Returns:
            (B, Hq, 1, D)
        """
        q = rearrange(q, "b (h g) 1 d -> (b h) 1 g d", h=self.heads)
        k, v = (rearrange(t, "b h 1 d -> (b h) d") for t in (k, v))
        slots = (of(layer, self.tail) * self.page_size + of(layer, self.fill)).long()  # (L,)
        pool.write(k, v, slots)
        pages, n_pages = self._to_read(layer, nth, pool, q[:, 0])
        out = attend_pages(q, pool.keys, pool.values, pages, n_pages, self.tail, self.fill, layer, self.page_size)
        return rearrange(out, "(b h) 1 g d -> b (h g) 1 d", b=self.batch)

    def _rows(self, nth: Tensor) -> Tensor:
        """Numbers (R,) of a retrieving layer's rows among those of all layers."""
        return nth * self.capacity.rows + torch.arange(self.capacity.rows, device=nth.device)

    def catch_up(self) -> None:
        """Brings the token before to the store and into the summaries of its page, for all dynamic lanes at once.

        The layers write their tokens to the pool alone, and a page's summary is needed once it is full. At the end of
        the step, torch 2.13 would read keys that the compiled regions of the layers have not written yet. Before the
        first step, and for rows that are not used, it goes to the null page. Doing it twice changes nothing.
        """
        slots = self.last.long()  # (N, R)
        page, fill = slots // self.page_size, slots % self.page_size
        # In the pool, a lane whose store is on the host has one tail page, which is written over when it is full.
        here, filled = self._of_rows(self.tail) if self.capacity.host else page, fill
        pools = [layer.pool for layer in self.layers if layer.retrieves]
        if len(self.pools) == 1:  # all in one kernel
            pools, here, filled = pools[:1], here.view(1, -1), filled.view(1, -1)
        found = [pool.read(at, i, self.page_size) for pool, at, i in zip(pools, here, filled, strict=True)]
        k, v = (torch.cat(each) for each in zip(*found, strict=True))  # (N R, D)
        self.summary.append(k, page.flatten(), fill.flatten())
        self.store.append(k, v, slots.flatten())

    def _mine(self, nth: Tensor) -> Tensor:
        """Lane of each of a retrieving layer's rows, (R,); of those that are not used, any."""
        return of(nth, self.lane).clamp(max=self.row.shape[1] - 1)

    def _to_read(self, layer: Tensor, nth: Tensor | None, pool: Pool, q: Tensor) -> tuple[Tensor, Tensor]:
        """Pages (L, P) that a step reads whole, those retrieved for q (L, G, D) first, and how many (L,) there are."""
        if nth is None:
            return self._run(layer)
        mine, tables = self._mine(nth), (self.runs, self.n_chunks, self.n_retrieve)
        first, n_chunks, k = (of(nth, table) for table in tables)  # (R,), the first (R, 3) with the store on the host
        count, columns = self.capacity.retrieve, self.capacity.chunks
        asking = (q.index_select(0, mine), first, n_chunks, self._rows(nth), k)  # (R, G, D), ...
        on_host, favour = isinstance(self.store, HostStore), None
        if on_host:
            frames = chunk_pages(of(layer, self.start).index_select(0, mine), k, count)  # (R, F) pages
            there = self.store.there(pool, frames, k, columns)
            favour = self.store.favour(there)
        chosen = best_chunks(self.summary, *asking, count, columns, favour)  # (R, F) chunks
        if self.recording is not None and not on_host:
            self.recording.note(nth, chosen)
        if on_host:
            copied = self.store.fetch(pool, chosen, k, frames, first, there, at_once(count))
            self.fetched.index_add_(0, nth.view(1), copied[None].int())
            if self.recording is not None:
                self.recording.note(nth, pool.held[frames])
            return self._run(layer)
        row = of(layer, self.row)
        other = (row - 1).clamp(min=0)
        found = pool.pages_of(page_of(first, chosen)).int().index_select(0, other)  # (L, F) pages
        return self._run(layer, found, torch.where(row > 0, k.index_select(0, other), 0))

    def _run(self, layer: Tensor, found: Tensor | None = None, k: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The pages of each lane's run that are read whole, behind the first k (L,) of the pages found, (L, F)."""
        start, n_full, tail, row = (
            of(layer, table)[:, None] for table in (self.start, self.n_full, self.tail, self.row)
        )
        columns = self.capacity.full + (0 if found is None else found.shape[1]) + 1  # the last one for the tail
        column = torch.arange(columns, device=layer.device).int()
        page = start + (column if k is None else column - k[:, None])
        page = page + ((page >= tail) & (row == 0))  # in a ring the tail may lie before pages that are full
        if found is not None:
            behind = column.clamp(max=found.shape[1] - 1).long().expand(len(found), -1)
            page, n_full = torch.where(column < k[:, None], found.gather(1, behind), page), n_full + k[:, None]
        return torch.where(column < n_full, page, 0), n_full[:, 0]

    def advance(self, active: Tensor) -> None:
        """Counts the token that every lane of the active sequences, (B,) bool, just appended.

        A full tail page is closed: it joins what the lane always reads, or its chunks if the lane retrieves, and the
        next page becomes the tail. A sequence that is not active writes over its last slot until it is replaced.

        Raises:
            RuntimeError: a compiled step would be wrong here.
        """
        if torch.compiler.is_compiling() and (why := why_uncompiled(self.fill.device)):
            raise RuntimeError(f"the decoding step can't be compiled: {why}")
        if self.capacity.retrieve:
            page = page_of(self.runs.flatten(0, 1), self.n_chunks.flatten()[:, None])  # (N R, 1): behind the chunks
            self.last.copy_(page.view_as(self.last) * self.page_size + self._of_rows(self.fill))
        fill = self.fill + active.repeat_interleave(self.heads)  # (layers, L), as everything below
        closed = fill == self.page_size
        tail = self.tail + closed
        # A ring that is full has no page more that is read whole: its oldest becomes the tail.
        grows = closed & (self.row == 0) & (self.n_full < self.end - self.start - 1)
        self.n_full.add_(grows)
        self.fill.copy_(torch.where(closed, 0, fill))
        self.tail.copy_(torch.where(tail == self.end, self.ring, tail))
        if self.capacity.retrieve:
            self.n_chunks.add_(self._of_rows(closed.int()))

    def _of_rows(self, table: Tensor) -> Tensor:
        """What a table of all lanes, (layers, L), says of the dynamic ones: (N, R); 0 for rows that are not used."""
        return F.pad(table.index_select(0, self.retrieving), (0, 1)).gather(1, self.lane.long())

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
        self._plans, self._placement = list(plans), place(plans, self.capacity, new_tokens)
        tables = {
            name: torch.stack([getattr(p, name) for p in plans], 1) for name in ("fill", "n_chunks", "n_retrieve")
        }
        tables |= vars(self._placement)
        tables = {name: rearrange(table, "l b h -> l (b h)") for name, table in tables.items()}
        for name in LANE_TABLES:
            getattr(self, name).copy_(tables[name])
        for name in ROW_TABLES[1:]:
            getattr(self, name).zero_()
        self.runs.zero_()
        runs = RUNS if self.capacity.host else RUNS[:1]
        self.lane.fill_(self.batch * self.heads)
        for n, layer in enumerate(self.retrieving.tolist()):
            lane = tables["row"][layer].nonzero()[:, 0]
            self.lane[n, : len(lane)] = lane.to(self.lane)
            for name in ("n_chunks", "n_retrieve"):
                getattr(self, name)[n, : len(lane)] = tables[name][layer, lane].to(self.lane)
            found = torch.stack([tables[name][layer, lane] for name in runs], 1).to(self.lane)  # (rows, 3) or (rows, 1)
            self.runs[n, : len(lane)] = found.view(len(lane), *self.runs.shape[2:])
        if self.capacity.host:
            for pool in self.pools:
                pool.held.fill_(-1)
        elif self.capacity.shifted:
            for layer, each in enumerate(self.layers):
                each.pool.before.fill_(int(self._placement.before[layer].max()))
        if self.recording is not None:
            self.recording.begin(plans)

    @torch.no_grad()
    def pack(self, b: int, layer: int, kept: Kept) -> None:
        """Copies what is kept of one layer of prompt `b` into its slots, and sums up its chunks.

        On a GPU all of it is asked for; what dynamic lanes' keys vary by is the only thing waited for (`fit_sketch`).
        """
        plan, placement, pool = self._plans[b], self._placement, self.layers[layer].pool
        slots, device = layer_slots(placement, plan, layer, b), pool.keys.device
        for where, write in ((slots.pool, pool.write), (slots.store, self.store.append)):
            some = (where >= 0).nonzero()[:, 0]
            if len(some):
                mine = slice(None) if len(some) == len(where) else some.to(device)
                write(kept.k[mine], kept.v[mine], where[some].to(device))
        dynamic = plan.dynamic[layer].nonzero()[:, 0]
        if len(dynamic):
            rows = self._numbers(layer, placement.row[layer, b, dynamic])
            self._sum_up(b, layer, dynamic, rows, chunk_keys(plan, kept, layer), kept.fits)
            if isinstance(self.store, HostStore):
                self._fill_frames(b, layer, dynamic, rows, kept.q)
        if self.recording is not None:
            self.recording.keep(b, kept)

    def _numbers(self, layer: int, row: Tensor) -> Tensor:
        """Numbers among the rows of all layers, (N,) on the device, of a layer's rows (N,), counted from 1."""
        return (sum(self.capacity.retrieving[:layer]) * self.capacity.rows + row.long() - 1).to(self.lane.device)

    def _sum_up(self, b: int, layer: int, dynamic: Tensor, rows: Tensor, keys: Tensor, fits: dict | None) -> None:
        """Summaries of the chunks of a layer's dynamic lanes: keys (N, T', D), see `chunk_keys`; rows: (N,).

        Of lanes that share their first chunks, only those that follow are summed up. `fits`: see `Kept`.
        """
        plan, placement = self._plans[b], self._placement
        full, shares = plan.lane_chunks, plan.shares[layer, dynamic]
        first = placement.own[layer, b, dynamic]
        for shared in (False, True):
            some = ((shares >= 0) == shared).nonzero()[:, 0]
            if not len(some):
                continue
            skipped = shared * plan.settled_chunks
            if shared:
                other = placement.row[layer, shares[some], dynamic[some]]
                self.summary.share(rows[some.to(rows.device)], self._numbers(layer, other))
            pages = [page + torch.arange(skipped, full + 1, device=keys.device) for page in first[some].tolist()]
            mine = keys[some.to(keys.device), skipped * self.page_size :]
            fitted = 0 if shared else min(plan.settled_chunks, full)
            of_heads = (mine, pages, rows[some.to(rows.device)])
            self.summary.pack(*of_heads, full - skipped, fitted, fits, dynamic[some].tolist())

    def _fill_frames(self, b: int, layer: int, dynamic: Tensor, rows: Tensor, q: Tensor | None) -> None:
        """Frames begin with what the question's last query, (Hq, D), would choose, or with the first chunks."""
        plan, placement = self._plans[b], self._placement
        first = torch.stack([getattr(placement, name)[:, b] for name in RUNS], -1)  # (layers, H, 3)
        tables = (first, placement.start[:, b], plan.n_chunks, plan.n_retrieve)
        first, start, n_chunks, k = (table[layer, dynamic].to(rows.device) for table in tables)
        count, columns = self.capacity.retrieve, self.capacity.chunks
        if q is None:
            chosen = torch.arange(count, device=rows.device).expand(len(rows), -1)
        else:
            asking = rearrange(q, "(h g) d -> h g d", h=self.heads)[dynamic.to(rows.device)]
            pages = chunk_pages(first, n_chunks, columns)
            chosen = select(self.summary.scores(asking, pages, n_chunks, rows), k, count)
        frames = chunk_pages(start, k, count)
        pool = self.layers[layer].pool
        there = self.store.there(pool, frames, k, columns)
        self.store.fetch(pool, chosen, k, frames, first, there, count)

    def new_chunks(self, steps: int) -> float | None:
        """Share of the chunks read in so many steps that had to be fetched; None if all are on the device."""
        read = steps * int(self.n_retrieve.sum())
        return int(self.fetched.sum()) / max(read, 1) if self.capacity.host else None

    def record_step(self) -> None:
        """Adds the step that has just run to the records. Synchronises."""
        self.recording.take(self.lane, self.n_retrieve, self.retrieving.tolist())

    def count_bytes(self) -> CacheBytes:
        """What the loaded prompts and the tokens generated so far cost. Synchronises: not for the decoding loop."""
        return count_bytes(self, self._plans)
