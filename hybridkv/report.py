"""What an answer cost: one object for scripts, and a table for people."""

from hybridkv.cli import say
from hybridkv.engine import Engine
from hybridkv.model import Prompt


def report(prompt: Prompt, policy: str, text: str, token_ids: list[int], engine: Engine) -> dict:
    """What `--json` prints. A budget that gave way is the one that was spent, and a note says so."""
    stats, budget = engine.stats, engine.config.budget
    spent = stats.bytes.budget / stats.bytes.full
    if policy == "full":
        budget = 1.0
    elif spent > budget < 1:
        say(
            f"note: a budget of {budget:g} can't hold what must be kept of this short prompt; "
            f"{policy} {'holds' if stats.bytes.host else 'reads'} {spent:.1%} of the full cache"
            f"{'' if stats.bytes.host else ' a step'}"
        )
        budget = spent
    return {
        "policy": policy,
        "budget": budget,
        "text": text,
        "token_ids": token_ids,
        "prompt_tokens": len(prompt.input_ids),
        "visual_tokens": prompt.visual_tokens,
        "static_heads": stats.static_heads,
        "dynamic_heads": stats.dynamic_heads,
        "retrieving_layers": stats.retrieving_layers,
        "full_bytes": stats.bytes.full,
        "resident_bytes": stats.bytes.resident,
        "host_bytes": stats.bytes.host,
        "step_bytes": stats.bytes.step,
        "new_token_bytes": stats.bytes.new,
        "allocated_bytes": stats.bytes.allocated,
        "attended_tokens": stats.attended_tokens,
        "ttft_s": stats.ttft_s,
        "ms_per_token": stats.ms_per_token,
        "compile_s": stats.compile_s,
        "device": str(engine.model.device),
        "dtype": str(engine.model.dtype).removeprefix("torch."),
    }


def table(rows: list[dict]) -> str:
    """The short table under the answers, one line for each policy."""
    first = rows[0]
    text_tokens = first["prompt_tokens"] - first["visual_tokens"]
    head = (
        "cache",
        "heads static/dynamic",
        "full",
        "resident",
        "host",
        "read/step",
        "tokens/step",
        "first token",
        "ms/token",
    )
    cells = [head]
    for row in rows:
        resident, read = (
            f"{size(row[key])} ({row[key] / row['full_bytes']:.1%})" for key in ("resident_bytes", "step_bytes")
        )
        cells.append(
            (
                "full" if row["policy"] == "full" else f"{row['policy']} {row['budget']:.2g}",
                f"{row['static_heads']} / {row['dynamic_heads']}",
                size(row["full_bytes"]),
                resident,
                size(row["host_bytes"]) if row["host_bytes"] else "-",
                read,
                f"{row['attended_tokens']:.0f} of {row['prompt_tokens']}",
                f"{row['ttft_s']:.2f} s",
                "-" if row["ms_per_token"] is None else f"{row['ms_per_token']:.2f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [f"prompt: {first['prompt_tokens']} tokens, {text_tokens} text + {first['visual_tokens']} visual"]
    lines += ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join(lines)


def size(n: float) -> str:
    """Bytes in three digits: 1.73 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 999.5 or unit == "GB":
            return f"{n:.3g} {unit}"
        n /= 1000
    raise AssertionError
