"""Milliseconds per decoding step: hybrid and full cache on pages, and the full cache as plain tensors with SDPA.

All are compiled and run interleaved in one process; a row gives medians. The decoder has random weights and the shape
that the options say; keys and values of the context are random too (a prefill would take minutes and change nothing),
and the head mix is the configured share, so that random attention does not distort the budget.

    python -m bench.decode --contexts 8192 32768
"""

import argparse
import json
import platform
import statistics
import sys
import time
from dataclasses import replace
from functools import partial

import torch

from hybridkv.config import HybridConfig
from hybridkv.decode import Engine, Sampling
from hybridkv.profile import LayerProfile, Prefill
from model.config import Config
from model.decoder import Model

COLUMNS = ("ms/step", "spread", "MB read", "GB/s", "speed-up", "compile s")


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


@torch.no_grad()
def step_ms(engine: Engine) -> float:
    start = time.perf_counter()
    engine.step().tolist()
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = partial(parser.add_argument, type=int)
    add("--contexts", nargs="+", default=[8192, 32768], help="prompt tokens (default: 8192 32768)")
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.1], help="of the hybrid cache (default: 0.1)")
    add("--batch", default=1)
    add("--steps", default=30, help="timed steps for each contender (default: 30)")
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
    args = parser.parse_args()

    torch.manual_seed(0)
    model = random_model(args)
    machine = (
        torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.processor() or platform.machine()
    )
    command = "python -m bench.decode " + " ".join(sys.argv[1:])
    print(f"{command}\ntorch {torch.__version__}, {machine}, {torch.get_num_threads()} threads, {args.dtype}")
    print(f"{'context':>8} {'cache':>12}" + "".join(f"{h:>10}" for h in COLUMNS))
    weights = sum(p.nbytes for p in model.parameters())
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
                layers=args.layers,
                kv_heads=args.kv_heads,
                group=args.group,
                head_dim=args.head_dim,
                ms_per_token=ms,
                ms_spread=high - low,
                bytes_read=reads[name],
                speedup_vs_dense=statistics.median(times["dense"]) / ms,
                compile_s=compiles[name],
                device=args.device,
                machine=machine,
                dtype=args.dtype,
                torch=torch.__version__,
                command=command,
            )
            print(
                f"{context:8d} {name:>12}{ms:10.3f}{high - low:10.3f}{reads[name] / 1e6:10.1f}"
                f"{reads[name] / ms / 1e6:10.1f}{row['speedup_vs_dense']:9.2f}x{compiles[name]:10.1f}",
                flush=True,
            )
            if args.out:
                with open(args.out, "a", encoding="utf-8") as f:
                    f.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
