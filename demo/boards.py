"""Boards: pictures of cells with a key, a pointer and a colour each, and questions whose answers lie in single cells.

A cell is 28 x 28 pixels, exactly one visual token of Qwen2.5-VL. Its upper two glyphs are its key, its lower two the
key of the cell it points to (nothing below: it points nowhere), and its paper has a colour. A prompt shows one to four
boards. Every key occurs once in a prompt, so that each question has one answer; only `compare` shows the same keys
twice, with some pointers changed.

Everything is drawn from a seed. Splits never share one, and the generator's version is part of it.

    python -m demo.boards FILE --task chain --rows 16 --cols 16
"""

import argparse
import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from einops import rearrange, repeat
from PIL import Image, ImageDraw, ImageFont

VERSION = 1  # raise it whenever the same seed would give another sample
SPLITS = ("train", "validation", "test", "demo")

GLYPHS = "ABCDEFGHJKLMNPQRSTUVWXYZ23456789abdefghijkmnqrty"  # 48, none mistaken for another
KEYS = [a + b for a in GLYPHS for b in GLYPHS]  # key i is the glyphs i // 48 and i % 48
END = "end"  # what follows the last cell of a chain, a row, a column
COLOURS = {
    "red": (255, 170, 165),
    "orange": (255, 205, 130),
    "yellow": (248, 245, 140),
    "green": (165, 230, 165),
    "blue": (165, 205, 255),
    "purple": (215, 180, 250),
    "white": (252, 252, 252),
    "grey": (198, 198, 198),
}
CELL, PATCH = 28, 14  # pixels
NONE = -1  # no key: a blank cell; no value: it points nowhere

TASKS = ("lookup", "lookups", "colour", "right", "down", "chain", "compare", "changed", "which", "describe")
"""lookup    where one cell points
lookups   where several cells point
colour    the colour of a cell's paper
right     the keys from a cell to the next blank cell or the edge, rightward
down      the same, downward
chain     the keys that one meets when following the pointers from a cell
compare   where a cell points on the first and on the second board
changed   the one cell that points elsewhere on the second board, and both pointers
which     the board that holds a cell
describe  keys, colours and pointers of the cells from one to the next blank cell or the edge, rightward"""

Cell = tuple[int, int, int]  # board, row, column


@dataclass(frozen=True)
class Board:
    """keys, values (NONE or an index into KEYS) and colours, each (rows, cols) integers."""

    keys: np.ndarray
    values: np.ndarray
    colours: np.ndarray


@dataclass(frozen=True)
class Question:
    """One question, its answer, and the cells that hold the evidence in the order in which they are needed."""

    task: str
    text: str
    answer: str
    evidence: list[Cell]


@dataclass(frozen=True)
class Sample:
    """Pictures and one question about them, as `Processor` takes them."""

    images: list[Image.Image]
    question: Question
    seed: tuple[int, ...] = field(default=())  # (version, split, index)


def rng_for(split: str, index: int) -> np.random.Generator:
    return np.random.default_rng((VERSION, SPLITS.index(split), index))


# ---- layout ---------------------------------------------------------------------------------------------------------


def words(rng: np.random.Generator, rows: int, cols: int, filled: float) -> np.ndarray:
    """(rows, cols) bool: rows of words, runs of 3 to 12 written cells; gaps leave about `filled`."""
    written = np.ones((rows, cols), dtype=bool)
    for r in range(rows):
        c = int(rng.integers(0, 3))
        written[r, :c] = filled > 0.95
        while c < cols:
            run = int(rng.integers(3, 13))
            c += run
            gap = rng.poisson(run * (1 - filled) / filled)
            written[r, c : c + gap] = False
            c += gap
    return written


def make_boards(rng: np.random.Generator, n: int, rows: int, cols: int, compare: bool = False) -> list[Board]:
    """`n` boards; with `compare` the second repeats the first with another pointer in one cell."""
    boards_with_keys = 1 if compare else n
    cells = boards_with_keys * rows * cols
    filled = min(0.93 if cells > 64 else 1.0, 0.9 * len(KEYS) / cells)
    written = np.stack([words(rng, rows, cols, filled) for _ in range(boards_with_keys)])
    at = np.argwhere(written)  # (M, 3)
    at = at[rng.permutation(len(at))[: len(KEYS)]]
    names = rng.permutation(len(KEYS))[: len(at)]
    keys = np.full(written.shape, NONE)
    values = np.full(written.shape, NONE)
    keys[tuple(at.T)] = names
    # The shuffled cells fall into chains of 2 to 9; each points to the next one, the last of a chain nowhere.
    lengths = rng.integers(2, 10, size=len(at))
    last = np.cumsum(lengths) - 1
    follows = np.append(names[1:], NONE)
    follows[last[last < len(at)]] = NONE
    values[tuple(at.T)] = follows
    colours = rng.integers(0, len(COLOURS), size=written.shape)
    boards = [Board(k, v, c) for k, v, c in zip(keys, values, colours, strict=True)]
    if compare:
        changed = values[0].copy()
        r, c = _pick(rng, np.argwhere(values[0] != NONE))
        others = names[(names != values[0, r, c]) & (names != keys[0, r, c])]
        changed[r, c] = rng.choice(others)
        boards.append(Board(keys[0], changed, colours[0]))
    return boards


