"""Draws the bundled demos: pictures and `demos.json` in `hybridkv/demos`. The same at every run.

python -m demo.pictures
"""

import json

from PIL import Image

from demo import boards as bd
from hybridkv.demos import DEFAULT, FOLDER

# name: what it shows, task, rows, columns, boards, seed
DEMOS = {
    DEFAULT: ("one cell among 1,024", "lookup", 32, 32, 1, 1),
    "chain": ("follow pointers from cell to cell, over 1,024 cells", "chain", 32, 32, 1, 1),
    "read": ("read a row of 1,024 cells, cell by cell", "right", 32, 32, 1, 0),
    "compare": ("where one of 576 cells points on two boards", "compare", 24, 24, 2, 1),
    "lookups": ("six cells among 1,024, in one question", "lookups", 32, 32, 1, 6),
    "large": ("follow pointers from cell to cell, over 4,096 cells", "chain", 64, 64, 1, 0),
}


def main() -> None:
    rows = []
    for name, (about, task, height, width, n, seed) in DEMOS.items():
        rng = bd.rng_for("demo", seed)
        boards = bd.make_boards(rng, n, height, width, compare=task in ("compare", "changed"))
        question = bd.ask(rng, boards, task)
        files = [f"{name}.png" if n == 1 else f"{name}-{b + 1}.png" for b in range(n)]
        for file, board in zip(files, boards, strict=True):
            picture = Image.fromarray(bd.draw(rng, board, plain=True))
            picture.quantize(64, dither=Image.Dither.NONE).save(FOLDER / file, optimize=True)
        rows.append({"name": name, "about": about, "images": files, "prompt": question.text, "answer": question.answer})
    (FOLDER / "demos.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
