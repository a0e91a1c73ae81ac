"""Bytes on the device before, during and after the prefill and while decoding: full against compressed cache.

    python -m bench.memory --contexts 4096 16384
    python -m bench.memory --shape qwen2.5-vl-7b --dtype bfloat16 --contexts 8192 32768 --batches 1 2 --eager \\
        --fits 24GB 48GB 80GB                                   # on a GPU
    python -m bench.memory --shape qwen2.5-vl-7b --dtype bfloat16 --layers 2 --vocab-size 4096 --eager --batches 1 2 \\
        --contexts 2048 4096 --store host --fits 24GB 48GB 80GB --at 32768   # anywhere

Contenders: `dense` (plain tensors), `full` (on pages), `hybridkv` (planned when the prompt has been read, so that its
whole cache stands beside the pages for a moment) and `hybridkv ahead` (heads known from an offline profile). All but
`hybridkv` pack each layer as it is read. Each runs in a process of its own.

The numbers are the allocator's; on a CPU the profiler tells them. A compiled step is measured after a few others, and
includes its activations, and on a CPU room for a copy of the pool, which FlexAttention's kernel reserves in every
layer and, in float32, never touches; --eager measures a step that is not compiled, and reads one layer's pages into
plain tensors. Weights are in all numbers; `store` is what a cache holds in host memory, which on a CPU is in no other
number; `host` is the memory of the whole process, compiler and profiler included.

What fits into each of --fits follows from the peaks (`bench.fits`). With fewer --layers than the shape has they are
measured with these and with half of them, and what fits is said of all of the shape's layers and of its vocabulary; not
of `hybridkv`, whose peak holds all layers of a prompt. Beside what caches hold stands what `hybridkv.estimate` says.
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
from torch import Tensor
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from bench.common import QUESTION, SHAPES, add_model_arguments, describe, make_model, model_config, write_row
from bench.fits import described, fitting
from hybridkv.config import HybridConfig
from hybridkv.engine import Engine, Sampling
from hybridkv.estimate import Question, memory, weight_bytes
from hybridkv.model.config import Config
from hybridkv.model.decoder import Model
from hybridkv.planning.head_profile import HeadProfile

CONTENDERS = ("dense", "full", "hybridkv", "hybridkv ahead")
WARM_UP = 3  # steps before one is measured
STAGES = ("weights", "prefill_peak", "prefilled", "decode_peak")


def traced(work: Callable[[], object], apart: Callable[[], Sequence[Tensor]] = tuple) -> tuple[int, int]:
    """What `work` adds to the CPU's allocated memory at most, and what is left of it at the end, in bytes.

    Memory is known by its address: what was there before, and is freed meanwhile by whomever, does not count, nor do
    the tensors that `apart` names afterwards.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        work()
    pending, allocations = list(trace.profiler.kineto_results.experimental_event_tree()), []
    while pending:
        event = pending.pop()
        pending += event.children
        if event.tag == _EventType.Allocation:
            allocations.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    left_out = {(tensor.data_ptr(), tensor.nbytes) for tensor in apart()}
    held, now, peak = {}, 0, 0
    for _, address, size in sorted(allocations, key=lambda each: each[0]):
        if (address, size) in left_out:
            continue
        if size > 0:
            held[address] = size
            now += size
        else:
            now -= held.pop(address, 0)
        peak = max(peak, now)
    return peak, now


def measured(
    work: Callable[[], object], device: torch.device, apart: Callable[[], Sequence[Tensor]] = tuple
) -> tuple[int, int]:
    """Bytes on the device at the peak of `work`, and at its end, beyond those at its beginning.

    Args:
        apart: tensors of `work` in host memory.
    """
    if device.type != "cuda":
        return traced(work, apart)
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
def stages(model: Model, args: argparse.Namespace) -> dict[str, int]:
    """Bytes on the device at each of STAGES, of the store, and the process's on the host."""
    (contender,), (context,), (batch,) = args.contenders, args.contexts, args.batches
    policy, ahead = contender.split()[0], contender.endswith("ahead")
    config = HybridConfig(budget=args.budget if policy == "hybridkv" else 1.0, store=args.store)
    if ahead:
        random = torch.rand(model.cfg.num_hidden_layers, model.cfg.num_key_value_heads)
        config = replace(config, classifier="profile", head_profile=HeadProfile(random, random))
    engine = Engine(model, config, policy, compile=not args.eager)

    def stored() -> list[Tensor]:
        buffers = engine.cache.named_buffers() if config.on_host(model.device) else ()
        return [tensor for name, tensor in buffers if name in ("store.keys", "store.values")]

    prompts = [RandomPrompt(context, model.cfg.vocab_size) for _ in range(batch)]
    weights = sum(p.nbytes for p in model.parameters())
    steps = engine.stream(prompts, WARM_UP + 2, Sampling())
    peak, held = measured(lambda: next(steps), model.device, stored)
    found = {"weights": weights, "prefill_peak": weights + peak, "prefilled": weights + held}
    for _ in range(WARM_UP):  # compiles, and on CUDA records the graph
        next(steps)
    peak, _ = measured(lambda: next(steps), model.device)
    found |= {"decode_peak": weights + held + peak, "store": sum(tensor.nbytes for tensor in stored())}
    return found | {"host": psutil.Process().memory_info().rss}


