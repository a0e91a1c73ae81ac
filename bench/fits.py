"""What fits into a device's memory, from the peaks that `bench.memory` has measured.

Beyond the weights, which are counted, bytes grow evenly with sequences and tokens, but for sizes that are rounded: each
stage of a run is taken to lie on lines through the smallest and the largest of what was measured along both. With the
number of layers what the caches hold grows on such a line, too; what is there for a moment is that of the most layers
that were measured, since it does not grow from two layers on, if each is packed as soon as it is read.
"""

from collections.abc import Sequence

from hybridkv.estimate import largest
from hybridkv.report import size

STAGES = ("prefill_peak", "prefilled", "decode_peak")
MOST = {"batch": 1 << 12, "context": 1 << 24}  # that is asked about


def on_lines(rows: list[dict], stage: str, at: dict[str, int]) -> float:
    """Bytes of a stage beyond the weights, where `at` says. rows: every combination of what was measured."""
    if not at:
        return rows[0]["bytes"][stage] - rows[0]["bytes"]["weights"]
    (axis, wanted), *others = at.items()
    first, last = min(row[axis] for row in rows), max(row[axis] for row in rows)
    low, high = (on_lines([row for row in rows if row[axis] == end], stage, dict(others)) for end in (first, last))
    return low + (high - low) * (wanted - first) / max(1, last - first)


def stage_at(rows: list[dict], stage: str, at: dict[str, int]) -> float:
    """Bytes of a stage beyond the weights, at a number of layers, a batch and a context."""
    deepest = at | {"layers": max(row["layers"] for row in rows)}
    held, moment = (
        on_lines(rows, "prefilled", at),
        on_lines(rows, stage, deepest) - on_lines(rows, "prefilled", deepest),
    )
    return held + moment


def peak_at(rows: list[dict], at: dict[str, int]) -> float:
    """Bytes of the highest stage, beyond the weights."""
    return max(stage_at(rows, stage, at) for stage in STAGES)


def complete(rows: list[dict]) -> list[dict]:
    """Without the contexts that could not be measured at every batch and number of layers."""
    wanted = len({(row["layers"], row["batch"]) for row in rows})
    contexts = [row["context"] for row in rows]
    return [row for row in rows if contexts.count(row["context"]) == wanted]


def fitting(
    rows: list[dict], sizes: Sequence[int], layers: int, weights: int, context: int | None = None
) -> list[dict]:
    """A row for each of the sizes, in bytes.

    `largest_context` is that of prompts at the smallest batch, `largest_batch` that of prompts of `at_context` tokens;
    each is there if two values were measured, so that it is known how the peak grows. `made_of` is the peak there.

    Args:
        rows: of one contender.
        layers, weights: of the model that is to fit; the latter in bytes.
        context: None for the longest in rows.
    """
    rows = complete(rows)
    if not rows:
        return []
    values = {axis: sorted({row[axis] for row in rows}) for axis in ("batch", "context")}
    at = {"layers": layers, "batch": values["batch"][0], "context": context or values["context"][-1]}
    held = stage_at(rows, "prefilled", at)
    made_of = {"weights": weights, "caches": round(held), "moment": round(peak_at(rows, at) - held)}
    found = []
    for room in sizes:
        row = {"fits": room} | {f"at_{axis}": n for axis, n in at.items()}
        for axis in (axis for axis in values if len(values[axis]) > 1):

            def fits(n: int, axis: str = axis, room: int = room) -> bool:
                return n <= MOST[axis] and weights + peak_at(rows, at | {axis: n}) <= room

            row[f"largest_{axis}"] = largest(fits)
        found.append(row | {"made_of": made_of})
    return found


def described(row: dict) -> str:
    """One line about such a row."""
    said = {
        "largest_context": f"at batch {row['at_batch']}, a context of {{:,}}",
        "largest_batch": f"at context {row['at_context']}, a batch of {{:,}}",
    }
    parts = [text.format(row[name]) for name, text in said.items() if name in row]
    made = ", ".join(f"{name.replace('_', ' ')} {size(number)}" for name, number in row["made_of"].items())
    return f"in {size(row['fits'])}: {'; '.join(parts) or 'not known'} ({row['at_layers']} layers, peak: {made})"
