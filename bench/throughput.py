"""Tokens a second of the largest batch that fits beside the weights: a full cache's and ours.

    python -m bench.throughput --shape qwen2.5-vl-7b --dtype bfloat16 --context 32768 --memory 48GB    # on a GPU
    python -m bench.throughput --context 2048 --memory 200MB --batches 2                               # anywhere

Each contender gets the largest batch that its caches leave room for in so much memory, by the arithmetic of
`hybridkv.estimate`, and whose stores take no more than --host-memory; where the device or its kernels can't have that,
an eighth fewer, and so on. On a GPU the process may allocate no more than --memory. Contexts are random and packed one
after the other, so that one full cache is held beside the batch, and that room is set aside. With the store on the host
a share of the frames (--new-chunks) is emptied before each step, outside of its time, see `bench.decode`.
"""

import argparse
import statistics
import time
from collections.abc import Sequence

import torch

from bench.common import add_model_arguments, describe, make_model, random_prefill, write_row
from bench.decode import WARM_UP, Contender
from hybridkv.cache.attention import PoolError
from hybridkv.cache.dense import dense_slots
from hybridkv.cache.pack import keep
from hybridkv.cache.store import StoreError
from hybridkv.config import HybridConfig
from hybridkv.engine import Engine, Sampling
from hybridkv.estimate import Question, memory, weight_bytes
from hybridkv.model.decoder import Model
from hybridkv.planning.budget import BudgetError
from hybridkv.report import size

SPARE = 0.04  # of the memory: activations, CUDA graphs, what the allocator can't hand out


def room_for(
    model: Model, policy: str, config: HybridConfig, context: int, new_tokens: int, limit: int, host_limit: int
) -> int:
    """The largest batch that should fit into `limit` bytes with weights and one prompt's full cache, stores apart."""
    asked = Question(model.cfg, config, model.dtype, context, 1, new_tokens)
    token = asked.full().step_bytes // context
    left = limit * (1 - SPARE) - weight_bytes(model.cfg, model.dtype) - context * token
    if policy == "dense":
        return max(0, int(left // (dense_slots(context + new_tokens) * token)))
    ours = Question(model.cfg, config, model.dtype, context, 8, new_tokens).ours()
    fits = int(left // (ours.device_bytes / 8))
    return max(0, min(fits, int(host_limit // (ours.host_bytes / 8))) if ours.host_bytes else fits)


def packed(model: Model, policy: str, config: HybridConfig, context: int, batch: int, new_tokens: int) -> Contender:
    """A batch of random contexts, drawn and packed one by one, all by the plan of the first."""
    engine = Engine(model, config, policy)
    with torch.no_grad():
        first = random_prefill(model, context, engine.config)
        plan = engine.plan(first)
        engine._make_room([plan] * batch, new_tokens, first)
        for b in range(batch):
            prefill = first if b == 0 else random_prefill(model, context, engine.config, b)
            for layer in range(model.cfg.num_hidden_layers):
                engine.cache.pack(b, layer, keep(plan, prefill, layer))
        engine.begin([context] * batch, new_tokens, Sampling(), model.device)
    name = policy if policy == "dense" else f"hybridkv {config.budget:g}"
    cache = None if policy == "dense" else engine.cache
    return Contender(name, config.budget, torch.no_grad()(engine.step), 0, cache=cache)


def measure(contender: Contender, batch: int, steps: int, new_chunks: float) -> dict:
    """Milliseconds of a step, and tokens a second."""
    contender.warm_up()
    times = []
    for _ in range(steps):
        contender.empty(new_chunks)
        start = time.perf_counter()
        contender.step().tolist()
        times.append(time.perf_counter() - start)
    ms = statistics.median(times) * 1e3
    row = {"contender": contender.name, "batch": batch, "ms_per_step": ms, "tokens_per_s": batch / ms * 1e3}
    if contender.cache is not None:
        held = contender.cache.count_bytes()
        row |= {"allocated_bytes": held.allocated, "host_bytes": held.host}
    return row | {"budget": contender.budget, "compile_s": contender.compile_s}


def tried(model: Model, policy: str, config: HybridConfig, batch: int, args: argparse.Namespace) -> dict | None:
    """A row for the largest batch from this one down that really fits; None if none does."""
    while batch:
        try:
            contender = packed(model, policy, config, args.context, batch, 1 + WARM_UP + args.steps)
            return measure(contender, batch, args.steps, args.new_chunks)
        except (torch.OutOfMemoryError, StoreError, PoolError) as e:
            reason = (str(e) or "no memory").splitlines()[0]
            print(f"{policy}: {batch} sequences do not fit: {reason}", flush=True)
        contender = None
        torch.cuda.empty_cache()
        batch -= max(1, batch // 8)
    return None


def run(args: argparse.Namespace, model: Model, about: dict) -> None:
    for policy, budget in [("dense", 1.0), *(("hybridkv", budget) for budget in args.budgets)]:
        config = HybridConfig(budget=budget, store=args.store)
        steps = 1 + WARM_UP + args.steps
        batch = room_for(model, policy, config, args.context, steps, args.memory, args.host_memory)
        smaller = [] if policy == "dense" else [n for n in args.batches if n < batch]
        for n in [*smaller, batch]:
            row = tried(model, policy, config, n, args)
            if row is None:
                print(f"{policy} {budget:g}: not one sequence fits into {size(args.memory)}", flush=True)
                continue
            speed = f"{row['ms_per_step']:9.2f} ms a step {row['tokens_per_s']:9.0f} tokens a second"
            print(f"{row['contender']:>14} {row['batch']:5d} sequences {speed}", flush=True)
            write_row(args.out, row | {"context": args.context, "memory": args.memory, "store": args.store} | about)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--context", type=int, default=32768, help="tokens of each prompt (default: 32768)")
    add("--memory", type=memory, required=True, help="such as 48GB: what weights and caches may take")
    add("--host-memory", type=memory, default=memory("64GB"), help="what stores may take on the host (default: 64GB)")
    add("--budgets", type=float, nargs="*", default=[0.1], help="of hybridkv (default: 0.1)")
    add("--batches", type=int, nargs="*", default=[], help="smaller batches of hybridkv, too")
    add("--store", choices=("device", "host"), default="host", help="(default: host)")
    add("--new-chunks", type=float, default=0.16, help="share of chunks that a step must fetch (default: 0.16)")
    add("--steps", type=int, default=20, help="timed steps (default: 20)")
    add_model_arguments(parser)
    args = parser.parse_args(argv)
    if args.device.startswith("cuda"):
        total = torch.cuda.get_device_properties(args.device).total_memory
        if args.memory > total:
            parser.error(f"the device has {size(total)}")
        torch.cuda.set_per_process_memory_fraction(args.memory / total, torch.device(args.device))
    model = make_model(args)
    try:
        run(args, model, describe("bench.throughput", args, argv))
    except BudgetError as e:
        parser.error(str(e))


if __name__ == "__main__":
    main()
