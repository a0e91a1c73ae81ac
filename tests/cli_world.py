"""Where fuzzed command lines run: files, the bundled model, and what became of them."""

import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from PIL import Image

from hybridkv import HeadProfile, calibrate, demos, generate
from hybridkv.model import Processor, from_pretrained


@dataclass
class World:
    """Files for the command lines, and the bundled model, which is loaded once."""

    folder: Path
    model: torch.nn.Module
    processor: Processor

    def path(self, name: str) -> str:
        return str(self.folder / name)


@dataclass
class Outcome:
    code: int
    out: str
    err: str


def make_world(folder: Path) -> World:
    for name, size in (("small", 56), ("middle", 112), ("wide", 168)):
        Image.new("RGB", (size * 2, size), (size, 80, 9)).save(folder / f"{name}.png")
    (folder / "context.txt").write_text("Where does V3 point? " * 20)
    (folder / "bom.txt").write_bytes(b"\xef\xbb\xbf" + b"V3 K8 " * 20)
    (folder / "empty").write_bytes(b"")
    (folder / "binary").write_bytes(bytes(range(256)))
    (folder / "cut.png").write_bytes((folder / "wide.png").read_bytes()[:120])
    (folder / "circle").symlink_to(folder / "circle")
    (folder / "folder").mkdir()
    good = {"need": [[1.0] * 4] * 8, "visual": [[0.5] * 4] * 8, "prompts": 1, "model": "demo"}
    HeadProfile(torch.rand(8, 4), torch.rand(8, 4)).save(folder / "heads.json")
    bad = {
        "infinite": good | {"need": [[float("inf")] * 4] * 8},
        "nan": good | {"visual": [[float("nan")] * 4] * 8},
        "negative": good | {"need": [[-1.0] * 4] * 8},
        "flat": good | {"need": [1.0] * 4},
        "ragged": good | {"need": [[1.0], [1.0, 2.0]]},
        "other": good | {"need": [[1.0] * 2] * 3, "visual": [[1.0] * 2] * 3},
        "words": good | {"need": "all"},
        "lacking": {"need": good["need"]},
    }
    for name, row in bad.items():
        (folder / f"heads-{name}.json").write_text(json.dumps(row))
    (folder / "heads-deep.json").write_text("[" * 100_000)
    model = from_pretrained(demos.MODEL, dtype=torch.float32, progress=False)
    return World(folder, model, Processor.from_pretrained(demos.MODEL))


def files(world: World) -> list[str]:
    """Names of files that are good for something, or for nothing."""
    names = [path.name for path in sorted(world.folder.iterdir())] + [
        "none.png",
        "small.png/x",
        "x" * 300,
        "🦜.png",
        "\udcff.png",
    ]
    other = [
        "",
        ".",
        "/",
        "~nobody/x",
        "~",
        "a\0b",
        "x/" * 3000,
        "/dev/null",
        "\ud800",
        " ",
        "-",
        "http://localhost/a.png",
    ]
    return [world.path(name) for name in names] + other


@contextmanager
def bundled_model_kept(world: World) -> Iterator[None]:
    """The commands get the model that is loaded already; anything else they load themselves."""

    def kept(ours: object, load: Callable) -> Callable:
        return lambda name, **how: ours if name == demos.MODEL else load(name, **how)

    model = kept(world.model, from_pretrained)
    processor = kept(world.processor, Processor.from_pretrained)
    with (
        patch.object(generate, "from_pretrained", model),
        patch.object(calibrate, "from_pretrained", model),
        patch.object(Processor, "from_pretrained", processor),
    ):
        yield


def run(main: Callable, argv: list[str]) -> Outcome:
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")
    code = 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main(argv)
        except SystemExit as stop:
            code = stop.code
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode())
    return Outcome(code, *texts)


def refused(outcome: Outcome, command: str) -> bool:
    line = outcome.err.removesuffix("\n")
    return outcome.code == 2 and line.startswith(f"python -m hybridkv.{command}: error: ") and "\n" not in line
