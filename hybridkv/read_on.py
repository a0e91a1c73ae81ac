"""Reading on: layers that see what a reading holds and only compute what comes after it.

A layer's keys and values come over from host memory while the layer before is worked on, so that a device holds two
layers of the reading at most, beside what is packed.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from hybridkv.config import HybridConfig
from hybridkv.int8 import Int8
from hybridkv.planning.plan import Plan
from hybridkv.planning.prefill import LayerProfile, Prefill, profile_layer
from hybridkv.planning.prune import Span
from hybridkv.reading import QUERIES, Question, Reading, beginning, rows_to_keep

ROWS = 512  # queries that are attended at once, so that no mask is larger than that many rows


def attend_on(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of the last N of T tokens: q (1, Hq, N, D); k, v (1, H, T, D); out (1, Hq, N, D)."""
    heads, new, tokens = k.shape[1], q.shape[2], k.shape[2]
    rows, out = rearrange(q, "b (h g) n d -> b h g n d", h=heads), []
    for first in range(0, new, ROWS):
        some = rows[..., first : first + ROWS, :]
        group, n = some.shape[2:4]
        seen = tokens - new + first + n  # keys that the last of these may see
        mask = torch.ones(n, seen, dtype=torch.bool, device=q.device).tril(seen - n)
        some = F.scaled_dot_product_attention(
            rearrange(some, "b h g n d -> b h (g n) d"), k[:, :, :seen], v[:, :, :seen], mask.repeat(group, 1)
        )
        out.append(rearrange(some, "b h (g n) d -> b (h g) n d", g=group))
    return torch.cat(out, 2)


class Bus:
    """Brings a reading's layers to a device one after the other; the next one may be sent for before it is needed."""

    def __init__(self, reading: Reading, device: torch.device):
        self.reading, self.device = reading, device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.coming: tuple[int, Tensor, Tensor] | None = None

    def take(self, layer: int) -> tuple[Tensor, Tensor]:
        """A layer's keys and values (1, H, T, D) on the device."""
        if self.stream is None:
            return self.reading.k[layer].to(self.device)[None], self.reading.v[layer].to(self.device)[None]
        if self.coming is None or self.coming[0] != layer:
            self.send(layer)
        _, k, v = self.coming
        self.coming, now = None, torch.cuda.current_stream(self.device)
        now.wait_stream(self.stream)
        for tensor in (k, v):
            tensor.record_stream(now)  # it is not reused before this layer is done with it
        return k[None], v[None]

    def send(self, layer: int) -> None:
        """Begins to bring a layer, if there is one, and if it can come by itself."""
        if self.stream is not None and layer < len(self.reading.k):
            with torch.cuda.stream(self.stream):
                self.coming = (layer, *(self._start(t[layer]) for t in (self.reading.k, self.reading.v)))

    def _start(self, host: Tensor) -> Tensor:
        return host.to(self.device, non_blocking=True)


