"""What one policy's generation kept, read and cost, as numbers for the page."""

import base64
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from torch import Tensor

from hybridkv.cache.recording import Record
from hybridkv.config import HybridConfig
from hybridkv.engine import Engine, Stats


@dataclass(frozen=True)
class Run:
    """One policy's generation, recorded.

    Attributes:
        policy: its name.
        token_ids: of the answer.
        device, dtype: that it ran with.
    """

    policy: str
    config: HybridConfig
    record: Record
    stats: Stats
    token_ids: list[int]
    device: str
    dtype: str

    @classmethod
    def of(cls, engine: Engine, token_ids: Sequence[int], sequence: int = 0) -> "Run":
        """The last generation of an engine; `sequence` is the answer's number in the batch."""
        recording = getattr(engine.cache, "recording", None)
        if not engine.record or recording is None:
            raise ValueError("nothing was written down: make the engine with record=True, and generate first")
        policy = engine.policy if isinstance(engine.policy, str) else getattr(engine.policy, "__name__", "own policy")
        keys = engine.cache.pools[0].keys
        return cls(
            policy,
            engine.config,
            recording.records[sequence],
            engine.stats,
            list(token_ids),
            str(keys.device),
            str(keys.dtype).removeprefix("torch."),
        )

    def numbers(self) -> dict:
        """What the page's script draws.

        kinds, pages: of each layer and head. kept: the prompt tokens that a static head stores, as a `bitmap`; None
        for the others, which store all. chunks: the prompt tokens in each chunk, the same for all dynamic heads.
        retrieved: for each step and dynamic head ("layer,head"), its chunks as a `bitmap`; step n made word n + 1.
        """
        record, plan = self.record, self.record.plan
        dynamic, whole = plan.dynamic.tolist(), plan.whole.tolist()
        kinds = [
            ["dynamic" if d else "whole" if w else "static" for d, w in zip(*row, strict=True)]
            for row in zip(dynamic, whole, strict=True)
        ]
        kept = [
            [bitmap(tokens, plan.tokens) if kinds[i][h] == "static" else None for h, tokens in enumerate(layer)]
            for i, layer in enumerate(record.kept)
        ]
        chunks = []
        if plan.dynamic.any():
            head = tuple(plan.dynamic.nonzero()[0].tolist())
            chunks = [record.chunk_tokens(head, c).tolist() for c in range(plan.lane_chunks + 1)]
        retrieved = [
            {f"{i},{h}": bitmap(chosen, int(chosen.max()) + 1 if len(chosen) else 0) for (i, h), chosen in step.items()}
            for step in record.retrieved[: max(0, len(self.token_ids) - 1)]
        ]
        return {
            "policy": self.policy,
            "tokens": plan.tokens,
            "kinds": kinds,
            "pages": plan.n_read.tolist(),
            "all_pages": plan.whole_pages,
            "kept": kept,
            "chunks": chunks,
            "retrieved": retrieved,
        }

    def bytes(self) -> dict[str, int]:
        """What the cache's bytes are, by name; empty after an answer that ended before it was measured."""
        return asdict(self.stats.bytes) if self.stats.bytes else {}


def bitmap(members: Tensor, size: int) -> str:
    """A set of numbers below `size`, a bit each, the first in the lowest bit of the first byte; in base64."""
    bits = np.zeros(size, dtype=np.uint8)
    bits[members.numpy()] = 1
    return base64.b64encode(np.packbits(bits, bitorder="little").tobytes()).decode()
