"""What the commands share: the parser, errors in one line, notes and progress on stderr, the device, the compiler."""

import argparse
import io
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from hybridkv.version import __version__

try:
    from hybridkv.model import InputError, Prompt
except ModuleNotFoundError as e:
    if e.name != "hybridkv.model":
        raise
    raise ModuleNotFoundError(
        "hybridkv/model must be a link to the folder model/, which this copy of the files has lost: "
        "copy model/ to hybridkv/model, or clone with git -c core.symlinks=true",
        name=e.name,
    ) from None

LONGEST_TEXT = 32_000_000  # bytes; more than any model here reads, and /dev/zero never ends

EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 130, 141  # what a shell reports for a command that SIGINT or SIGPIPE ended


class Once(argparse.Action):
    """For options of which a second one would silently replace the first."""

    def __call__(self, parser, namespace, value, option=None) -> None:
        if getattr(namespace, self.dest) is not None:
            raise argparse.ArgumentError(self, "can be given only once")
        setattr(namespace, self.dest, value)


class Parser(argparse.ArgumentParser):
    """A parser of `hybridkv-COMMAND`, or `python -m hybridkv.COMMAND`, whichever was typed; options in full only."""

    def __init__(self, command: str, description: str):
        script = f"hybridkv-{command}"
        typed = script if Path(sys.argv[0]).stem == script else f"python -m hybridkv.{command}"
        super().__init__(
            prog=typed,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.register("action", "once", Once)
        self.add_argument("--version", action="version", version=f"hybridkv {__version__}")

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        for arg in sys.argv[1:] if args is None else args:
            if arg.startswith("--") and arg.partition("=")[2] == "--":  # argparse would give an empty list
                self.error(f"argument {arg.removesuffix('=--')}: -- is no value")
        return super().parse_args(args, namespace)

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (--help explains)\n")

    def exit(self, status: int = 0, message: str | None = None) -> None:
        if message:
            say(message, end="")
        sys.exit(status)


def positive(text: str) -> int:
    """An argument that counts something."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return value


@contextmanager
def one_line_errors(parser: Parser, out_of_memory: str) -> Iterator[None]:
    """What can go wrong inside ends as one line on stderr and exit code 2; only bugs leave a traceback.

    An interrupt exits with 130, and a reader of stdout that has gone with 141, as if the signal had ended us.

    Args:
        out_of_memory: what to do about that.
    """
    if sys.stderr is None:  # closed by the caller, and print would take stdout instead
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if sys.stdout is None:
        parser.error("stdout is closed: there is nowhere to write to")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # an answer may have characters that a terminal has not
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "TensorFloat32", UserWarning)  # a hint of the compiler's, for GPUs
            try:
                yield
            finally:
                flush(sys.stdout)
    except KeyboardInterrupt:
        parser.exit(EXIT_INTERRUPTED, "\n")
    except BrokenPipeError:
        parser.exit(EXIT_BROKEN_PIPE)
    except Exception as e:
        message = one_line(e, out_of_memory)
        if message is None:
            raise
        parser.error(message)


def one_line(error: Exception, out_of_memory: str) -> str | None:
    """What went wrong, in one line; None for a bug.

    Args:
        out_of_memory: what to do about that.
    """
    from hybridkv.cache.store import StoreError  # not above: a copy without model/ shall say that first

    if isinstance(error, StoreError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error):
        return f"out of memory: {out_of_memory}"
    if isinstance(error, ValueError):  # InputError, CheckpointError, BudgetError, and what a configuration refuses
        return " ".join(str(error).split())
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    if isinstance(error, torch._dynamo.exc.TorchDynamoException):
        return f"the decoding step can't be compiled: {complaint(error)}; --no-compile does without"
    return None


def flush(stream: io.TextIOBase) -> None:
    """Writes what is left. What can't be written goes nowhere, or the interpreter would try again at its end."""
    try:
        stream.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        raise


def say(text: str, end: str = "\n") -> None:
    """Notes and progress: on stderr, and no reason to stop if they can't be shown."""
    with suppress(OSError):
        try:
            print(text, end=end, file=sys.stderr)
        finally:
            flush(sys.stderr)


class Status:
    """One line on stderr that says what takes so long; taken away when it is over, if stderr is a terminal."""

    def __init__(self) -> None:
        self.terminal, self.shown = sys.stderr.isatty(), False

    def show(self, text: str) -> None:
        say(text, end="" if self.terminal else "\n")
        self.shown = True

    def clear(self) -> None:
        if self.shown and self.terminal:
            say("\r\033[K", end="")
        self.shown = False


def choose_device(name: str | None) -> torch.device:
    """The device of this name, or the best one; only what the model and the cache can run on.

    Raises:
        InputError: there is no such device.
    """
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    known = ["cpu", "cuda", *gpus] if gpus else ["cpu"]
    name = known[min(1, len(gpus))] if name is None else name
    if name not in known:
        raise InputError(f"device {name!r} can't be used; on this machine there is {', '.join(known)}")
    try:
        torch.empty(0, device=name)
    except RuntimeError as e:
        raise InputError(f"device {name!r} can't be used: {str(e).splitlines()[0]}") from e
    return torch.device(name)


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works, tried on one operation before the model's many; else says why, in a line.

    Only for CPUs: there it takes a C++ compiler, on GPUs it brings its own.
    """
    from hybridkv.cache.attention import why_uncompiled  # not above, where a lost link to the model is to be said first

    if device.type != "cpu":
        return True
    if why := why_uncompiled(device):
        say(f"note: decoding runs uncompiled, which is slower: {why}")
        return False
    try:
        torch.compile(lambda x: -x)(torch.zeros(1))
    except (RuntimeError, OSError) as e:  # Dynamo's errors are RuntimeErrors
        say(
            f"note: decoding runs uncompiled, which is slower: {complaint(e)}. Install a C++ compiler "
            "(Debian: apt install g++ python3-dev), or silence this with --no-compile"
        )
        return False
    return True


def complaint(error: Exception) -> str:
    """The one line of a failed compilation that says what is wrong."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    if "InvalidCxxCompiler" in lines[0]:
        return f"there is no working C++ compiler {torch._inductor.config.cpp.cxx[-1]!r}"
    return next((line for line in lines if "error: " in line), lines[0])[:300]


def read_text(path: str | Path) -> str:
    """A UTF-8 text file, its lines ended by \\n.

    Raises:
        InputError: it can't be read, or holds nothing.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(LONGEST_TEXT + 1)
    except FileNotFoundError as e:
        raise InputError(f"{path} does not exist") from e
    except (OSError, ValueError) as e:  # a ValueError for a name with a NUL
        raise InputError(f"{path} can't be read: {getattr(e, 'strerror', e)}") from e
    if len(content) > LONGEST_TEXT:
        raise InputError(f"{path} holds more than {LONGEST_TEXT // 10**6} MB of text: cut it")
    try:
        text = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as e:
        raise InputError(f"{path} is not UTF-8 text: {e.reason} at byte {e.start}") from e
    if not text.strip():
        raise InputError(f"{path} holds no text")
    return text


@contextmanager
def replacing(file: Path, option: str) -> Iterator[Path]:
    """A new file that takes the place of `file` at the end, unless something goes wrong.

    It is made at once, so that a folder that is missing or can't be written to is found before the work is done.

    Args:
        option: that named the file, for errors.
    """
    try:
        file = file.resolve()  # a link stays one
        usable = not file.exists() or (file.is_file() and os.access(file, os.W_OK))
        new = file.with_name(f".hybridkv-{os.getpid()}.tmp")
        if usable:
            new.touch()
    except (OSError, RuntimeError, ValueError) as e:  # links in a circle; a NUL, or no name at all
        raise InputError(f"{option} {file} can't be written: {getattr(e, 'strerror', e)}") from e
    if not usable:
        raise InputError(f"{option} {file} is no file that can be replaced")
    try:
        yield new
        new.replace(file)
    finally:
        new.unlink(missing_ok=True)


def check_length(prompt: Prompt, new_tokens: int, limit: int) -> None:
    """Refuses a prompt that the model can't read to its end, or answer at the wanted length."""
    tokens = len(prompt.input_ids)
    if tokens + new_tokens > limit:
        raise InputError(
            f"the prompt has {tokens} tokens, {prompt.visual_tokens} of them visual; with {new_tokens} new ones that "
            f"is more than the model's {limit}: shorten the context, use smaller pictures or ask for fewer tokens"
        )
