"""Lines a second of `generate --batch`: many prompts at once, against one after the other.

    python -m bench.batch --tokens 1024 --lines 16 --out bench/results/batch-cpu.jsonl

Questions about boards, by the bundled model: all about one board, and each about its own. `one by one` is the command
with room for one prompt (`--memory`): what two prompts share is read once all the same, which `together` has in common
with it. Nothing is compiled, and the model is loaded already. Seconds are the processor's on a CPU with one thread.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from bench.common import cpu_name, write_row
from bench.readings import clock, timed
from demo import boards as bd
from hybridkv.batch import Batch
from hybridkv.batch_lines import Answers, read_lines
from hybridkv.config import HybridConfig
from hybridkv.demos import MODEL
from hybridkv.engine import Engine
from hybridkv.model import Processor, from_pretrained
from hybridkv.sampling import Sampling

NEW_TOKENS = 8


def write_prompts(folder: Path, tokens: int, lines: int, pictures: int) -> Path:
    """A file of prompts, in turn about one of so many boards."""
    side, rows = round(tokens**0.5), []
    boards, images = [], []
    for i in range(pictures):
        rng = bd.rng_for("test", 10_000 * tokens + 950_000_000 + i)
        boards.append((rng, bd.make_boards(rng, 1, side, side)))
        images.append(folder / f"{i}.png")
        Image.fromarray(bd.draw(rng, boards[i][1][0])).save(images[i])
    for i in range(lines):
        question = bd.ask(*boards[i % pictures], "lookup")
        rows.append({"prompt": question.text, "images": [str(images[i % pictures])]})
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def measure(engine: Engine, processor: Processor, tokens: int, lines: int, pictures: int) -> dict:
    """Seconds for all lines, at once and one by one."""
    row = {"tokens": tokens, "lines": lines, "pictures": pictures}
    now = clock(engine.model.device)
    with tempfile.TemporaryDirectory() as folder:
        file = write_prompts(Path(folder), tokens, lines, pictures)
        for name, memory in (("warm_up", 1 << 40), ("together", 1 << 40), ("one_by_one", 1)):
            out = Path(folder) / name
            answers = Answers(out, read_lines(file), "")
            batch = Batch(engine, processor, answers, {}, NEW_TOKENS, Sampling(), memory)
            row[f"{name}_s"], _ = timed(lambda batch=batch, file=file: batch.run(read_lines(file)), now)
            row[f"{name}_text"] = {line["line"]: line["text"] for line in map(json.loads, out.read_text().splitlines())}
    texts = [row.pop(f"{name}_text") for name in ("warm_up", "together", "one_by_one")]
    return row | {"same": texts[1] == texts[2]}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tokens", type=int, default=1024, help="of each board (default: 1024)")
    add("--lines", type=int, default=16, help="prompts (default: 16)")
    add("--budget", type=float, default=0.1)
    add("--device", default="cpu")
    add("--out", type=Path, help="append JSON lines to this file")
    args = parser.parse_args(argv)
    model, processor = from_pretrained(MODEL, dtype=torch.float32, device=args.device), Processor.from_pretrained(MODEL)
    command = f"python -m bench.batch {' '.join(sys.argv[1:] if argv is None else argv)}"
    about = {"budget": args.budget, "machine": cpu_name(), "threads": torch.get_num_threads()}
    about |= {"torch": torch.__version__, "command": command}
    print(command)
    for pictures in (1, args.lines):
        config = HybridConfig(budget=args.budget, strict=False)
        engine = Engine(model, config, eos=model.cfg.eos_token_id, compile=False)
        row = measure(engine, processor, args.tokens, args.lines, pictures)
        gain = row["one_by_one_s"] / row["together_s"]
        print(
            f"{args.lines} lines about {pictures} boards: {row['together_s']:.2f} s at once, "
            f"{row['one_by_one_s']:.2f} s one by one ({gain:.1f}x); same answers: {row['same']}",
            flush=True,
        )
        write_row(args.out, row | about)


if __name__ == "__main__":
    main()
