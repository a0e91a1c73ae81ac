"""The picture in docs/quality.md, from the rows there: right answers at equal bytes, and milliseconds a step.

python -m bench.overview docs/overview.png
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
TASKS = {"lookup": "one cell", "lookups": "several cells", "right": "read a row", "chain": "follow pointers"}
CACHES = {  # policy and budget: label and colour
    ("full", 1.0): ("full cache", "#9a9a9a"),
    ("hybridkv", 0.1): ("HybridKV: reads a tenth, holds a third", "#1f6fb2"),
    ("snapkv", 0.1): ("SnapKV: reads and holds a tenth", "#f2b66d"),
    ("snapkv", 0.33): ("SnapKV: reads and holds a third", "#d9741a"),
}
STEPS = {"full": ("the faster full cache", "#9a9a9a"), "hybridkv 0.1": ("HybridKV, a tenth", "#1f6fb2")}


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]


def answers(axis) -> None:
    """Bars: the share of right answers of each cache on each task, on boards of 1,024 visual tokens."""
    found = {
        (row["policy"], row["budget"], row["task"]): row
        for row in rows("quality-demo.jsonl")
        if 1024 <= row["visual_tokens"] < 1025
    }
    for i, ((policy, budget), (label, colour)) in enumerate(CACHES.items()):
        shares = [100 * found[policy, budget, task]["accuracy"] for task in TASKS]
        bars = axis.bar([x + 0.2 * (i - 1.5) for x in range(len(TASKS))], shares, 0.19, color=colour, label=label)
        axis.bar_label(bars, [f"{share:.0f}" for share in shares], fontsize=8)
    axis.set(ylim=(0, 145), yticks=(0, 50, 100), ylabel="right answers, %", title="1,024 visual tokens, bundled model")
    axis.set_xticks(range(len(TASKS)), TASKS.values())
    axis.legend(fontsize=8.5, ncols=2, loc="upper center", frameon=False, columnspacing=1)


def steps(axis) -> None:
    """Lines: milliseconds of a decoding step against the context, one sequence, on two cores."""
    for contender, (label, colour) in STEPS.items():
        points = sorted(
            (row["context"], row["ms_per_token"])
            for row in rows("decode-cpu.jsonl")
            if (row["contender"], row["model"], row["batch"]) == (contender, "small", 1)
        )
        axis.plot(*zip(*points, strict=True), marker="o", color=colour, label=label)
        for x, y in points:
            above = contender == "full"
            axis.annotate(f"{y:.0f}", (x, y), (0, 6 if above else -13), textcoords="offset points", ha="center")
    axis.set(xscale="log", yscale="log", ylim=(3.5, 300), xlabel="tokens in the cache", ylabel="ms a decoding step")
    contexts = [x for x, _ in points]
    axis.set_xticks(contexts, [f"{x:,}" for x in contexts])
    axis.set_yticks([5, 10, 50, 100], ["5", "10", "50", "100"])
    axis.minorticks_off()
    axis.set_title("two CPU cores, two decoder layers")
    axis.legend(fontsize=9, frameon=False)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.overview", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="the picture to write")
    args = parser.parse_args(argv)
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), width_ratios=(1.5, 1))
    answers(axes[0])
    steps(axes[1])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(args.file, dpi=160)


if __name__ == "__main__":
    main()
