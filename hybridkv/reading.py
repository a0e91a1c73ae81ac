"""A reading: the heavy part of a prompt (pictures, video, a long text), read once and kept in host memory.

    reading = engine.read(prompt)                     # the prompt's pictures, videos and contexts; not the question
    engine.ask(reading, prompt)                       # a `Result`, as if they had been read together
    engine.ask(reading, processor("And?", after=reading.messages))

A question is prefilled against it, makes a plan of its own and packs its own pages (`read_on.py`), so what pruning for
one question leaves out is there for the next.
"""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hybridkv.int8 import Int8
from hybridkv.planning.prune import Span

QUERIES = 64  # of each kind of token that a reading keeps: twice the window's default
FORMAT = "hybridkv-reading-1"


@dataclass(frozen=True)
class Reading:
    """What a model made of the first T tokens of a prompt. Never written to once it is made.

    Attributes:
        input_ids: (T,) int64.
        k, v: (H, T, D) of each layer, in host memory, as they are or as `Int8`; keys after RoPE.
        q: (Hq, R, D) of each layer: its last text queries, from which any policy finds out where the text looks.
        rows: (R,) int64, whose queries those are, in order.
        fingerprint: of the model that read it.
        messages: what was read, as messages to go on from; empty if the prompt had none.
        fits: for (name of the tokens that are cut into chunks, layer) the sketches of heads that were dynamic for a
            question, by head and rank: they follow from the reading, and are fitted once. Not saved.
    """

    input_ids: Tensor
    k: list[Tensor | Int8]
    v: list[Tensor | Int8]
    q: list[Tensor]
    rows: Tensor
    fingerprint: str
    messages: list[dict] = field(default_factory=list)
    fits: dict = field(default_factory=dict, compare=False, repr=False)

    @property
    def tokens(self) -> int:
        return len(self.input_ids)

    @property
    def int8(self) -> bool:
        return any(isinstance(t, Int8) for t in self.k)

    @property
    def bytes(self) -> int:
        """Host memory that it takes."""
        fits = [t for layer in self.fits.values() for fit in layer.values() for t in fit]
        return sum(t.nbytes for t in (self.input_ids, self.rows, *self.k, *self.v, *self.q, *fits))

    def check(self, fingerprint: str) -> None:
        """Refuses to be used by a model of another fingerprint."""
        if self.fingerprint != fingerprint:
            raise ValueError("this reading was made by another model, or in another dtype: read the prompt again")

    def queries(self, layer: int, rows: Tensor) -> Tensor:
        """A layer's queries at these tokens, (Hq, len(rows), D), in host memory.

        Raises:
            ValueError: some are not kept.
        """
        rows = rows.cpu()
        at = torch.searchsorted(self.rows, rows).clamp(max=max(0, len(self.rows) - 1))
        if len(rows) and (not len(self.rows) or not torch.equal(self.rows[at], rows)):
            raise ValueError(
                "this reading does not hold all text queries that are asked for: read the prompt again, "
                "with the window that the question will have"
            )
        return self.q[layer][:, at]

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file, whole or not at all.

        Raises:
            OSError: it can't be written.
        """
        tensors = {"input_ids": self.input_ids, "rows": self.rows}
        for layer in range(len(self.k)):
            for name in "kvq":
                t = getattr(self, name)[layer]
                parts = {"": t.numbers, ".scale": t.scale} if isinstance(t, Int8) else {"": t}
                tensors |= {f"{name}.{layer}{part}": t.contiguous() for part, t in parts.items()}
        about = {"format": FORMAT, "fingerprint": self.fingerprint, "messages": json.dumps(self.messages)}
        path = Path(path)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
        try:
            unfinished.touch()  # says better than the next line what is wrong with a path
            save_file(tensors, unfinished, metadata=about)
            os.replace(unfinished, path)
        except SafetensorError as e:
            raise OSError(f"{path} can't be written: {' '.join(str(e).split())[:200]}") from e
        except OSError as e:
            e.filename, e.filename2 = str(path), None  # nobody knows the other file
            raise
        finally:
            with suppress(OSError):
                unfinished.unlink()

    @classmethod
    def load(cls, path: str | Path, fingerprint: str) -> "Reading":
        """Reads what `save` wrote.

        Args:
            fingerprint: of the model that it is for: `engine.fingerprint`.

        Raises:
            ValueError: it is no reading, or another model's.
            OSError: it can't be read.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(2, "there is no such file", str(path))
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                if about.get("format") != FORMAT:
                    raise ValueError(f"{path} is no reading of this version")
                if about["fingerprint"] != fingerprint:
                    raise ValueError(f"{path} was read by another model, or in another dtype: read the prompt again")
                given = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
                messages = json.loads(about["messages"])
            ids, rows = given["input_ids"], given["rows"]
            layers = sum(name.startswith("q.") for name in given)

            def tensor(name: str) -> Tensor | Int8:
                scale = given.get(f"{name}.scale")
                return given[name] if scale is None else Int8(given[name], scale, len(ids))

            k, v, q = ([tensor(f"{name}.{i}") for i in range(layers)] for name in "kvq")
        except (SafetensorError, KeyError, json.JSONDecodeError) as e:
            raise ValueError(f"{path} is damaged or no reading: {' '.join(str(e).split())[:200]}") from e
        reading = cls(ids, k, v, q, rows, about["fingerprint"], messages)
        if not reading.fits_together():
            raise ValueError(f"{path} is damaged: its tensors do not fit together")
        return reading

    def fits_together(self) -> bool:
        """Whether shapes and numbers are those of a reading."""
        ids, rows = self.input_ids, self.rows
        if ids.dim() != 1 or ids.dtype != torch.int64 or rows.dim() != 1 or rows.dtype != torch.int64 or not self.k:
            return False
        if len(rows) and not (rows[0] >= 0 and rows[-1] < len(ids) and (rows.diff() > 0).all()):
            return False
        if not all(t.fits_together() if isinstance(t, Int8) else t.dim() == 3 for t in (*self.k, *self.v)):
            return False
        (heads, _, dim), dtype = self.k[0].shape, self.k[0].dtype
        keys = all(t.shape == (heads, len(ids), dim) and t.dtype == dtype for t in (*self.k, *self.v))
        queries = all(t.dim() == 3 and t.shape[1:] == (len(rows), dim) and t.dtype == dtype for t in self.q)
        return keys and queries and isinstance(self.messages, list)


