"""An offline profile: what a model's heads were found to do on sample prompts. `need.py` measures one."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class HeadProfile:
    """Means over prompts, (layers, H) each, finite and not negative.

    Attributes:
        need: divergence from the full cache, in nats per written token, when this head alone is pruned to what the
            prompt's text points at: large for heads that have to retrieve.
        visual: share of a head's attention on the context (visual tokens, long text) while answers are written.
        prompts: how many were read.
        model: what was measured, for the reader.
    """

    need: Tensor
    visual: Tensor
    prompts: int = 1
    model: str = ""

    def __post_init__(self) -> None:
        for name in ("need", "visual"):
            x = getattr(self, name)
            if x.dim() != 2 or not x.numel() or x.shape != self.need.shape:
                raise ValueError(f"{name} must be a table of layers by KV heads, like need, got {tuple(x.shape)}")
            if not x.isfinite().all() or (x < 0).any():
                raise ValueError(f"{name} must be finite and not negative")

    @classmethod
    def join(cls, profiles: Sequence["HeadProfile"], model: str = "") -> "HeadProfile":
        """One profile of all prompts that these of the same model were measured on, each prompt with equal weight."""
        weight = torch.tensor([float(max(1, profile.prompts)) for profile in profiles])
        weight /= weight.sum()
        need, visual = (
            torch.einsum("n,nlh->lh", weight, torch.stack([getattr(profile, name) for profile in profiles]))
            for name in ("need", "visual")
        )
        return cls(need, visual, sum(profile.prompts for profile in profiles), model)

    def save(self, file: str | Path) -> None:
        """Writes a small JSON file."""
        row = asdict(self) | {"need": self.need.tolist(), "visual": self.visual.tolist()}
        Path(file).write_text(json.dumps(row) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, file: str | Path) -> "HeadProfile":
        """The profile in a file.

        Raises:
            ValueError: it can't be read, or is no profile.
        """
        try:
            row = json.loads(Path(file).read_text(encoding="utf-8"))
            need, visual = (torch.tensor(row[key], dtype=torch.float32) for key in ("need", "visual"))
            return cls(need, visual, int(row["prompts"]), str(row["model"]))
        except KeyError as e:
            raise ValueError(f"{file} is not a head profile: it lacks {e}") from e
        except (OSError, ValueError, TypeError, OverflowError, RecursionError, RuntimeError) as e:
            raise ValueError(f"{file} is not a head profile: {e}") from e
