"""Time to the first token, and what profile, plan and compression add to it.

    python -m bench.prefill --contexts 2048 8192

`plain` reads the prompt with causal SDPA, keeps keys and values and copies them into a static cache: the best full
cache. The policy also looks where the prompt's text looks (profile), decides what to keep (plan) and packs it into
pages (pack). Contenders run interleaved in one process on a decoder of random weights; a row gives medians.
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from bench.common import QUESTION, add_model_arguments, describe, make_model, write_row
from hybridkv.config import HybridConfig
from hybridkv.engine import Engine
from hybridkv.model.decoder import Model, causal_attention
from hybridkv.planning.budget import BudgetError
from hybridkv.planning.policies import POLICIES
from hybridkv.planning.prefill import LayerProfile, Prefill

MS = 1e3


class Plain(Prefill):
    """Records keys and values, and looks at nothing else."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        nothing = q.new_zeros(())
        self.like = k[0, :, :0]
        self.layers.append(LayerProfile(k[0], v[0], k[0, :, :0], *[nothing] * 4))
        return causal_attention(q, k, v)


class Clock:
    """Seconds between calls, the device's work included."""

    def __init__(self, device: torch.device):
        self.device, self.at = device, 0.0
        self.lap()

    def lap(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        before, self.at = self.at, time.perf_counter()
        return self.at - before


@torch.no_grad()
def first_token(model: Model, x: Tensor, positions: Tensor, policy: str, config: HybridConfig) -> dict[str, float]:
    """Milliseconds of the stages from embedded tokens x (1, T, C) to the first token and a cache to go on with."""
    prunable = torch.arange(x.shape[1], device=x.device) < x.shape[1] - QUESTION
    prefill = (Plain if policy == "plain" else Prefill)(prunable, config)
    clock, ms = Clock(x.device), {}
    int(model.logits(model(x, positions, prefill)[:, -1]).argmax())
    ms["read"] = clock.lap() * MS
    if policy == "plain":
        Engine(model, config, "dense", compile=False).load([prefill], QUESTION)
    else:
        plan = POLICIES[policy](prefill)
        ms["plan"] = clock.lap() * MS
        Engine(model, config, lambda _: plan, compile=False).load([prefill], QUESTION)
    ms["pack"] = clock.lap() * MS
    return ms | {"total": sum(ms.values())}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = partial(parser.add_argument, type=int)
    add("--contexts", nargs="+", default=[2048, 8192], help="prompt tokens (default: 2048 8192)")
    add("--repeats", default=5, help="timed runs of each contender, after one that is not timed (default: 5)")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=["hybridkv"])
    parser.add_argument("--budget", type=float, default=0.1)
    add_model_arguments(parser)
    args = parser.parse_args(argv)

    model, config = make_model(args), HybridConfig(budget=args.budget)
    about = describe("bench.prefill", args, argv)
    print(f"{'context':>8} {'cache':>12} {'read':>9} {'plan':>9} {'pack':>9} {'total':>9} {'over plain':>11}   ms")
    for context in args.contexts:
        x = torch.randn(1, context, model.cfg.hidden_size, device=model.device, dtype=model.dtype)
        positions = torch.arange(context, device=model.device).expand(3, 1, -1)
        runs: dict[str, list[dict]] = defaultdict(list)
        for _ in range(1 + args.repeats):
            for name in ("plain", *args.policies):
                try:
                    runs[name].append(first_token(model, x, positions, name, config))
                except BudgetError as e:
                    parser.error(str(e))
        medians = {
            name: {stage: statistics.median(run[stage] for run in each[1:]) for stage in each[0]}
            for name, each in runs.items()
        }
        for name, ms in medians.items():
            over = ms["total"] / medians["plain"]["total"] - 1
            stages = " ".join(f"{ms.get(stage, 0):9.1f}" for stage in ("read", "plan", "pack", "total"))
            print(f"{context:8d} {name:>12} {stages} {over:11.1%}", flush=True)
            row = {"contender": name, "context": context, "budget": args.budget, "overhead": over, "ms": ms, **about}
            write_row(args.out, row)


if __name__ == "__main__":
    main()
