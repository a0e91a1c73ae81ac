"""JSON files of a checkpoint, read with a check of every value's kind, so that a wrong one is named and never used."""

import json
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LARGEST = 2**31 - 1  # no size, count or token id of a model is larger


class CheckpointError(ValueError):
    """A checkpoint folder that can't be used; the message says in one line what is wrong and what to do."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))  # names of files, fields and tensors may hold line breaks


_short = reprlib.Repr()
_short.maxstring = _short.maxother = 120


def show(value: object) -> str:
    """A value as it stands in a message: never long, never of several lines."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else _short.repr(value)


def _once(pairs: list[tuple[str, object]]) -> dict:
    raw = dict(pairs)
    if len(raw) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"{show(twice)} is given twice")
    return raw


def read_json(path: Path) -> dict:
    """The JSON object in `path`, or a `CheckpointError` that names the file."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except FileNotFoundError as e:
        raise CheckpointError(f"{path} does not exist") from e
    except (ValueError, OSError) as e:  # ValueError: no JSON, no UTF-8, a key twice, a number of thousands of digits
        raise CheckpointError(f"{path} can't be read as JSON: {e}") from e
    except RecursionError as e:
        raise CheckpointError(f"{path} can't be read as JSON: it is nested too deeply") from e
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return raw


def _all_whole(values: Sequence, low: int, high: int) -> bool:
    return all(isinstance(n, int) and not isinstance(n, bool) and low <= n <= high for n in values)


@dataclass(frozen=True)
class Fields:
    """One JSON object and where it stands; the methods give a field's value or its default."""

    raw: dict
    file: str
    prefix: str = ""  # such as "vision_config."

    def given(self, name: str) -> bool:
        return self.raw.get(name) is not None

    def error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.file}: {message}")

    def said(self, name: str, value: object) -> str:
        """A field and its value for a message, which tells whether the file or the default speaks."""
        default = "" if name in self.raw else f" (the default, as the file lacks {name!r})"
        return f"{self.prefix}{name} {show(value)}{default}"

    def wrong(self, name: str, value: object, wanted: str) -> CheckpointError:
        return self.error(f"{self.said(name, value)} is of the wrong kind: it must be {wanted}")

    def whole(self, name: str, default: int, low: int = 1, high: int = LARGEST) -> int:
        value = self.raw.get(name, default)
        if not _all_whole([value], low, high):
            raise self.wrong(name, value, f"a whole number from {low} to {high}")
        return value

    def wholes(self, name: str, default: Sequence[int]) -> tuple[int, ...]:
        """A list of whole numbers from 0 on."""
        value = self.raw.get(name, default)
        if not isinstance(value, list | tuple) or not _all_whole(value, 0, LARGEST):
            raise self.wrong(name, value, f"a list of whole numbers from 0 to {LARGEST}")
        return tuple(value)

    def tokens(self, name: str, vocab_size: int) -> tuple[int, ...]:
        """One token id, a list of them, or null for none."""
        value = self.raw.get(name)
        listed = value if isinstance(value, list) else [] if value is None else [value]
        if not _all_whole(listed, 0, vocab_size - 1):
            raise self.wrong(name, value, f"a token id from 0 to {vocab_size - 1}, or a list of them")
        return tuple(listed)

    def number(self, name: str, default: float, below: float = 1e300) -> float:
        value = self.raw.get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < below:
            raise self.wrong(name, value, f"a number above 0 and below {below:g}")
        return float(value)

    def flag(self, name: str) -> bool:
        """True or false; false if it is left out."""
        value = self.raw.get(name, False)
        if not isinstance(value, bool):
            raise self.wrong(name, value, "true or false")
        return value

    def section(self, name: str) -> "Fields":
        """An object within this one, empty if it is left out or null."""
        value = self.raw.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(name, value, "an object")
        return Fields(value or {}, self.file, f"{self.prefix}{name}.")
