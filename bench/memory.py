"""Bytes on the device before, during and after the prefill and while decoding: full against compressed cache.

    python -m bench.memory --contexts 4096 16384
    python -m bench.memory --shape qwen2.5-vl-7b --dtype bfloat16 --contexts 16384 65536 --memory 48

Contenders: `dense` (plain tensors), `full` (on pages), `hybridkv` (planned when the prompt has been read, so that its
whole cache stands beside the pages for a moment) and `hybridkv ahead` (heads known from an offline profile). All but
`hybridkv` pack each layer as it is read. Each runs in a process of its own.

The numbers are the allocator's; on a CPU the profiler tells them. A compiled step is measured after a few others, and
includes its activations, and on a CPU room for a copy of the pool, which FlexAttention's kernel reserves in every
layer and, in float32, never touches. Weights are in all numbers; `host` is the memory of the whole process, compiler
and profiler included. What fits into --memory GB is extrapolated from the peaks of two contexts, or of two batches.
"""

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import psutil
import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from bench.common import QUESTION, add_model_arguments, describe, make_model, write_row
from hybridkv.config import HybridConfig
from hybridkv.engine import Engine, Sampling
from hybridkv.model.decoder import Model
from hybridkv.planning.head_profile import HeadProfile

CONTENDERS = ("dense", "full", "hybridkv", "hybridkv ahead")
WARM_UP = 3  # steps before one is measured
STAGES = ("weights", "prefill_peak", "prefilled", "decode_peak")


def traced(work: Callable[[], object]) -> tuple[int, int]:
    """What `work` adds to the CPU's allocated memory at most, and what is left of it at the end, in bytes.

    Memory is known by its address: what was there before, and is freed meanwhile by whomever, does not count.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        work()
    pending, allocations = list(trace.profiler.kineto_results.experimental_event_tree()), []
    while pending:
        event = pending.pop()
        pending += event.children
        if event.tag == _EventType.Allocation:
            allocations.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    held, now, peak = {}, 0, 0
    for _, address, size in sorted(allocations, key=lambda each: each[0]):
        if size > 0:
            held[address] = size
            now += size
        else:
            now -= held.pop(address, 0)
        peak = max(peak, now)
    return peak, now


def measured(work: Callable[[], object], device: torch.device) -> tuple[int, int]:
    """Bytes on the device at the peak of `work`, and at its end, beyond those at its beginning."""
    if device.type != "cuda":
        return traced(work)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before


class RandomPrompt:
    """Random token ids; all but the question may be pruned."""

    spans = ()
    grids = ()

    def __init__(self, tokens: int, vocabulary: int):
        self.input_ids = torch.randint(vocabulary, (tokens,))
        self.prunable = torch.arange(tokens) < tokens - QUESTION


@torch.no_grad()
def stages(model: Model, contender: str, context: int, batch: int, budget: float) -> dict[str, int]:
    """Bytes on the device at each of STAGES, and the process's on the host."""
    policy, ahead = contender.split()[0], contender.endswith("ahead")
    config = HybridConfig(budget=budget if policy == "hybridkv" else 1.0)
    if ahead:
        random = torch.rand(model.cfg.num_hidden_layers, model.cfg.num_key_value_heads)
        config = replace(config, classifier="profile", head_profile=HeadProfile(random, random))
    engine = Engine(model, config, policy)
    prompts = [RandomPrompt(context, model.cfg.vocab_size) for _ in range(batch)]
    weights = sum(p.nbytes for p in model.parameters())
    steps = engine.stream(prompts, WARM_UP + 2, Sampling())
    peak, held = measured(lambda: next(steps), model.device)
    found = {"weights": weights, "prefill_peak": weights + peak, "prefilled": weights + held}
    for _ in range(WARM_UP):  # compiles, and on CUDA records the graph
        next(steps)
    peak, _ = measured(lambda: next(steps), model.device)
    return found | {"decode_peak": weights + held + peak, "host": psutil.Process().memory_info().rss}


def largest(rows: list[dict], of: str, memory: float) -> int | None:
    """The context or batch at which the peak reaches `memory` bytes, on a line through the first row and the last."""
    low, high = rows[0], rows[-1]
    slope = (high["peak"] - low["peak"]) / max(1, high[of] - low[of])
    return int(low[of] + (memory - low["peak"]) / slope) if slope > 0 else None


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--contexts", type=int, nargs="+", default=[4096, 16384], help="prompt tokens (default: 4096 16384)")
    add("--batches", type=int, nargs="+", default=[1], help="sequences held together (default: 1)")
    add("--budget", type=float, default=0.1, help="of hybridkv (default: 0.1)")
    add("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    add("--memory", type=float, default=24, help="GB of a device that something is to fit into (default: 24)")
    add("--one", action="store_true", help=argparse.SUPPRESS)  # measure one contender here, print JSON
    add_model_arguments(parser)
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(stages(make_model(args), args.contenders[0], args.contexts[0], args.batches[0], args.budget)))
        return

    given = list(sys.argv[1:] if argv is None else argv)
    about = describe("bench.memory", args, argv)
    head = "".join(f"{name:>14}" for name in (*STAGES, "host"))
    print(f"batch {'context':>8} {'cache':>16}{head}   MB")
    for contender in args.contenders:
        rows = []
        for batch, context in itertools.product(sorted(args.batches), sorted(args.contexts)):
            one = ["--one", "--batches", str(batch), "--contexts", str(context), "--contenders", contender]
            done = subprocess.run([sys.executable, "-m", "bench.memory", *given, *one], capture_output=True, text=True)
            if done.returncode:
                reason = done.stderr.strip().splitlines()[-1]
                print(f"{batch:5d} {context:8d} {contender:>16} failed: {reason}", flush=True)
                continue
            found = json.loads(done.stdout.splitlines()[-1])
            row = {"contender": contender, "context": context, "batch": batch, "budget": args.budget}
            row |= {"bytes": found, "peak": max(found["prefill_peak"], found["decode_peak"])}
            cells = "".join(f"{found[name] / 1e6:14.1f}" for name in (*STAGES, "host"))
            print(f"{batch:5d} {context:8d} {contender:>16}{cells}", flush=True)
            write_row(args.out, row | about)
            rows.append(row)
        for of, other, at in (("context", "batch", min(args.batches)), ("batch", "context", max(args.contexts))):
            line = [row for row in rows if row[other] == at]
            if len(line) > 1 and (fits := largest(line, of, args.memory * 1e9)):
                print(f"{contender:>31}: at {other} {at}, a {of} of {fits:,} fits into {args.memory:g} GB", flush=True)


if __name__ == "__main__":
    main()
