"""The page itself: numbers and text put into the template, with everything that a user wrote escaped."""

import json
import platform
from collections.abc import Sequence
from dataclasses import fields
from importlib import resources

import jinja2
import torch

from hybridkv.html.prompt import inputs, pieces, texts
from hybridkv.html.run import Run, bitmap
from hybridkv.model import Processor, Prompt
from hybridkv.planning.head_profile import HeadProfile
from hybridkv.report import size
from hybridkv.version import __version__

BYTES = {
    "full": "full cache",
    "resident": "on the device",
    "host": "in host memory",
    "step": "read a step",
}

# Else a text with </script> would end the element that holds the data, and some old engines end a line at the last two.
UNSAFE = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


def page(processor: Processor, prompt: Prompt, runs: Sequence[Run]) -> str:
    """One file of HTML that shows one prompt, and what each run kept and retrieved of it."""
    files = resources.files("hybridkv.html")
    parts = {name: (files / name).read_text(encoding="utf-8") for name in ("template.html", "page.css", "page.js")}
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(parts["template.html"])
    prunable = runs[0].record.plan.prunable.nonzero()[:, 0]
    data = {
        "tokens": len(prompt.input_ids),
        "prunable": bitmap(prunable, len(prompt.input_ids)),
        "inputs": inputs(processor, prompt),
        "texts": texts(processor, prompt),
        "runs": [run.numbers() | {"name": name(run), "answer": pieces(processor, run.token_ids)} for run in runs],
    }
    return template.render(
        css=parts["page.css"],
        js=parts["page.js"],
        data=json.dumps(data, separators=(",", ":")).translate(UNSAFE),
        answers=[(name(run), processor.decode(run.token_ids)) for run in runs],
        bars=bars(runs),
        names=[name(run) for run in runs],
        facts=facts(prompt, runs),
        config=choices(runs),
        versions=f"hybridkv {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
    )


def name(run: Run) -> str:
    return "full" if run.policy == "full" else f"{run.policy} {run.config.budget:g}"


def bars(runs: Sequence[Run]) -> list[dict]:
    """The bytes of all runs, each with its share of the full cache, and of the longest bar."""
    rows = []
    for key, label in BYTES.items():
        for run in runs:
            counted = run.bytes()
            if counted.get(key) and not (key == "full" and run is not runs[0]):
                share = counted[key] / counted["full"]
                whose = "" if key == "full" or len(runs) == 1 else f", {name(run)}"
                rows.append({"label": label + whose, "bytes": size(counted[key]), "share": share, "key": key})
    longest = max((row["share"] for row in rows), default=1.0)
    return [row | {"width": row["share"] / longest} for row in rows]


def facts(prompt: Prompt, runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Lines of a table, with a cell for each run."""

    def of_each(show) -> list[str]:
        return [show(run) for run in runs]

    text = len(prompt.input_ids) - prompt.visual_tokens
    return [
        ("prompt", of_each(lambda run: f"{text} text + {prompt.visual_tokens} visual tokens")),
        ("heads", of_each(lambda run: f"{run.stats.static_heads} static, {run.stats.dynamic_heads} dynamic")),
        ("tokens a step reads", of_each(lambda run: f"{run.stats.attended_tokens:.0f}, mean over heads")),
        ("first token", of_each(lambda run: f"{run.stats.ttft_s:.2f} s")),
        ("a token", of_each(lambda run: "-" if run.stats.ms_per_token is None else f"{run.stats.ms_per_token:.2f} ms")),
        ("compiling", of_each(lambda run: f"{run.stats.compile_s:.1f} s")),
        ("ran on", of_each(lambda run: f"{run.device}, {run.dtype}")),
    ]


def choices(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Every field of the configurations, with a cell for each run."""
    rows = []
    for field in fields(runs[0].config):
        values = [getattr(run.config, field.name) for run in runs]
        rows.append((field.name, ["a profile" if isinstance(v, HeadProfile) else str(v) for v in values]))
    return rows