def _pick(rng: np.random.Generator, rows: np.ndarray) -> tuple[int, ...]:
    return tuple(int(i) for i in rows[rng.integers(len(rows))])


# ---- questions ------------------------------------------------------------------------------------------------------


def name(key: int) -> str:
    return END if key == NONE else KEYS[key]


def run_from(board: Board, r: int, c: int, step: tuple[int, int]) -> list[tuple[int, int]]:
    """The written cells from (r, c) on in one direction, up to a blank one or the edge."""
    rows, cols = board.keys.shape
    cells = []
    while r < rows and c < cols and board.keys[r, c] != NONE:
        cells.append((r, c))
        r, c = r + step[0], c + step[1]
    return cells


def chain_from(where: dict[int, Cell], boards: list[Board], start: Cell) -> list[Cell]:
    cells = [start]
    while (value := int(boards[cells[-1][0]].values[cells[-1][1:]])) != NONE:
        cells.append(where[value])
    return cells


def ask(rng: np.random.Generator, boards: list[Board], task: str, hard: bool = True, start: Cell | None = None):
    """One question about the boards. `hard` means longer answers; `start` fixes the cell that the question names.

    Raises:
        ValueError: these boards do not carry that task.
    """
    if (task in ("compare", "changed")) != _repeats(boards):
        raise ValueError(f"{task!r} can't be asked about these boards")
    at = np.stack([b.keys for b in boards])
    written = np.argwhere(at[:1] != NONE if _repeats(boards) else at != NONE)
    if task == "compare" and start is None and rng.random() < 0.5:
        start = (0, *_changed(boards))
    b, r, c = start or _pick(rng, written)
    first = boards[b]
    key = name(first.keys[r, c])

    if task in ("lookup", "compare", "colour", "which"):
        cells = [(b, r, c)]
        if task == "lookup":
            text, found = f"Where does {key} point?", name(first.values[r, c])
        elif task == "colour":
            text, found = f"What colour is {key}?", list(COLOURS)[first.colours[r, c]]
        elif task == "which":
            text, found = f"Which board has {key}?", str(b + 1)
        else:
            cells.append((1, r, c))
            text, found = f"Compare {key}.", f"{name(first.values[r, c])} {name(boards[1].values[r, c])}"
        return Question(task, text, f"{key} {found}", cells)
    if task == "changed":
        r, c = _changed(boards)
        before, after = name(boards[0].values[r, c]), name(boards[1].values[r, c])
        return Question(task, "What changed?", f"{name(first.keys[r, c])} {before} {after}", [(0, r, c), (1, r, c)])
    if task == "lookups":
        n = int(rng.integers(3, 7)) if hard else 2
        cells = [(b, r, c)] + [_pick(rng, written) for _ in range(n - 1)]
        asked = [name(boards[i].keys[y, x]) for i, y, x in cells]
        found = [name(boards[i].values[y, x]) for i, y, x in cells]
        pairs = " ".join(f"{k} {v}" for k, v in zip(asked, found, strict=True))
        return Question(task, f"Where do {' '.join(asked)} point?", pairs, cells)
    if task == "chain":
        where = {int(at[tuple(cell)]): tuple(cell) for cell in written.tolist()}
        candidates = [start] if start else [_pick(rng, written) for _ in range(8)]
        chains = sorted((chain_from(where, boards, s) for s in candidates), key=len)
        cells = chains[-1 if hard else len(chains) // 2]
        names = [name(boards[i].keys[y, x]) for i, y, x in cells]
        return Question(task, f"Follow {names[0]}.", " ".join([*names, END]), cells)
    if task not in ("right", "down", "describe"):
        raise ValueError(f"unknown task {task!r}; there are {', '.join(TASKS)}")
    step = (1, 0) if task == "down" else (0, 1)
    starts = [(b, r, c)] if start else [(b, r, c)] + [_pick(rng, written) for _ in range(5)]
    runs = sorted(([(i, *cell) for cell in run_from(boards[i], y, x, step)] for i, y, x in starts), key=len)
    cells = runs[-1 if hard else len(runs) // 2]
    names = [name(boards[i].keys[y, x]) for i, y, x in cells]
    if task == "describe":
        paper = [list(COLOURS)[boards[i].colours[y, x]] for i, y, x in cells]
        points = [name(boards[i].values[y, x]) for i, y, x in cells]
        parts = [f"{k} {p} {v}" for k, p, v in zip(names, paper, points, strict=True)]
        return Question(task, f"Describe the row from {names[0]}.", " ".join([*parts, END]), cells)
    return Question(task, f"Read {task} from {names[0]}.", " ".join([*names, END]), cells)


def _changed(boards: list[Board]) -> tuple[int, int]:
    ((r, c),) = np.argwhere(boards[0].values != boards[1].values).tolist()
    return r, c


def _repeats(boards: list[Board]) -> bool:
    return len(boards) == 2 and np.array_equal(boards[0].keys, boards[1].keys)


# ---- pictures -------------------------------------------------------------------------------------------------------


@cache
def fonts() -> list[Path | None]:
    """Font files to vary over: Pillow's own (None), and the DejaVu family that matplotlib brings.

    Raises:
        ImportError: without it. With fewer fonts, every board of every seed would be another one.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("boards are drawn in fonts that matplotlib brings: pip install matplotlib") from error
    folder = Path(matplotlib.get_data_path()) / "fonts/ttf"
    styles = ("Sans", "Sans-Bold", "SansMono", "SansMono-Bold", "Serif", "Serif-Bold")
    return [None, *(folder / f"DejaVu{style}.ttf" for style in styles)]


@cache
def atlas(font: Path | None, size: int) -> np.ndarray:
    """Ink (49, 3, 3, 14, 14) in 0 to 1 of every glyph, shifted by -1 to 1 pixels; the last one is empty."""
    face = ImageFont.load_default(size) if font is None else ImageFont.truetype(str(font), size)
    ink = np.zeros((len(GLYPHS) + 1, 3, 3, PATCH, PATCH), dtype=np.float32)
    for g, glyph in enumerate(GLYPHS):
        left, top, right, bottom = face.getbbox(glyph)
        for dy in range(3):
            for dx in range(3):
                patch = Image.new("L", (PATCH, PATCH))
                x, y = (PATCH - right - left) / 2 + dx - 1, (PATCH - bottom - top) / 2 + dy - 1
                ImageDraw.Draw(patch).text((round(x), round(y)), glyph, font=face, fill=255)
                ink[g, dy, dx] = np.asarray(patch) / 255
    return ink


def draw(rng: np.random.Generator, board: Board, plain: bool = False) -> np.ndarray:
    """Pixels (rows * 28, cols * 28, 3) uint8. `plain`: one font, black on flat paper, nothing shifted, no noise."""
    rows, cols = board.keys.shape
    styles = fonts()
    ink = atlas(None if plain else styles[rng.integers(len(styles))], 12 if plain else int(rng.integers(10, 13)))
    pairs = np.stack([board.keys, board.values])  # (2, R, C): above, below
    glyphs = np.stack([pairs // len(GLYPHS), pairs % len(GLYPHS)])  # (left or right, above or below, R, C)
    glyphs = np.where(pairs == NONE, len(GLYPHS), glyphs)
    shift = np.ones((2, *glyphs.shape), dtype=int) if plain else rng.integers(0, 3, size=(2, *glyphs.shape))
    cover = rearrange(ink[glyphs, shift[0], shift[1]], "x y r c h w -> (r y h) (c x w) 1")

    palette = np.array([*COLOURS.values(), (236, 236, 236)], dtype=np.float32)
    tint = palette[np.where(board.keys == NONE, len(COLOURS), board.colours)]  # (R, C, 3)
    pen = np.zeros(3, dtype=np.float32)
    if not plain:
        pen = rng.uniform(0, 70, size=3).astype(np.float32)
        tint *= rng.uniform(0.93, 1.0, size=(rows, cols, 1)).astype(np.float32)
    paper = repeat(tint, "r c k -> (r h) (c w) k", h=CELL, w=CELL)
    paper[::CELL] *= 0.85  # a thin line between cells
    paper[:, ::CELL] *= 0.85
    pixels = paper + cover * (pen - paper)
    for side in (pixels[:1], pixels[-1:], pixels[:, :1], pixels[:, -1:]):
        side[:] = 30  # the frame
    if not plain:
        noise = rng.standard_normal(pixels.shape[:2], dtype=np.float32)
        pixels += noise[..., None] * rng.uniform(0, 12)
    return pixels.clip(0, 255).astype(np.uint8)


def make_sample(split: str, index: int, task: str, rows: int, cols: int, n: int | None = None) -> Sample:
    """Sample `index` of a split: `n` boards of rows x cols cells (None: what the task needs at least)."""
    rng = rng_for(split, index)
    paired = task in ("compare", "changed")
    n = n or (2 if paired or task == "which" else 1)
    boards = make_boards(rng, n, rows, cols, compare=paired)
    images = [Image.fromarray(draw(rng, board)) for board in boards]
    return Sample(images, ask(rng, boards, task), (VERSION, SPLITS.index(split), index))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the picture to write; more boards get -2, -3, -4 in their names")
    parser.add_argument("--task", choices=TASKS, default="chain")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--cols", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    sample = make_sample("demo", args.seed, args.task, args.rows, args.cols)
    for i, image in enumerate(sample.images):
        image.save(args.file if i == 0 else args.file.with_stem(f"{args.file.stem}-{i + 1}"))
    q = sample.question
    print(json.dumps({"question": q.text, "answer": q.answer, "evidence": q.evidence, "seed": sample.seed}))


if __name__ == "__main__":
    main()
