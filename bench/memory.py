"""Bytes on the device before, during and after the prefill and while decoding: full against compressed cache.

    python -m bench.memory --contexts 4096 16384
    python -m bench.memory --shape qwen2.5-vl-7b --dtype bfloat16 --contexts 16384 65536 --memory 48

Contenders: `dense` (plain tensors), `full` (on pages), `hybridkv` (planned when the prompt has been read, so that its
whole cache stands beside the pages for a moment) and `hybridkv ahead` (heads known from an offline profile: each layer
is packed as it is read). Each runs in a process of its own.

On CUDA the numbers are the allocator's. On a CPU they are those of the tensors that are alive, counted after every
operation: what an operation allocates and frees inside is not seen, and `decode_peak` is what is held when decoding
begins, since an uncompiled step would gather pages. Weights are in all of them; `host` is the memory of the whole
process. What fits into --memory GB is extrapolated from the peaks of two contexts, or of two batches.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.common import QUESTION, add_model_arguments, describe, make_model, write_row
from hybridkv.config import HybridConfig
from hybridkv.decode import Engine, Sampling
from hybridkv.head_profile import HeadProfile
from model.decoder import Model

CONTENDERS = ("dense", "full", "hybridkv", "hybridkv ahead")
STAGES = ("weights", "prefill_peak", "prefilled", "decode_peak")


class LiveTensors(TorchDispatchMode):
    """Bytes of all tensors that operations made and that are still alive, and the most there ever were."""

    def __init__(self):
        super().__init__()
        self.sizes: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self.sizes[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())

    def now(self) -> int:
        self.sizes = {key: kept for key, kept in self.sizes.items() if not kept[0].expired()}
        return sum(size for _, size in self.sizes.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        self.peak = max(self.peak, self.now())
        return out


class Allocator:
    """The same, as CUDA's allocator counts it."""

    def __enter__(self) -> "Allocator":
        return self

    def __exit__(self, *error) -> None:
        pass

    @property
    def peak(self) -> int:
        return torch.cuda.max_memory_allocated()

    @peak.setter
    def peak(self, _: int) -> None:
        torch.cuda.reset_peak_memory_stats()

    def add(self, tensor: torch.Tensor) -> None:
        pass

    def now(self) -> int:
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()


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
    with tempfile.TemporaryDirectory() as folder:
        if ahead:
            shape = model.cfg.num_hidden_layers, model.cfg.num_key_value_heads
            file = Path(folder, "heads.json")
            HeadProfile(torch.rand(shape), torch.rand(shape), 1, "random").save(file)
            config = HybridConfig(budget=budget, classifier="profile", head_profile=str(file))
        engine = Engine(model, config, policy, compile=model.device.type == "cuda")
        prompts = [RandomPrompt(context, model.cfg.vocab_size) for _ in range(batch)]
        meter = Allocator() if model.device.type == "cuda" else LiveTensors()
        for p in model.parameters():
            meter.add(p)
        found = {"weights": meter.now()}
        meter.peak = 0
        with meter:
            steps = engine.stream(prompts, 4, Sampling())
            next(steps)
        found |= {"prefill_peak": meter.peak, "prefilled": meter.now()}
        meter.peak = 0
        if model.device.type == "cuda":
            list(steps)
            found["decode_peak"] = meter.peak
        else:  # uncompiled, a step gathers pages; compiled, it holds what it held before, and activations
            found["decode_peak"] = found["prefilled"]
        return found | {"host": psutil.Process().memory_info().rss}


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
