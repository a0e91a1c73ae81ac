"""Rows of `bench.quality` as text, as Markdown and as a picture.

    python -m bench.report bench/results/quality-demo.jsonl --tokens 1024 --budgets 0.1
    python -m bench.report bench/results/quality-demo.jsonl --tasks lookup chain --plot quality.png
    python -m bench.report bench/results/quality-smollm2.jsonl --tasks copy --budgets 0.1 --against hybridkv

Prints a table for each model and size: a line for each policy and budget, and a column for each task with the share of
right answers and the KL to the full cache in nats per generated token. With --against, how much larger the KL is than
another policy's on the same prompts: prompts differ more than policies, so these intervals are the ones to decide by.
"""

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np


def bootstrap(values: np.ndarray, draws: int = 2000) -> tuple[float, float]:
    """95% interval of the mean over independent contexts. values (N,)"""
    pick = np.random.default_rng(0).integers(len(values), size=(draws, len(values)))
    low, high = np.quantile(values[pick].mean(1), (0.025, 0.975))
    return float(low), float(high)


def table(rows: list[dict]) -> str:
    """A line for each row, intervals included."""
    head = ("task", "tokens", "policy", "budget", "right", "KL", "resident", "read/step", "tokens/step")
    cells = [head]
    for row in rows:
        full = row["full_bytes"]
        right = (
            "-" if row["accuracy"] is None else "{:.0%} [{:.0%}, {:.0%}]".format(row["accuracy"], *row["accuracy_ci"])
        )
        cells.append(
            (
                row["task"],
                f"{row['prompt_tokens']:.0f}",
                row["policy"],
                f"{row['budget']:g}",
                right,
                "{:.4f} [{:.4f}, {:.4f}]".format(row["kl"], *row["kl_ci"]),
                f"{row['resident_bytes'] / full:.1%}",
                f"{row['step_bytes'] / full:.1%}",
                f"{row['attended_tokens']:.0f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def unique(rows: Sequence[dict], *keys: str) -> list[tuple]:
    """The different values of some keys, in the order in which they come."""
    return list(dict.fromkeys(tuple(row[key] for key in keys) for row in rows))


def markdown(rows: list[dict], intervals: bool = False, against: Sequence[dict] = ()) -> str:
    """See the module. Costs are means over the tasks; `new chunks`: how many of those read a step had to be fetched.

    Args:
        intervals: write 95% intervals of KL instead of KL alone.
        against: rows of a policy; write how much larger the KL is than theirs.

    Raises:
        ValueError: rows to be compared do not hold each prompt's KL.
    """
    blocks = []
    for model, tokens in unique(rows, "model", "tokens"):
        mine = [row for row in rows if (row["model"], row["tokens"]) == (model, tokens)]
        tasks = unique(mine, "task")
        head = ["policy", "budget", *(task for (task,) in tasks), "resident", "read a step", "tokens a step"]
        fetches = any("new_chunks" in row for row in mine)
        head += ["new chunks"] * fetches
        samples = " or ".join(map(str, sorted({row["samples"] for row in mine})))
        lines = [f"{model}, {tokens} tokens, {samples} prompts a task", "", f"| {' | '.join(head)} |"]
        lines.append("|---" * len(head) + "|")
        for policy, budget in unique(mine, "policy", "budget"):
            found = {(row["task"],): row for row in mine if (row["policy"], row["budget"]) == (policy, budget)}
            write = partial(_difference, against) if against else partial(_cell, intervals=intervals)
            cells = [write(found[task]) if task in found else "" for task in tasks]
            for cost in ("resident_bytes", "step_bytes"):
                cells.append(f"{np.mean([row[cost] / row['full_bytes'] for row in found.values()]):.1%}")
            share = np.mean([row["attended_tokens"] / row["prompt_tokens"] for row in found.values()])
            cells.append(f"{share:.1%}")
            if fetches:
                new = [row["new_chunks"] for row in found.values() if "new_chunks" in row]
                cells.append(f"{np.mean(new):.0%}" if new else "")
            lines.append(f"| {' | '.join([f'`{policy}`', f'{budget:g}', *cells])} |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _cell(row: dict, intervals: bool) -> str:
    """`97%, 0.19`, or `97%, 0.12 to 0.25`."""
    low, high, mean = (round(x, 3) + 0.0 for x in (*row["kl_ci"], row["kl"]))  # + 0.0: no minus before a zero
    kl = f"{low:.3f} to {high:.3f}" if intervals else f"{mean:.3f}"
    return kl if row["accuracy"] is None else f"{row['accuracy']:.0%}, {kl}"


def _difference(against: Sequence[dict], row: dict) -> str:
    """`+0.12 (0.10 to 0.15)`: KL of a row less that of the other policy's row at the same budget, prompt by prompt."""
    same = ("model", "task", "tokens", "budget", "samples")
    for other in against:
        if all(other[key] == row[key] for key in same):
            if "kl_each" not in row or "kl_each" not in other:
                raise ValueError(f"not every prompt's KL is in the rows of {row['policy']}: measure them again")
            more = np.array(row["kl_each"]) - np.array(other["kl_each"])
            return "{:+.3f} ({:.3f} to {:.3f})".format(more.mean(), *bootstrap(more))
    return ""


def plot(rows: list[dict], file: Path) -> None:
    """Accuracy (or, where there is none, KL) against resident bytes and against attended tokens, a line per policy."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = unique(rows, "task", "tokens")
    figure, axes = plt.subplots(len(tasks), 2, figsize=(11, 3.2 * len(tasks)), squeeze=False, sharey="row")
    for line, (task, tokens) in zip(axes, tasks, strict=True):
        mine = [row for row in rows if (row["task"], row["tokens"]) == (task, tokens)]
        for axis, (cost, label) in zip(
            line,
            (("resident_bytes", "resident, % of full cache"), ("attended_tokens", "attended, % of tokens")),
            strict=True,
        ):
            for (policy,) in unique(mine, "policy"):
                points = sorted((row for row in mine if row["policy"] == policy), key=lambda row: row[cost])
                whole = "full_bytes" if cost == "resident_bytes" else "prompt_tokens"
                x = [100 * row[cost] / row[whole] for row in points]
                key = "kl" if mine[0]["accuracy"] is None else "accuracy"
                y = np.array([row[key] for row in points])
                spread = np.array([row[f"{key}_ci"] for row in points])
                axis.errorbar(x, y, abs(spread.T - y), label=policy, marker="o", ms=4, lw=1.2, capsize=2)
            axis.set(title=f"{task}, {mine[0]['prompt_tokens']:.0f} tokens", xlabel=label, ylabel=key, xscale="log")
            axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("files", type=Path, nargs="+", help="JSON lines of bench.quality")
    for name, kind in (("tasks", str), ("tokens", int), ("budgets", float), ("policies", str)):
        add(f"--{name}", type=kind, nargs="+", help="only these")
    add("--intervals", action="store_true", help="95%% intervals of KL instead of KL")
    help = "how much larger the KL is than that of POLICY at the same budget, on the same prompts"
    add("--against", metavar="POLICY", help=help)
    add("--plot", type=Path, help="a picture, too")
    args = parser.parse_args(argv)
    try:
        rows = [json.loads(line) for file in args.files for line in file.read_text().splitlines()]
    except (OSError, ValueError) as e:
        parser.error(f"not JSON lines: {e}")
    against = [row for row in rows if row["policy"] == args.against]
    if args.against and not against:
        parser.error(f"there are no rows of {args.against}")
    for key, only in (
        ("task", args.tasks),
        ("tokens", args.tokens),
        ("budget", args.budgets),
        ("policy", args.policies),
    ):
        rows = [row for row in rows if not only or row[key] in only]
    if not rows:
        parser.error("no row is left of what was asked for")
    try:
        print(markdown(rows, args.intervals, against))
    except ValueError as e:
        parser.error(str(e))
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
