"""Milliseconds per decoding step: hybrid and full cache on pages, and the full cache as plain tensors with SDPA.

All are compiled and run interleaved in one process; a row gives medians. The decoder has random weights and the shape
that the options say; keys and values of the context are random too (a prefill would take minutes and change nothing),
and the head mix is the configured share, so that random attention does not distort the budget.

A step must at least read the weights and its share of the cache. `roofline` is the time that this takes at the
bandwidth of a copy, measured in the same run, as a share of the step's; `at most` is the speed-up that the bytes allow.

    python -m bench.decode --contexts 8192 32768
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from hybridkv.config import HybridConfig
from hybridkv.decode import Engine, Sampling
from hybridkv.profile import LayerProfile, Prefill
from model.config import Config
from model.decoder import Model

COLUMNS = ("ms/step", "spread", "MB read", "GB/s", "roofline", "speed-up", "at most", "compile s")
COPY_BYTES = 1 << 28  # far above any cache; a fast GPU copies it in a fraction of a millisecond


def random_model(args: argparse.Namespace) -> Model:
    cfg = Config(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.kv_heads * args.group,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_dim,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        max_position_embeddings=1 << 20,
        attention_bias=True,
        tie_word_embeddings=True,
    )
    with torch.device(args.device):
        model = Model(cfg).to(getattr(torch, args.dtype)).requires_grad_(False).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02)
    return model


def random_prefill(model: Model, tokens: int, config: HybridConfig) -> Prefill:
    """The record of a prompt that was never read: random keys, values and profile, the last 64 tokens not prunable."""
    cfg = model.cfg
    prefill = Prefill(torch.arange(tokens, device=model.device) < tokens - 64, config)
    for _ in range(cfg.num_hidden_layers):
        k, v = torch.randn(2, cfg.num_key_value_heads, tokens, cfg.head_dim, device=model.device, dtype=model.dtype)
        score, (mass, overlap) = torch.rand(k.shape[:2], device=k.device), torch.rand(2, len(k), device=k.device)
        prefill.layers.append(LayerProfile(k, v, score, score, mass, mass, overlap))
    return prefill


def ready(
    model: Model, policy: str, config: HybridConfig, args: argparse.Namespace, context: int
) -> tuple[Engine, float]:
    """An engine with `batch` contexts loaded and its step compiled, and the seconds that compiling took."""
    engine = Engine(model, config, policy)
    new_tokens = 8 + args.steps
    prefills = [random_prefill(model, context, config) for _ in range(args.batch)]
    with torch.no_grad():
        engine.load(prefills, new_tokens)
        engine.begin([context] * args.batch, new_tokens, Sampling(), model.device)
        start = time.perf_counter()
        engine.step().tolist()
        compile_s = time.perf_counter() - start
        for _ in range(3):  # CUDA graphs are recorded on the second call
            engine.step().tolist()
    return engine, compile_s


def copy_bandwidth(device: str, repeats: int = 9) -> float:
    """Bytes a second that the device reads and writes when it copies a large tensor: median."""
    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        target.copy_(source)
        target[-1].item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return 2 * COPY_BYTES / statistics.median(seconds)


@torch.no_grad()
def step_ms(engine: Engine) -> float:
    start = time.perf_counter()
    engine.step().tolist()
    return (time.perf_counter() - start) * 1e3


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The decoder's shape, where it runs, and where rows go."""
    add = partial(parser.add_argument, type=int)
    add("--layers", default=2)
    add("--kv-heads", default=4)
    add("--group", default=7, help="query heads for each KV head (default: 7)")
    add("--head-dim", default=128)
    add("--hidden-size", default=512)
    add("--intermediate-size", default=1024)
    add("--vocab-size", default=1024)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--out", help="append JSON lines to this file")


def describe(module: str, args: argparse.Namespace, argv: Sequence[str] | None) -> dict:
    """What a row needs to be understood: shape, machine, versions, command. Prints the last three, too."""
    cuda = args.device.startswith("cuda")
    about = {
        **{name: getattr(args, name) for name in ("layers", "kv_heads", "group", "head_dim", "device", "dtype")},
        "machine": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "command": f"python -m {module} {' '.join(sys.argv[1:] if argv is None else argv)}",
    }
    threads = torch.get_num_threads()
    print(f"{about['command']}\ntorch {about['torch']}, {about['machine']}, {threads} threads, {args.dtype}")
    return about


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = partial(parser.add_argument, type=int)
    add("--contexts", nargs="+", default=[8192, 32768], help="prompt tokens (default: 8192 32768)")
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.1], help="of the hybrid cache (default: 0.1)")
    add("--batch", default=1)
    add("--steps", default=30, help="timed steps for each contender (default: 30)")
    add_model_arguments(parser)
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    model = random_model(args)
    about = describe("bench.decode", args, argv)
    weights, bandwidth = sum(p.nbytes for p in model.parameters()), copy_bandwidth(args.device)
    print(f"copies run at {bandwidth / 1e9:.1f} GB/s: the roofline")
    print(f"{'context':>8} {'cache':>12}" + "".join(f"{h:>10}" for h in COLUMNS))
    for context in args.contexts:
        contenders = {"dense": ("dense", HybridConfig()), "full": ("full", HybridConfig())}
        for budget in args.budgets:
            contenders[f"hybridkv {budget:g}"] = ("hybridkv", replace(HybridConfig(), budget=budget))
        engines, compiles, times, reads = {}, {}, {name: [] for name in contenders}, {}
        for name, (policy, config) in contenders.items():
            engines[name], compiles[name] = ready(model, policy, config, args, context)
            if policy == "dense":
                cache = args.batch * context * 2 * args.layers * args.kv_heads * args.head_dim * model.dtype.itemsize
            else:
                cache = engines[name].cache.count_bytes().step
            reads[name] = weights + cache
        for _ in range(args.steps):
            for name, engine in engines.items():
                times[name].append(step_ms(engine))
        for name in contenders:
            ms = statistics.median(times[name])
            low, _, high = statistics.quantiles(times[name], n=4)
            row = dict(
                contender=name,
                context=context,
                batch=args.batch,
                ms_per_token=ms,
                ms_spread=high - low,
                bytes_read=reads[name],
                roofline_ms=reads[name] / bandwidth * 1e3,
                roofline_share=reads[name] / bandwidth * 1e3 / ms,
                speedup_vs_dense=statistics.median(times["dense"]) / ms,
                speedup_limit=reads["dense"] / reads[name],
                compile_s=compiles[name],
                **about,
            )
            print(
                f"{context:8d} {name:>12}{ms:10.3f}{high - low:10.3f}{reads[name] / 1e6:10.1f}"
                f"{reads[name] / ms / 1e6:10.1f}{row['roofline_share']:10.0%}{row['speedup_vs_dense']:9.2f}x"
                f"{row['speedup_limit']:9.2f}x{compiles[name]:10.1f}",
                flush=True,
            )
            if args.out:
                with open(args.out, "a", encoding="utf-8") as f:
                    f.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
