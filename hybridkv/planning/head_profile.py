"""An offline profile: what a model's heads were found to do on sample prompts. `hybridkv.calibrate` measures one."""

import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class HeadProfile:
    """Means over prompts, (layers, H) each.

    Attributes:
        need: divergence from the full cache, in nats per written token, when this head alone is pruned to what the
            prompt's text points at: large for heads that have to retrieve.
        visual: share of a head's attention on the context (visual tokens, long text) while answers are written.
        prompts: how many were read.
        model: what was measured, for the reader.
    """

    need: Tensor
    visual: Tensor
    prompts: int
    model: str

    def save(self, file: Path) -> None:
        """Writes a small JSON file."""
        row = asdict(self) | {"need": self.need.tolist(), "visual": self.visual.tolist()}
        file.write_text(json.dumps(row) + "\n", encoding="utf-8")

    @staticmethod
    def load(file: str | Path | None, shape: tuple[int, int] | None = None) -> "HeadProfile":
        """The profile in a file, which must be for a model of `shape` (layers, H), if that is known.

        Raises:
            ValueError: no file, not a profile, or of another shape.
        """
        if file is None:
            raise ValueError("this needs an offline head profile: make one with python -m hybridkv.calibrate")
        file = Path(file)
        profile = _read(file, file.stat().st_mtime_ns if file.exists() else 0)
        shape = shape or profile.need.shape
        if profile.need.shape != tuple(shape) or profile.visual.shape != tuple(shape):
            raise ValueError(
                f"{file} profiles {tuple(profile.need.shape)} layers and KV heads, this model has {tuple(shape)}"
            )
        return profile


@lru_cache(maxsize=8)
def _read(file: Path, _changed: int) -> HeadProfile:
    """Once for every state of the file: each prompt's plan asks for it."""
    try:
        row = json.loads(file.read_text(encoding="utf-8"))
        need, visual = (torch.tensor(row[key], dtype=torch.float32) for key in ("need", "visual"))
        return HeadProfile(need, visual, int(row["prompts"]), str(row["model"]))
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{file} is not a head profile: {e}") from e