def whole_model(args: argparse.Namespace) -> Config:
    """The decoder that the arguments describe, with all of its shape's layers and vocabulary."""
    cfg, shape = model_config(args), SHAPES[args.shape]
    if args.model:
        return cfg
    layers, vocab = max(cfg.num_hidden_layers, shape["layers"]), max(cfg.vocab_size, shape["vocab_size"])
    return replace(cfg, num_hidden_layers=layers, vocab_size=vocab)


def estimated(cfg: Config, contender: str, args: argparse.Namespace, context: int, batch: int) -> int:
    """What `hybridkv.estimate` says that the caches take on the device."""
    config = HybridConfig(budget=args.budget, store=args.store)
    asked = Question(cfg, config, getattr(torch, args.dtype), context, batch, WARM_UP + 2, QUESTION)
    return (asked.ours() if contender.startswith("hybridkv") else asked.full()).device_bytes


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--contexts", type=int, nargs="+", default=[4096, 16384], help="prompt tokens (default: 4096 16384)")
    add("--batches", type=int, nargs="+", default=[1], help="sequences held together (default: 1)")
    add("--budget", type=float, default=0.1, help="of hybridkv (default: 0.1)")
    add("--store", choices=("device", "host"), help="of hybridkv (default: the host's on a GPU, else the device's)")
    add("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    add("--eager", action="store_true", help="a step that is not compiled")
    add("--fits", type=memory, nargs="+", default=[memory("24GB")], metavar="24GB", help="what fits? (default: 24GB)")
    add("--at", type=int, metavar="N", help="tokens of the prompts in a batch that is to fit (default: the most)")
    add("--one", action="store_true", help=argparse.SUPPRESS)  # measure one contender here, print JSON
    add_model_arguments(parser)
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(stages(make_model(args), args)))
        return

    given = list(sys.argv[1:] if argv is None else argv)
    about = describe("bench.memory", args, argv)
    store = "host" if HybridConfig(store=args.store).on_host(torch.device(args.device)) else "device"
    whole = whole_model(args)
    most, fewer = about["layers"], about["layers"] < whole.num_hidden_layers
    depths = [max(1, most // 2), most] if fewer else [most]
    weights = weight_bytes(whole, getattr(torch, args.dtype))
    head = "".join(f"{name:>14}" for name in (*STAGES, "store", "host"))
    print(f"layers batch {'context':>8} {'cache':>16}{head}   MB")
    for contender in args.contenders:
        rows = []
        for layers, batch, context in itertools.product(depths, sorted(args.batches), sorted(args.contexts)):
            one = ["--one", "--layers", str(layers), "--batches", str(batch), "--contexts", str(context)]
            command = [sys.executable, "-m", "bench.memory", *given, *one, "--contenders", contender]
            done = subprocess.run(command, capture_output=True, text=True)
            where = f"{layers:6d} {batch:5d} {context:8d} {contender:>16}"
            if done.returncode:
                print(f"{where} failed: {done.stderr.strip().splitlines()[-1]}", flush=True)
                continue
            found = json.loads(done.stdout.splitlines()[-1])
            row = {"contender": contender, "context": context, "batch": batch, "budget": args.budget}
            row |= {"store": store, "eager": args.eager, "bytes": found}
            row |= {"peak": max(found["prefill_peak"], found["decode_peak"])} | about | {"layers": layers}
            cells = "".join(f"{found[name] / 1e6:14.1f}" for name in (*STAGES, "store", "host"))
            print(f"{where}{cells}", flush=True)
            write_row(args.out, row)
            rows.append(row)
        if contender == "hybridkv" and fewer:
            continue  # see above
        for row in fitting(rows, args.fits, whole.num_hidden_layers, weights, args.at):
            row["made_of"]["caches_estimated"] = estimated(whole, contender, args, row["at_context"], row["at_batch"])
            print(f"{contender:>24} {described(row)}", flush=True)
            more = {"contender": contender, "budget": args.budget, "store": store, "eager": args.eager}
            write_row(args.out, more | row | about)


if __name__ == "__main__":
    main()
