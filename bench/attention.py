"""Milliseconds of one layer's attention in a decoding step: append a token, choose pages, attend.

    python -m bench.attention --contexts 8192 32768
    python -m bench.attention --page-sizes 16 64 --kernel-options BLOCK_N=16 BLOCK_N=16,num_stages=3    # on a GPU

Full caches: SDPA with `enable_gqa`, SDPA with the group's query heads as rows, FlexAttention over all pages. Then the
compressed cache, its retrieval included, and FlexAttention alone over as many pages as it reads. All are compiled and
run interleaved; a row gives medians. On a GPU a page is read in tiles of BLOCK_N tokens, a divisor of the page size,
num_stages of them in flight at a time: our own options (`kernel_options`) are measured before those that are asked for.

A GPU would be done with one layer before the host has launched it, and find the next call's cache in its L2: there a
call is a CUDA graph of several layers, one after the other, and its time is divided by their number. --kernels says
which kernels take it.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import product
from types import FunctionType
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from bench.common import add_model_arguments, copy_bandwidth, describe, make_model, random_prefill, write_row
from bench.decode import plain_bytes
from bench.kernels import launched
from hybridkv.cache import attention
from hybridkv.cache.dense import DenseCache, DenseLayer, attend_heads, attend_rows
from hybridkv.cache.hybrid import HybridCache
from hybridkv.config import HybridConfig
from hybridkv.engine import Engine
from hybridkv.model.decoder import Model


def kernel_options(text: str) -> dict[str, int]:
    """`BLOCK_N=16,num_stages=3` as FlexAttention takes it."""
    pairs = [pair.partition("=") for pair in text.split(",")]
    if not all(name.isidentifier() and number.isdecimal() for name, _, number in pairs):
        raise argparse.ArgumentTypeError(f"{text!r}: write NAME=NUMBER, several with commas between them")
    return {name: int(number) for name, _, number in pairs}


def sdpa_heads(layer: DenseLayer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend_heads(q, *layer.append(k, v))


def sdpa_rows(layer: DenseLayer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend_rows(q, *layer.append(k, v))


def through_cache(layer: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return layer(q, k, v)


POLICIES = {"hybridkv": "hybridkv", "flex": "streaming"}  # contender to the policy whose plan it reads
GPU_LAYERS = 16  # whose compressed caches of long contexts are together larger than any L2


def contenders(
    model: Model, context: int, batch: int, page_size: int, names: Sequence[str], budgets: Sequence[float]
) -> dict[str, tuple[Callable, HybridCache | DenseCache, int]]:
    """Name to a function of a cache's layer, q, k and v, the cache, and the bytes that a layer must read."""

    def loaded(policy: str, budget: float):
        engine = Engine(model, HybridConfig(budget=budget, page_size=page_size), policy, compile=False)
        engine.load([random_prefill(model, context, engine.config, b) for b in range(batch)], 8)
        return engine.cache

    layers = model.cfg.num_hidden_layers
    dense, plain = loaded("dense", 1.0), plain_bytes(model, context, batch)
    field = {
        "sdpa gqa": (sdpa_heads, dense, plain // layers),
        "sdpa rows": (sdpa_rows, dense, plain // layers),
    }
    caches = {"flex full": loaded("full", 1.0)} if "flex" in names else {}
    caches |= {f"{name} {budget:g}": loaded(POLICIES[name], budget) for budget in budgets for name in names}
    for name, cache in caches.items():
        field[name] = (through_cache, cache, cache.count_bytes().step // layers)
    return field


def graphed(run: Callable[[], None]) -> Callable[[], None]:
    """The same work as a CUDA graph, waited for."""
    run()  # compiled now
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return replay


def longest(run: Callable[[], None], cuda: bool, layers: int, count: int) -> dict[str, float]:
    """The `count` kernels, or operators of a CPU, that take most of a call: microseconds a layer."""
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as record:
        run()
    spent = {
        e.key: (e.self_device_time_total if cuda else e.self_cpu_time_total) / layers for e in record.key_averages()
    }
    return dict(sorted(spent.items(), key=lambda item: -item[1])[:count])


@torch.no_grad()
def measure(model: Model, context: int, page_size: int, args: argparse.Namespace) -> dict[str, dict]:
    """For each contender `times`, milliseconds a layer of every call, `bytes` that it must read, and its `kernels`."""
    cfg, batch, layers = model.cfg, args.batch, range(model.cfg.num_hidden_layers)
    draw = dict(device=model.device, dtype=model.dtype)
    q = torch.randn(batch, cfg.num_attention_heads, 1, cfg.head_dim, **draw)
    k, v = torch.randn(2, batch, cfg.num_key_value_heads, 1, cfg.head_dim, **draw)
    field = contenders(model, context, batch, page_size, args.contenders, args.budgets)
    runs: dict[str, Callable[[], None]] = {}
    for name, (f, cache, _) in field.items():
        # A code object of its own for each: Dynamo limits how often one is compiled.
        call = torch.compile(FunctionType(f.__code__.replace(), f.__globals__), fullgraph=True, dynamic=False)

        def run(call: Callable = call, cache: HybridCache | DenseCache = cache) -> None:
            for layer in layers:
                call(cache[layer], q, k, v)

        runs[name] = graphed(run) if q.is_cuda else run
    found = {name: {"times": [], "bytes": read, "kernels": {}} for name, (_, _, read) in field.items()}
    for i in range(3 + args.repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if i >= 3:
                found[name]["times"].append((time.perf_counter() - start) * 1e3 / len(layers))
    if args.kernels:
        for name, run in runs.items():
            found[name]["kernels"] = longest(run, q.is_cuda, len(layers), args.kernels)
            if q.is_cuda:
                found[name]["kernels_a_layer"] = launched(run) / len(layers)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--contexts", type=int, nargs="+", default=[8192, 32768], help="prompt tokens (default: 8192 32768)")
    add("--batch", type=int, default=1)
    add("--budgets", type=float, nargs="+", default=[0.1], help="of hybridkv (default: 0.1)")
    add("--page-sizes", type=int, nargs="+", default=[HybridConfig.page_size], help="tokens of a page (default: 16)")
    add("--kernel-options", type=kernel_options, nargs="+", default=[], help="of FlexAttention, see above")
    add("--contenders", nargs="+", choices=POLICIES, default=list(POLICIES), help="beside SDPA")
    add("--kernels", type=int, default=0, help="of each contender, so many of those that take longest (default: none)")
    add("--repeats", type=int, default=50, help="timed calls of each contender (default: 50)")
    add_model_arguments(parser)
    args = parser.parse_args(argv)

    args.layers = GPU_LAYERS if args.device.startswith("cuda") else 1
    model = make_model(args)
    about, bandwidth = describe("bench.attention", args, argv), copy_bandwidth(args.device)
    print(
        f"{'page':>5} {'context':>8} {'attention':>14} {'ms':>9} {'spread':>9} {'MB read':>9} {'roofline':>9} speed-up"
    )
    for options, page_size, context in product([{}, *args.kernel_options], args.page_sizes, args.contexts):
        if page_size % options.get("BLOCK_N", 1):
            continue  # no tile may cross into the next page
        torch.compiler.reset()  # what was compiled with other options looks the same
        told = attention.kernel_options(page_size) | options
        with patch.object(attention, "kernel_options", lambda _, told=told: told):
            found = measure(model, context, page_size, args)
        best = min(statistics.median(found[name]["times"]) for name in ("sdpa gqa", "sdpa rows"))
        for name, each in found.items():
            ms, (low, _, high) = statistics.median(each["times"]), statistics.quantiles(each["times"], n=4)
            row = {
                "contender": name,
                "context": context,
                "batch": args.batch,
                "page_size": page_size,
                "kernel_options": told,
                "ms": ms,
                "ms_spread": high - low,
                "bytes_read": each["bytes"],
                "roofline_share": each["bytes"] / bandwidth * 1e3 / ms,
                "speedup_vs_sdpa": best / ms,
                "kernels": each["kernels"],
                "kernels_a_layer": each.get("kernels_a_layer"),
            }
            print(
                f"{page_size:5d} {context:8d} {name:>14} {ms:9.3f} {high - low:9.3f} {each['bytes'] / 1e6:9.1f} "
                f"{row['roofline_share']:9.0%} {row['speedup_vs_sdpa']:7.2f}x  "
                + ",".join(f"{key}={number}" for key, number in options.items()),
                flush=True,
            )
            for kernel, us in each["kernels"].items():
                print(f"{us:35.1f} us  {kernel[:90]}", flush=True)
            write_row(args.out, row | about)


if __name__ == "__main__":
    main()
