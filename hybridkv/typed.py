"""Lines that somebody types, with editing and history from the standard library, or that come on a pipe."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

HISTORY = "HYBRIDKV_HISTORY"


def history_file() -> Path:
    if own := os.environ.get(HISTORY):
        return Path(own)
    return Path(os.environ.get("XDG_STATE_HOME") or Path("~/.local/state").expanduser()) / "hybridkv" / "chat-history"


@contextmanager
def typed_lines(keep_history: bool) -> Iterator[None]:
    """Line editing for `input`, with the lines of earlier runs; where they can't be kept, without a word."""
    try:
        import readline
    except ImportError:
        yield
        return
    file = None
    if keep_history:
        with suppress(OSError, RuntimeError):  # no home, say
            file = history_file()
            readline.read_history_file(file)
    try:
        yield
    finally:
        if file:
            with suppress(OSError):
                file.parent.mkdir(parents=True, exist_ok=True)
                readline.set_history_length(1000)
                readline.write_history_file(file)


def next_line() -> str:
    """A line of stdin, for scripts."""
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line
