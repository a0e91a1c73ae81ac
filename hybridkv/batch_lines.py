"""Files of `generate --batch`: a JSON object a line, prompts in one, answers in the other.

    {"prompt": "What does it say?", "images": ["street.jpg"]}
    {"id": 7, "prompt": "Who signed it?", "context": "a long text ...", "max_new_tokens": 16}
    {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "?"}]}]}

An answer names the line it answers, counted from 1, and its `id` if it has one.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from hybridkv.cli import replacing
from hybridkv.model import InputError

KEYS = {"id", "prompt", "messages", "system", "images", "videos", "context", "context_file", "max_new_tokens", "budget"}
BEGIN = b'{"line": '  # of every answer


@dataclass(frozen=True)
class Line:
    """One prompt of the file.

    Attributes:
        number: from 1.
        text: as it is there.
    """

    number: int
    text: str

    def parse(self) -> dict:
        """Its object, checked as far as names and kinds go.

        Raises:
            InputError: it is none.
        """
        try:
            row = json.loads(self.text, object_pairs_hook=named_once)
        except (json.JSONDecodeError, RecursionError) as e:
            raise InputError(f"no JSON: {e}") from e
        if not isinstance(row, dict):
            raise InputError(f"must be a JSON object, got {type(row).__name__}")
        if unknown := sorted(row.keys() - KEYS):
            raise InputError(f"has no place for {', '.join(unknown)}: known are {', '.join(sorted(KEYS))}")
        if ("prompt" in row) == ("messages" in row):
            raise InputError('wants either "prompt" or "messages"')
        if "messages" in row and not isinstance(row["messages"], list):
            raise InputError('"messages" must be a list')
        if "context" in row and "context_file" in row:
            raise InputError('wants "context" or "context_file", not both')
        if not isinstance(row.get("context_file", ""), str):  # a number would be an open file's
            raise InputError(f'"context_file" must be the name of a file, got {row["context_file"]!r}')
        limit = row.get("max_new_tokens", 1)
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
            raise InputError(f'"max_new_tokens" must be a whole number of at least 1, got {limit!r}')
        budget = row.get("budget", 1)
        if not isinstance(budget, int | float) or isinstance(budget, bool) or not 0 < budget <= 1:
            raise InputError(f'"budget" must be a share in (0, 1], got {budget!r}')
        return row


def named_once(pairs: list[tuple[str, object]]) -> dict:
    """An object of JSON; of a name that is there twice, one of the values would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise InputError(f"says {next(name for name in names if names.count(name) > 1)!r} twice")
    return found


def read_lines(path: str | Path) -> list[Line]:
    """The prompts of a file; blank lines are counted, and no prompts.

    Raises:
        InputError: it is no text, or holds no prompt.
        OSError: it can't be read.
    """
    try:
        content = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise InputError(f"{path} is not UTF-8 text: {e.reason} at byte {e.start}") from e
    lines = [Line(i, text.strip()) for i, text in enumerate(content.split("\n"), 1) if text.strip()]
    if not lines:
        raise InputError(f"{path} holds no prompts")
    return lines


class Answers:
    """The file of answers: what is in it already is not asked again, but for what went wrong.

    Args:
        path: an answer is added as soon as it is there.
        settings: what answers depend on beside their line, as text.

    Raises:
        InputError: it holds something else, or answers to other prompts or with other settings.
        OSError: it can't be written.
    """

    def __init__(self, path: str | Path, lines: list[Line], settings: str):
        self.path, self.settings = Path(path), settings
        known = {line.number: self._key(line) for line in lines}
        rows = [row for row in self._read() if "error" not in row]
        if any(known.get(row["line"]) != row["key"] for row in rows):
            raise InputError(
                f"{path} holds answers to other prompts, or given with other settings: name another file for --out"
            )
        self.done = {row["line"] for row in rows}
        rewritten = "".join(json.dumps(row) + "\n" for row in rows)
        if not self.path.exists() or rewritten != self.path.read_text(encoding="utf-8"):
            with replacing(self.path, "--out") as file:
                file.write_text(rewritten, encoding="utf-8")

    def _key(self, line: Line) -> str:
        return hashlib.sha256(f"{line.text}\n{self.settings}".encode("utf-8", "surrogatepass")).hexdigest()[:16]

    def _read(self) -> list[dict]:
        """What was written before; a last line that was cut off is not."""
        if not self.path.exists():
            return []
        rows = []
        *whole, cut_off = self.path.read_bytes().split(b"\n")
        if cut_off[: len(BEGIN)] != BEGIN[: len(cut_off)]:  # a text of one line, say, which would be lost
            raise InputError(f"{self.path} ends with what is no answer of this command: name another file")
        for i, line in enumerate(whole, 1):
            try:
                row = json.loads(line)
                row["line"], row["key"]
            except (ValueError, KeyError, TypeError) as e:
                raise InputError(f"{self.path}, line {i}, is no answer of this command: name another file") from e
            rows.append(row)
        return rows

    def add(self, line: Line, row: dict) -> None:
        """Appends one answer, or what went wrong."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"line": line.number, "key": self._key(line), **row}) + "\n")
