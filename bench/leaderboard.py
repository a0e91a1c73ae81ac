"""Results of lmms-eval for several policies and budgets as one table, and as one picture: score against resident bytes.

    python -m bench.leaderboard RESULTS
    python -m bench.leaderboard RESULTS OTHER_results.json --plot leaderboard.png

Takes the files that lmms-eval writes to --output_path, `*_results.json`, or folders with them. A line for each model,
policy and budget, a column for each task; of a task that was run twice the later run counts. Where a task has several
metrics its first one is shown, or the one that --metrics names. What the device held, and what a step read, comes from
our models (`hybridkv.lmms`), as shares of a full cache's bytes; other models say nothing, and have a dash.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

COSTS = ("resident_share", "step_share")


@dataclass
class Line:
    """One model, policy and budget.

    Attributes:
        scores: of each task, by its metric.
        costs: of each run, by `COSTS`; None where the model did not say.
    """

    name: str
    scores: dict[str, float] = field(default_factory=dict)
    costs: list[dict[str, float | None]] = field(default_factory=list)

    def cost(self, name: str) -> float | None:
        """Mean over runs."""
        known = [run[name] for run in self.costs if run[name] is not None]
        return sum(known) / len(known) if known else None


def find(places: Iterable[Path]) -> list[Path]:
    """Result files, from the oldest to the newest: their names begin with the date.

    Raises:
        ValueError: there are none in one of the places.
    """
    files = []
    for place in places:
        found = [place] if place.is_file() else sorted(place.rglob("*_results.json"))
        if not found:
            raise ValueError(f"{place} holds no *_results.json: give what lmms-eval's --output_path was")
        files += found
    return sorted(dict.fromkeys(files), key=lambda file: file.name)


def arguments(text: str | dict) -> dict[str, str]:
    """`a=1,b=2` of --model_args."""
    if isinstance(text, dict):
        return {name: str(value) for name, value in text.items()}
    return dict(part.split("=", 1) for part in (text or "").split(",") if "=" in part)


def name_of(config: dict) -> str:
    """What a line is called: the model, or our policy and budget, and other settings that matter."""
    given = arguments(config.get("model_args", ""))
    if not str(config["model"]).startswith("hybridkv"):
        return str(config["model"])
    policy = given.get("policy", "hybridkv")
    parts = [policy] if policy in ("full", "dense") else [policy, f"{float(given.get('budget', 0.1)):g}"]
    unimportant = ("pretrained", "policy", "budget", "compile", "device", "dtype")
    parts += [f"{k}={v}" for k, v in sorted(given.items()) if k not in unimportant]
    return " ".join(parts) + (" (adapter)" if config["model"] == "hybridkv_hf" else "")


def read(files: Sequence[Path], metrics: Sequence[str] = ()) -> list[Line]:
    """The lines, in the order in which they first come.

    Raises:
        ValueError: a file is none of lmms-eval's.
    """
    lines: dict[str, Line] = {}
    for file in files:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            name, results = name_of(content["config"]), content["results"]
            shares = {cost: (content.get("throughput") or {}).get(f"avg_{cost}") for cost in COSTS}
            results = {task: dict(found) for task, found in results.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"{file} is not a result file of lmms-eval: {e!r}") from e
        line = lines.setdefault(name, Line(name))
        for task, found in results.items():
            known = {
                key.partition(",")[0]: value
                for key, value in found.items()
                if isinstance(value, int | float) and "," in key and "_stderr" not in key
            }
            if known:
                metric = next((m for m in metrics if m in known), next(iter(known)))
                line.scores[f"{task} ({metric})" if metric != "milebench" else task] = float(known[metric])
        line.costs.append(shares)
    return list(lines.values())


def markdown(lines: Sequence[Line]) -> str:
    """The table; a task that a line lacks is a dash, and `mean` is over what all lines have."""
    tasks = list(dict.fromkeys(task for line in lines for task in line.scores))
    common = [task for task in tasks if all(task in line.scores for line in lines)]
    rows = [["cache", *tasks, "mean", "resident", "read a step"]]
    for line in lines:
        scores = [f"{line.scores[task]:.3f}" if task in line.scores else "-" for task in tasks]
        mean = f"{sum(line.scores[task] for task in common) / len(common):.3f}" if common else "-"
        costs = ["-" if (share := line.cost(cost)) is None else f"{share:.1%}" for cost in COSTS]
        rows.append([f"`{line.name}`", *scores, mean, *costs])
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def plot(lines: Sequence[Line], file: Path) -> None:
    """Mean score of the common tasks against resident bytes, a point for each line that knows both.

    Raises:
        ValueError: there is none.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    common = [task for task in lines[0].scores if all(task in line.scores for line in lines)]
    known = [line for line in lines if line.cost("resident_share") is not None and common]
    if not known:
        raise ValueError("nothing to draw: no line says what was resident and has the tasks of the others")
    figure, axis = plt.subplots(figsize=(6.4, 4))
    for line in known:
        x, y = 100 * line.cost("resident_share"), sum(line.scores[task] for task in common) / len(common)
        axis.scatter(x, y, color="#1f6fb2" if line.name.startswith("hybridkv") else "#8a8a8a", zorder=3)
        axis.annotate(line.name, (x, y), (6, 5), textcoords="offset points", fontsize=9)
    axis.set(xlabel="resident, % of a full cache's bytes", ylabel=f"mean score of {len(common)} tasks")
    axis.margins(0.2)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(file, dpi=150)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.leaderboard", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="+", type=Path, help="result files of lmms-eval, or folders with them")
    parser.add_argument("--metrics", nargs="+", default=[], metavar="NAME", help="shown where a task has several")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw score against resident bytes")
    args = parser.parse_args(argv)
    try:
        lines = read(find(args.results), args.metrics)
        print(markdown(lines))
        if args.plot:
            plot(lines, args.plot)
    except (ValueError, OSError) as e:
        parser.exit(2, f"{parser.prog}: error: {e}\n")


if __name__ == "__main__":
    sys.exit(main())