def is_reading(path: str | Path) -> bool:
    """Whether a file was written by `Reading.save`, in whatever version."""
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("format", "").startswith("hybridkv-reading-")
    except (SafetensorError, OSError):
        return False


@dataclass(frozen=True)
class Question:
    """A prompt that goes on from a reading: its first tokens are the reading's. An engine takes it like any prompt.

    Raises:
        ValueError: it does not go on from there.
    """

    prompt: object
    reading: Reading

    def __post_init__(self) -> None:
        if not isinstance(self.reading, Reading):
            raise TypeError(f"a question is asked about a Reading, got {type(self.reading).__name__}")
        ids, read = self.prompt.input_ids, self.reading.input_ids
        if len(ids) <= len(read) or not torch.equal(ids[: len(read)].cpu(), read):
            raise ValueError(
                "the prompt does not begin as this reading does: make it with the same pictures and texts, "
                "or with after=reading.messages"
            )

    @property
    def input_ids(self) -> Tensor:
        return self.prompt.input_ids

    @property
    def prunable(self) -> Tensor | None:
        return getattr(self.prompt, "prunable", None)

    @property
    def spans(self) -> Sequence[Span]:
        return getattr(self.prompt, "spans", ())


@dataclass(frozen=True)
class Beginning:
    """The first tokens of a prompt, as a model reads them."""

    input_ids: Tensor
    patches: Tensor | None
    grids: list[tuple[int, int, int]]
    seconds_per_grid: list[float]
    messages: list[dict]


def beginning(prompt: object, tokens: int) -> Beginning:
    """The first so many tokens of a prompt, and the messages that they come from.

    Raises:
        ValueError: a picture lies behind them.
    """
    heavy = getattr(prompt, "heavy", 0)
    if tokens < heavy:
        raise ValueError(f"a reading of {tokens} tokens ends before the prompt's last picture or context, at {heavy}")
    messages = getattr(prompt, "messages", [])
    if tokens == heavy:
        messages = prompt.subject
    elif tokens <= getattr(prompt, "settled", 0):
        messages = messages[:-1]
    grids, seconds = (list(getattr(prompt, name, ())) for name in ("grids", "seconds_per_grid"))
    return Beginning(prompt.input_ids[:tokens], getattr(prompt, "patches", None), grids, seconds, messages)


def rows_to_keep(prompt: object, tokens: int, least: int) -> Tensor:
    """Tokens, among the first so many, whose queries a question may want: the last `least` of every kind, (R,).

    Which text is prunable, and which token recent, depends on what comes after; whatever that is, the queries that
    `Window` looks at are among these.
    """
    everything = torch.ones(tokens, dtype=torch.bool)
    text = everything.clone()
    for start, t, h, w in getattr(prompt, "spans", ()):
        text[start : start + t * h * w] = False
    kinds = [everything, text]
    for name in ("prunable", "later"):
        mask = getattr(prompt, name, None)
        if mask is not None:
            kinds += [text & mask[:tokens].cpu(), text & ~mask[:tokens].cpu()]
    return torch.cat([kind.nonzero()[-least:, 0] for kind in kinds]).unique()
