"""How often a trained checkpoint answers right, full cache, by task and number of visual tokens, on the test split.

    python -m demo.evaluate FOLDER --boards 20

Many questions share a board, as in training; an answer counts only if every token of it is right. Intervals are 95%
bootstraps over boards.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from demo import boards as bd
from demo.batches import COMPARED, SINGLE, Batch, Scene, make_batch
from demo.trainee import answer_states
from hybridkv.model import Model, from_pretrained

TOKENS = (64, 256, 1024, 4096)  # visual tokens of a prompt: square boards


def exact(logits: Tensor, batch: Batch) -> dict[str, tuple[int, int]]:
    """Right answers and answers per task. An answer is right if each of its tokens is the likeliest after the right
    ones before it, which is when greedy decoding gives it."""
    labels, question, tasks = batch.labels.cpu(), batch.question.cpu(), batch.task.cpu()  # not a wait for each question
    wrong = torch.zeros_like(labels, dtype=torch.bool)
    wrong[labels >= 0] = logits.argmax(-1).cpu() != labels[labels >= 0]
    counts = {}
    for b in range(len(question)):
        for q in range(int(question[b].max()) + 1):
            mine = question[b] == q
            task = bd.TASKS[int(tasks[b][mine][0])]
            right, total = counts.get(task, (0, 0))
            counts[task] = (right + int(not wrong[b][mine].any()), total + 1)
    return counts


def scenes(tokens: int) -> Iterator[tuple[Scene, dict[str, float]]]:
    """One board, two different boards and two boards to compare, each with `tokens` cells in all."""
    side = math.isqrt(tokens)
    yield Scene(side, side), dict.fromkeys(SINGLE, 1.0)
    yield Scene(side, side // 2, 2), {"which": 1.0}
    yield Scene(side, side // 2, 2, True), dict.fromkeys(COMPARED, 1.0)


def interval(right: list[int], total: list[int], draws: int = 2000) -> tuple[float, float]:
    """95% bootstrap interval of sum(right) / sum(total) over boards."""
    pick = np.random.default_rng(0).integers(len(right), size=(draws, len(right)))
    shares = np.array(right)[pick].sum(1) / np.array(total)[pick].sum(1)
    return tuple(float(x) for x in np.quantile(shares, (0.025, 0.975)))


def answer_logits(model: Model, batch: Batch) -> Tensor:
    """Logits (M, vocab) of a checkpoint at the M labelled tokens."""
    seen = model.visual(batch.patches.to(model.dtype), batch.grids)
    return model.logits(answer_states(model, model.embed_tokens.weight, seen, batch))


def unseen(tokens: int, boards: int, split: str, room: int = 640) -> Iterator[Batch]:
    """`boards` prompts of each kind of scene, with `room` tokens of questions and answers each."""
    for kind, (scene, tasks) in enumerate(scenes(tokens)):
        for i in tqdm(range(boards), desc=f"{tokens} tokens", leave=False, disable=None):
            yield make_batch(bd.rng_for(split, 1_000_000 * tokens + 1000 * kind + i), scene, 1, tasks, room)


@torch.no_grad()
def evaluate(logits: Callable[[Batch], Tensor], batches: Iterable[Batch], tokens: int, device: str) -> list[dict]:
    """Rows of task, visual tokens, questions, boards, accuracy and its interval.

    Args:
        logits: gives (M, vocab) at a batch's M labelled tokens.
        batches: see `unseen`, of so many visual `tokens`.
    """
    counts: dict[str, list[tuple[int, int]]] = {}
    for batch in batches:
        batch = batch.to(device)
        for task, count in exact(logits(batch), batch).items():
            counts.setdefault(task, []).append(count)
    rows = []
    for task in (t for t in bd.TASKS if t in counts):
        right, total = zip(*counts[task], strict=True)
        low, high = interval(right, total)
        rows.append(
            {
                "task": task,
                "visual_tokens": tokens,
                "questions": sum(total),
                "boards": len(total),
                "accuracy": round(sum(right) / sum(total), 4),
                "accuracy_ci": [round(low, 4), round(high, 4)],
            }
        )
    return rows


def table(rows: list[dict]) -> str:
    """Markdown: a line per task, a column per number of visual tokens."""
    sizes = sorted({row["visual_tokens"] for row in rows})
    cell = {(row["task"], row["visual_tokens"]): row for row in rows}
    lines = ["| task | " + " | ".join(f"{n:,} tokens" for n in sizes) + " |", "|---|" + "---|" * len(sizes)]
    for task in bd.TASKS:
        shown = [cell[task, n] for n in sizes]
        lines.append(f"| {task} | " + " | ".join(f"{r['accuracy']:.1%} of {r['questions']}" for r in shown) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a checkpoint folder")
    parser.add_argument("--tokens", type=int, nargs="+", choices=TOKENS, default=TOKENS, help="visual tokens")
    parser.add_argument("--boards", type=int, default=20, help="prompts per size and kind (default: 20)")
    parser.add_argument("--split", choices=bd.SPLITS, default="test")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="rows as JSON lines")
    args = parser.parse_args()
    model = from_pretrained(args.folder, dtype=torch.float32, device=args.device)
    rows = []
    for tokens in args.tokens:
        batches = unseen(tokens, args.boards, args.split)
        rows += evaluate(partial(answer_logits, model), batches, tokens, args.device)
        print(table(rows), flush=True)
    if args.out:
        args.out.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
