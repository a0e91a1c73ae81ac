"""Answers and divergence under compression: every policy and budget on one trained model, against its full cache.

    python -m bench.quality --model demo --policies hybridkv snapkv --budgets 0.1 0.2
    python -m bench.quality --model smollm2 --policies hybridkv hybridkv:dynamic_share=0 --tasks needle --tokens 2000

A policy may carry fields of `HybridConfig`: `hybridkv:pool=1,page_size=32`, `snapkv:budget=0.33`. Rows go to --out as
JSON lines; a run that was cut off goes on behind its last batch of prompts.

Accuracy is that of greedy answers. KL is the divergence of the policy's next-token distribution from the full cache's,
in nats per generated token, along the full cache's own greedy answer; what the prefill alone decides is not counted.
Intervals are 95% bootstraps over prompts. Decoding runs uncompiled, which gives the same tokens: compiled, every policy
and budget would wait for a step of its own.
"""

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from bench.judge import Lab, Variant, load_lab, variants_at
from bench.records import Records
from bench.report import bootstrap, plot, table
from bench.tasks import TEXT_TASKS, make_case
from demo import boards as bd
from hybridkv.calibrate import NEW_TOKENS, calibrate
from hybridkv.config import HybridConfig
from hybridkv.model import CheckpointError, InputError
from hybridkv.planning.head_profile import HeadProfile

CALIBRATION = (5000, 5001)  # samples that head profiles are measured on; runs have fewer


def summary(rows: list[dict]) -> dict:
    """One line of the results from one record a prompt."""

    def mean(key: str) -> float:
        return float(np.mean([row[key] for row in rows]))

    out = {"samples": len(rows), "accuracy": None, "accuracy_ci": None}
    if rows[0]["right"] is not None:
        right = np.array([row["right"] for row in rows], dtype=float)
        out |= {"accuracy": right.mean(), "accuracy_ci": bootstrap(right)}
    kl = np.array([row["kl"] for row in rows])
    out |= {"kl": kl.mean(), "kl_ci": bootstrap(kl), "kl_each": kl.round(6).tolist()}
    if rows[0]["new_chunks"] is not None:  # the store is on the host
        out |= {"new_chunks": mean("new_chunks")}
    costs = ("resident_bytes", "full_bytes", "step_bytes", "attended_tokens", "prompt_tokens", "visual_tokens")
    return out | {key: mean(key) for key in costs}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="demo", help="demo (bundled), smollm2, qwen2.5-coder-1.5b, or a checkpoint folder")
    add("--policies", nargs="+", default=["hybridkv", "snapkv", "adakv", "quest"], metavar="NAME[:FIELD=VALUE,...]")
    add("--budgets", nargs="+", type=float, default=[0.05, 0.1, 0.2, 1.0])
    add("--tasks", nargs="+", metavar="TASK", help=f"of {', '.join((*bd.TASKS, *TEXT_TASKS))}")
    add("--tokens", nargs="+", type=int, help="visual tokens, or about so many tokens of text")
    add("--samples", type=int, default=30, help="prompts per task and size (default: 30)")
    help = (
        "offline profile for classifier=profile and sparsemm; measured on other prompts of the tasks if it is missing"
    )
    add("--head-profile", type=Path, metavar="FILE", help=help)
    add("--kl-only", action="store_true", help="follow the full cache's answers only: faster, accuracy is left out")
    add("--batch", type=int, default=10, help="prompts decoded together (default: 10)")
    add("--out", type=Path, help="JSON lines; FILE.prompts beside it holds each prompt's, to go on or to add samples")
    add("--plot", type=Path, help="picture of all rows in --out, or of this run")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        profile = args.head_profile and str(args.head_profile)
        jobs = [job for text in args.policies for job in variants_at(text, args.budgets, profile)]
    except ValueError as e:
        parser.error(str(e))
    boards = args.model == "demo"
    tasks = args.tasks or (["lookup", "right", "chain"] if boards else ["needle", "links", "copy"])
    sizes = args.tokens or ([1024] if boards else [2000])
    if unknown := set(tasks) - {*bd.TASKS, *TEXT_TASKS}:
        parser.error(f"unknown tasks: {', '.join(sorted(unknown))}")
    done = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out and args.out.exists() else []
    rows, records = [], Records(args.out and args.out.with_name(f"{args.out.name}.prompts"))
    try:
        lab = load_lab(args.model, args.device)
        if args.head_profile and not args.head_profile.exists():
            calibrated(lab, tasks, sizes).save(args.head_profile)
        for task, tokens in itertools.product(tasks, sizes):
            rows += run(lab, task, tokens, jobs, args, done, records)
    except (CheckpointError, InputError, RuntimeError, ValueError) as e:
        parser.exit(1, f"{parser.prog}: error: {e}\n")
    print(table(rows))
    if args.plot:
        plot(rows, args.plot)


def calibrated(lab: Lab, tasks: Sequence[str], sizes: Sequence[int]) -> HeadProfile:
    """A head profile of two prompts of each task and size, which no run is judged on."""
    cases = [make_case(lab.processor, *at, i) for at in itertools.product(tasks, sizes) for i in CALIBRATION]
    prompts, config = [case.prompt for case in cases], HybridConfig(strict=False)
    return calibrate(lab.model, prompts, config, lab.model.cfg.eos_token_id, NEW_TOKENS, lab.name)


def row_key(row: dict) -> str:
    """What makes a row this row. The configuration is part of it: names change their meaning with the defaults."""
    return json.dumps([row[key] for key in ("model", "policy", "budget", "task", "tokens", "samples", "config")])


def run(
    lab: Lab,
    task: str,
    tokens: int,
    jobs: list[Variant],
    args: argparse.Namespace,
    done: list[dict],
    records: Records,
) -> list[dict]:
    """All jobs on one task at one size; what `done` and `records` hold is taken from there."""

    def labels(job: Variant) -> dict:
        return {
            "model": lab.name,
            "policy": job.name,
            "budget": job.config.budget,
            "task": task,
            "tokens": tokens,
            "config": job.described(),
        }

    known = {row_key(row): row for row in done}
    todo = [job for job in jobs if row_key(labels(job) | {"samples": args.samples}) not in known]
    batches = [range(i, min(i + args.batch, args.samples)) for i in range(0, args.samples, args.batch)]
    with tqdm(total=len(todo) * len(batches), desc=f"{task} {tokens}", leave=False, disable=None) as bar:
        for indices in batches:

            def key(job: Variant, indices: range = indices) -> str:
                return json.dumps([*labels(job).values(), indices.start, indices.stop, args.kl_only])

            missing = [job for job in todo if key(job) not in records]
            bar.update(len(todo) - len(missing))
            cases = [make_case(lab.processor, task, tokens, i) for i in indices] if missing else []
            for job, (_, measured) in zip(missing, lab.measure(cases, missing, not args.kl_only), strict=True):
                records.add(key(job), measured)
                bar.update()
    for job in todo:
        row = labels(job) | {"samples": args.samples}
        row |= summary([record for indices in batches for record in records[key(job, indices)]])
        known[row_key(row)] = row
        if args.out:
            with open(args.out, "a") as file:
                file.write(json.dumps(row) + "\n")
    return [known[row_key(labels(job) | {"samples": args.samples})] for job in jobs]


if __name__ == "__main__":
    main()
