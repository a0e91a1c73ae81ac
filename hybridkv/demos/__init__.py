"""The bundled model with its pictures and questions, for `python -m hybridkv.generate` without arguments.

The model is a miniature Qwen2.5-VL that reads boards; its model card is `boards/README.md`.
"""

import json
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
MODEL = FOLDER / "boards"
DEFAULT = "lookup"


@dataclass(frozen=True)
class Demo:
    """Pictures, a question about them and its right answer."""

    name: str
    about: str
    images: list[Path]
    prompt: str
    answer: str


def by_name() -> dict[str, Demo]:
    """All bundled demos."""
    rows = json.loads((FOLDER / "demos.json").read_text(encoding="utf-8"))
    return {row["name"]: Demo(**row | {"images": [FOLDER / file for file in row["images"]]}) for row in rows}