def joined(bus: Bus, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """A layer's keys and values of reading and new tokens, (1, H, T, D); the layer after it is on its way then."""
    past_k, past_v = bus.take(layer)
    k, v = torch.cat((past_k, k), 2), torch.cat((past_v, v), 2)
    del past_k, past_v
    bus.send(layer + 1)
    return k, v


class LayerOnReading:
    """A `LayerProfile` most of whose keys and values lie in a reading, and are brought again when they are packed."""

    def __init__(self, profile: LayerProfile, reading: Reading, layer: int):
        self.q, self.score, self.mean_score = profile.q, profile.score, profile.mean_score
        self.context_mass, self.focus = profile.context_mass, profile.focus
        self._reading, self._layer = reading, layer
        # Copies: a part of a tensor would keep all of it.
        self._k, self._v = (t[:, reading.tokens :].clone() for t in (profile.k, profile.v))

    @property
    def k(self) -> Tensor:
        return torch.cat((self._reading.k[self._layer].to(self._k.device), self._k), 1)

    @property
    def v(self) -> Tensor:
        return torch.cat((self._reading.v[self._layer].to(self._v.device), self._v), 1)


class PrefillOn(Prefill):
    """Records a question's way through a model, as `Prefill` would the whole prompt's.

    Args:
        reading: of the first tokens; a layer is called with the keys and values of those after them.
        prunable, config, on_layer, spans: of the whole prompt, see `Prefill`.
    """

    def __init__(
        self,
        reading: Reading,
        prunable: Tensor,
        config: HybridConfig,
        on_layer: Callable[[], None] | None = None,
        spans: Sequence[Span] = (),
    ):
        super().__init__(prunable, config, on_layer, spans)
        self.reading = reading
        self.bus: Bus | None = None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if layer != len(self.layers):
            raise ValueError(
                f"layer {layer} called after {len(self.layers)} layers: a prefill reads one prompt, in order"
            )
        reading = self.reading
        if layer == 0:
            self.bus = Bus(reading, k.device)
        k, v = joined(self.bus, layer, k, v)
        if layer == 0:
            self._start(k[0])
        out = attend_on(q, k, v)
        rows = self.window.rows
        old = rows < reading.tokens
        asking = q.new_empty(q.shape[1], len(rows), q.shape[3])  # (Hq, N + A, D)
        asking[:, old] = reading.queries(layer, rows[old]).to(q.device)
        asking[:, ~old] = q[0][:, rows[~old] - reading.tokens]
        self.layers.append(profile_layer(asking, k[0], v[0], self.prunable, self.window))
        if self.on_layer:
            self.on_layer()
        if self.layers[layer] is not None:  # not packed yet
            self.layers[layer] = LayerOnReading(self.layers[layer], reading, layer)
        return out

    def fits(self, plan: Plan, layer: int) -> dict | None:
        """With the reading, if the settled chunks follow from it alone."""
        tokens = plan.settled_tokens
        if plan.lane_chunks < plan.settled_chunks or not len(tokens) or int(tokens.max()) >= self.reading.tokens:
            return None
        return self.reading.fits.setdefault((plan.settled_name, layer), {})


class Recorder:
    """Makes a reading of a prompt on its way through a model: `recorder[layer](q, k, v)` is its attention.

    Args:
        rows: tokens whose queries are kept, in order.
        past: a reading of the first tokens, which this one goes on from.
        on_layer: called after each layer.
        int8: keys and values are kept as `Int8`.
    """

    def __init__(
        self,
        rows: Tensor,
        past: Reading | None = None,
        on_layer: Callable[[], None] | None = None,
        int8: bool = False,
    ):
        start = past.tokens if past else 0
        self.old = rows[rows < start]
        if past:  # those that it has kept
            self.old = self.old[torch.isin(self.old, past.rows)]
        self.rows = torch.cat((self.old, rows[rows >= start]))
        self.past, self.start, self.on_layer, self.int8 = past, start, on_layer, int8
        self.k: list[Tensor | Int8] = []
        self.v: list[Tensor | Int8] = []
        self.q: list[Tensor] = []
        self.bus: Bus | None = None

    def __getitem__(self, layer: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return partial(self.attend, layer)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        new = self.rows[len(self.old) :].to(q.device) - self.start
        queries = to_host(q[0][:, new])
        if self.past:
            self.bus = self.bus or Bus(self.past, k.device)
            k, v = joined(self.bus, layer, k, v)
            queries = torch.cat((self.past.queries(layer, self.old), queries), 1)
            out = attend_on(q, k, v)
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        for kept, t in ((self.k, k[0]), (self.v, v[0])):
            kept.append(Int8.of(t).each(to_host) if self.int8 else to_host(t))
        self.q.append(queries)
        if self.on_layer:
            self.on_layer()
        return out


def read_once(
    model: nn.Module,
    fingerprint: str,
    prompt: object,
    config: HybridConfig,
    past: Reading | None = None,
    tokens: int | None = None,
    on_layer: Callable[[], None] | None = None,
    int8: bool = False,
) -> Reading:
    """A reading of a prompt's first tokens; see `Engine.read`."""
    tokens = getattr(prompt, "heavy", len(prompt.input_ids)) if tokens is None else tokens
    least = past.tokens if past else 0
    if not least < tokens <= len(prompt.input_ids):
        raise ValueError(
            f"there is nothing to read: {tokens} of the prompt's {len(prompt.input_ids)} tokens, {least} of which are "
            "read already. Only a prompt with a picture, a video or a context has a part that is read once"
        )
    part = beginning(prompt, tokens)
    if past:
        past.check(fingerprint)
        Question(part, past)  # refuses what does not go on from there
    rows = rows_to_keep(prompt, tokens, max(QUERIES, config.window + config.recent))
    record = Recorder(rows, past, on_layer, int8 or (past is not None and past.int8))
    model.prefill(part, record, *([past.tokens] if past else []))
    return Reading(part.input_ids.cpu(), record.k, record.v, record.q, record.rows, fingerprint, part.messages)


def to_host(t: Tensor) -> Tensor:
    """A copy of its own in host memory; where it came from a GPU, in memory that the GPU can copy from by itself."""
    if not t.is_cuda:
        return t.clone(memory_format=torch.contiguous_format)
    host = torch.empty(t.shape, dtype=t.dtype, pin_memory=True)
    return host.copy_(t)
