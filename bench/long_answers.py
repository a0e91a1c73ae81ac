"""Answers of thousands of tokens: how far each policy is from the full cache, the farther the answer goes.

    python -m bench.long_answers --model smollm2 --tasks copy program --tokens 2000 --new-tokens 3000 --samples 1
    python -m bench.long_answers --model smollm2 --tasks prose --policies hybridkv hybridkv:keep_new=256 --out FILE

The full cache answers greedily, but never ends its answer, and every policy follows its tokens (teacher forcing). For
each stretch of the answer: KL to the full cache's next-token distribution in nats a token, and how often both choose
the same token. `device` is what the cache's tensors hold there at the end, a store on the "host" apart, `full` what a
full cache of prompt and answer holds. Decoding runs uncompiled, one case after the other.
"""

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.common import write_row
from bench.judge import Lab, Variant, again, divergence, load_lab, variants_at
from bench.tasks import Case, make_case
from hybridkv.engine import Engine, Sampling

STRETCHES = (256, 1024)  # answer tokens at which one stretch ends and another begins
KEEPING = [f"hybridkv:store=host{kept}" for kept in ("", ",keep_new=1024", ",keep_new=256")]


@torch.no_grad()
def follow(lab: Lab, case: Case, variants: Sequence[Variant], new_tokens: int) -> list[dict]:
    """For each variant: kl and agrees of each token, a list; bytes at the end."""
    eos = list(lab.model.cfg.eos_token_id)
    configs = [variant.complete() for variant in variants]
    read = lab.read([case], configs[0])
    made = [("dense", configs[0])] + [(v.policy, config) for v, config in zip(variants, configs, strict=True)]
    engines = [Engine(lab.model, config, policy, eos, compile=False) for policy, config in made]
    for engine in engines:
        engine.load([again(prefill, engine.config) for prefill in read.prefills], new_tokens + 1)
        engine.begin(read.positions, new_tokens + 1, Sampling(), read.first.device)
    token, kl, agrees = read.first, [[] for _ in variants], [[] for _ in variants]
    for _ in range(new_tokens):
        steps = []
        for engine in engines:
            steps.append(lab.model.step(token, engine.state.position, engine.cache).log_softmax(-1))
            engine.cache.advance(engine.state.active)
            engine.state.position.add_(engine.state.active)
        want, *others = steps
        token = want.index_fill(-1, torch.tensor(eos), float("-inf")).argmax(-1)
        for i, got in enumerate(others):
            kl[i].append(float(divergence(want, got).sum()))
            agrees[i].append(bool((got.argmax(-1) == want.argmax(-1)).all()))
    caches = [engine.cache.count_bytes() for engine in engines[1:]]
    full = [held.full * (1 + new_tokens / len(case.prompt.input_ids)) for held in caches]
    return [
        {"kl": kl[i], "agrees": agrees[i], "device_bytes": held.allocated, "full_bytes": full[i]}
        for i, held in enumerate(caches)
    ]


def stretches(new_tokens: int) -> list[tuple[int, int]]:
    return list(itertools.pairwise([0, *(end for end in STRETCHES if end < new_tokens), new_tokens]))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="demo", help="as bench.quality's (default: demo)")
    add("--tasks", nargs="+", default=["describe"])
    add("--tokens", type=int, default=1024, help="of each prompt's context (default: 1024)")
    add("--samples", type=int, default=2, help="prompts a task (default: 2)")
    add("--new-tokens", type=int, default=2000, help="of each answer (default: 2000)")
    add("--policies", nargs="+", default=KEEPING, metavar="NAME[:FIELD=VALUE,...]")
    add("--budget", type=float, default=0.1)
    add("--out", type=Path, help="append JSON lines to this file")
    args = parser.parse_args(argv)
    variants = [job for text in args.policies for job in variants_at(text, [args.budget])]
    lab, parts = load_lab(args.model, "cpu"), stretches(args.new_tokens)
    for task in args.tasks:
        cases = [make_case(lab.processor, task, args.tokens, i) for i in range(args.samples)]
        found = [follow(lab, case, variants, args.new_tokens) for case in cases]
        for i, variant in enumerate(variants):
            mine = [of_case[i] for of_case in found]
            tokens = {
                name: torch.tensor([each[name] for each in mine], dtype=torch.float64) for name in ("kl", "agrees")
            }
            row = {"model": lab.name, "policy": variant.name, "budget": args.budget, "task": task}
            row |= {"tokens": args.tokens, "samples": args.samples, "new_tokens": args.new_tokens, "stretches": parts}
            row |= {name: [float(of[:, a:b].mean()) for a, b in parts] for name, of in tokens.items()}
            row |= {name: sum(each[name] for each in mine) / len(mine) for name in ("device_bytes", "full_bytes")}
            cells = [f"{kl:.4f} {same:.0%}" for kl, same in zip(row["kl"], row["agrees"], strict=True)]
            held = f"{row['device_bytes'] / 1e6:.1f} of {row['full_bytes'] / 1e6:.1f} MB"
            print(f"{task:10} {variant.name:40} {'  '.join(cells)}  {held}", flush=True)
            write_row(args.out, row | {"config": variant.described()})


if __name__ == "__main__":
    main()
