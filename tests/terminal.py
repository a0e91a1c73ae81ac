"""A person at a terminal: types to a command and reads what it says."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent
PATIENCE = 300  # seconds without a word, on a machine however busy
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")


class Terminal:
    """What the command wrote, less what moves the cursor; reads on until words appear that were not there before."""

    def __init__(self, process: subprocess.Popen, end: int):
        self.process, self.end, self.raw, self.seen = process, end, b"", 0

    @property
    def text(self) -> str:
        return ESCAPES.sub("", self.raw.decode("utf-8", "replace"))

    def until(self, words: str) -> str:
        """Waits for words, and returns all that came before them since the last time."""
        while words not in self.text[self.seen :]:
            assert self.read(), f"{words!r} never came; there was {self.text[self.seen :]!r}"
        at = self.text.index(words, self.seen)
        before, self.seen = self.text[self.seen : at], at + len(words)
        return before

    def read(self) -> bool:
        """Waits for what the command writes next; whether there is any."""
        ready, _, _ = select.select([self.end], [], [], PATIENCE)
        assert ready, f"nothing more came; there was {self.text[self.seen :]!r}"
        try:
            some = os.read(self.end, 4096)
        except OSError:  # the other end is closed
            some = b""
        self.raw += some
        return bool(some)

    def type(self, text: str) -> None:
        os.write(self.end, text.encode())

    def interrupt_at_prompt(self) -> None:
        """Types Ctrl-C once the command sleeps, waiting for a key.

        Between showing its prompt and that, CPython's readline module notes the signal and then waits for a key all the
        same. (Where there is no /proc, a second has to do.)
        """
        state = Path(f"/proc/{self.process.pid}/stat")
        time.sleep(0 if state.exists() else 1)
        while state.exists() and state.read_text().rpartition(")")[2].split()[0] != "S":
            time.sleep(0.01)
        self.type("\x03")

    def ended(self) -> int:
        """Waits for the command's end; its exit code."""
        while self.read():
            pass
        return self.process.wait(timeout=PATIENCE)


@contextmanager
def terminal(
    module: str, *arguments: object, ignore_interrupts: bool = False, **environment: str
) -> Iterator[Terminal]:
    """A command of ours at a terminal of 24 x 100."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    # As a new session's leader it makes this its terminal, which then turns Ctrl-C into a signal.
    handler = "SIG_IGN" if ignore_interrupts else "default_int_handler"
    start = (
        "import fcntl, runpy, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
        f"signal.signal(signal.SIGINT, signal.{handler}); sys.argv = sys.argv[1:]; "
        f"runpy.run_module('{module}', run_name='__main__', alter_sys=True)"
    )
    command: Sequence[str] = [sys.executable, "-c", start, module, *map(str, arguments)]
    given = {**os.environ, "TERM": "dumb", "INPUTRC": os.devnull, **environment}
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT, env=given, start_new_session=True
    )
    os.close(theirs)
    try:
        yield Terminal(process, ours)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
        os.close(ours)
