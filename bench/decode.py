"""Milliseconds per decoding step of the compressed cache and of the best full caches that PyTorch can do.

    python -m bench.decode --contexts 8192 32768
    python -m bench.decode --shape qwen2.5-vl-7b --dtype bfloat16 --contexts 8192 32768 --batches 1 8    # on a GPU

Contenders, on the same weights, contexts and machine, run interleaved in one process; a row gives medians:

    dense         a full cache in plain tensors, read by SDPA with the group's query heads as rows; compiled
    full          a full cache on our pages, read by FlexAttention; compiled
    transformers  transformers' own model on its StaticCache; compiled
    eager         transformers' own model on its DynamicCache, as `generate` runs it; only if asked for
    hybridkv B    the compressed cache with a budget of B; compiled
    hybridkv B in S     the same, with dynamic heads in a share S of the layers (--retrieving-layers)
    hybridkv N tokens   the same with the smallest budget whose steps read N of the prompt's tokens (--attended)
    ... store S   with chunks of dynamic heads on the device or in host memory (--stores)
    ... NAME=VALUE      each of these compiled with other options, too (--inductor, see bench/inductor.py)

Keys and values of the context are random (a prefill would take minutes and change nothing), and the configured share of
the heads is dynamic, so that random attention does not distort the budget. Queries of random weights hardly change from
step to step; so, with the store on the host, a share of the frames (--new-chunks) is emptied before each step, outside
of its time, and what they held is fetched again.

A step must at least read the weights and its share of the cache. `roofline` is the share of the step's time that this
takes at the bandwidth of a copy, measured in the same run; `at most` is the speed-up over `dense` that the bytes allow;
`kernels` are those of a step for each layer, on a GPU (`bench.kernels` counts them without one).
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch._inductor import config as inductor_config

from bench.common import (
    add_model_arguments,
    copy_bandwidth,
    describe,
    make_model,
    random_prefill,
    spread_profile,
    weight_bytes,
    write_row,
)
from bench.inductor import Options, inductor_options, named
from bench.kernels import launched
from bench.peers import transformers_decode
from hybridkv.cache.hybrid import HybridCache
from hybridkv.config import HybridConfig
from hybridkv.engine import Engine, Sampling
from hybridkv.model.decoder import Model
from hybridkv.planning.budget import BudgetError
from hybridkv.planning.plan import hybrid_plan

COLUMNS = (
    "ms/step",
    "spread",
    "tokens/s",
    "MB read",
    "GB/s",
    "roofline",
    "speed-up",
    "at most",
    "compile s",
    "kernels",
)
CONTENDERS = ("dense", "full", "transformers", "hybridkv", "eager")
WARM_UP = 3  # steps after the first: CUDA graphs are recorded on the second call


@dataclass
class Contender:
    """A cache with contexts in it, and the step that reads it.

    Attributes:
        step: takes one step, (B,) tokens.
        cache_bytes: of the contexts' cache that a step must read.
        compile_s: seconds of the first step.
        cache: of ours on pages; None for the others.
        options: what the compiler is told beside its defaults.
    """

    name: str
    budget: float
    step: Callable[[], Tensor]
    cache_bytes: int
    compile_s: float = 0.0
    cache: HybridCache | None = None
    options: Options | None = None

    @property
    def host(self) -> bool:
        return self.cache is not None and self.cache.capacity.host

    def empty(self, share: float) -> None:
        """Takes the chunks out of a share of the frames."""
        for held in (pool.held for pool in self.cache.pools) if self.host else ():
            held.masked_fill_(torch.rand(held.shape, device=held.device) < share, -1)

    def warm_up(self) -> "Contender":
        start = time.perf_counter()
        with inductor_config.patch(self.options or {}):
            self.step().tolist()
        self.compile_s = time.perf_counter() - start
        for _ in range(WARM_UP):
            self.step().tolist()
        return self


def plain_bytes(model: Model, context: int, batch: int) -> int:
    """Keys and values of a full cache without pages."""
    cfg = model.cfg
    token = 2 * cfg.num_hidden_layers * cfg.num_key_value_heads * cfg.head_dim * model.dtype.itemsize
    return batch * context * token


def budget_reading(model: Model, config: HybridConfig, context: int, tokens: int) -> HybridConfig:
    """The configuration with the smallest budget whose steps read `tokens` of a context, mean over heads.

    Raises:
        ValueError: none reads so many, to the page.
    """
    low, high, found = 0.0, 1.0, 0.0
    record = random_prefill(model, context, config)
    for _ in range(14):
        middle = (low + high) / 2
        record.config = replace(config, budget=middle)
        try:
            read = float(hybrid_plan(record).attended.double().mean())
        except BudgetError:
            read = 0.0
        if read >= tokens:
            high, found = middle, read
        else:
            low = middle
    coarse = tokens / 8 if config.on_host(model.device) else 0  # a pool's sizes are rounded
    if not tokens <= found <= tokens + config.page_size + coarse:
        raise ValueError(f"no budget reads {tokens} of {context} tokens")
    return replace(config, budget=high)


def ours(
    model: Model, policy: str, config: HybridConfig, context: int, batch: int, new_tokens: int, name: str = ""
) -> Contender:
    """One of our caches: `dense`, or a policy on pages."""
    engine = Engine(model, config, policy)
    with torch.no_grad():
        engine.load([random_prefill(model, context, engine.config, b) for b in range(batch)], new_tokens)
        engine.begin([context] * batch, new_tokens, Sampling(), model.device)
    paged = policy != "dense"
    cache = engine.cache.count_bytes().step if paged else plain_bytes(model, context, batch)
    step = torch.no_grad()(engine.step)
    return Contender(name or policy, config.budget, step, cache, cache=engine.cache if paged else None)


def theirs(model: Model, compiled: bool, context: int, batch: int, new_tokens: int) -> Contender:
    """transformers, see `peers.transformers_decode`."""
    prefills = [random_prefill(model, context, HybridConfig(), b) for b in range(batch)]
    step = transformers_decode.decoder(model, prefills, new_tokens, compiled)
    return Contender("transformers" if compiled else "eager", 1.0, step, plain_bytes(model, context, batch))


def contenders(model: Model, args: argparse.Namespace, context: int, batch: int) -> list[Contender]:
    """All that are asked for, `dense` first."""
    return [each for options in [{}, *args.inductor] for each in told(options, model, args, context, batch)]


def told(options: Options, model: Model, args: argparse.Namespace, context: int, batch: int) -> list[Contender]:
    """Those that are asked for, compiled with these options; transformers' own only without any."""
    sizes = (context, batch, 2 + WARM_UP + args.steps)  # kernels are counted in one more
    config = HybridConfig(budget=1.0, page_size=args.page_size)
    field = [ours(model, "dense", config, *sizes)]

    def paged(name: str, policy: str, make_config: Callable[[], HybridConfig]) -> None:
        try:
            field.append(ours(model, policy, make_config(), *sizes, name))
        except ValueError as e:  # no budget is small or large enough, or the pool too large to read
            print(f"{batch:5d} {context:8d} {name}: {e}", flush=True)

    if "full" in args.contenders:
        paged("full", "full", lambda: config)
    kinds = {} if options else {"transformers": True, "eager": False}
    field += [theirs(model, compiled, *sizes) for name, compiled in kinds.items() if name in args.contenders]
    if "hybridkv" in args.contenders:
        for kind in args.stores or [None]:
            kept, store = replace(config, store=kind), f" store {kind}" if kind else ""
            for budget in args.budgets:
                for share in args.retrieving_layers:
                    name = f"hybridkv {budget:g}" + f" in {share:g}" * (share < 1) + store
                    profile = spread_profile(model.cfg, share) if share < 1 else None
                    settings = dict(budget=budget, head_profile=profile, retrieving_layers=share)
                    paged(name, "hybridkv", partial(replace, kept, **settings))
            for tokens in args.attended:
                reading = partial(budget_reading, model, kept, context, tokens)
                paged(f"hybridkv {tokens} tokens{store}", "hybridkv", reading)
    return [replace(each, name=each.name + named(options), options=options) for each in field]


def interleaved(field: list[Contender], steps: int, new_chunks: float = 0.0) -> dict[str, list[float]]:
    """Milliseconds of each step of each contender, one after the other in turn; see `Contender.empty`."""
    times: dict[str, list[float]] = {each.name: [] for each in field}
    for _ in range(steps):
        for each in field:
            each.empty(new_chunks)
            start = time.perf_counter()
            each.step().tolist()
            times[each.name].append((time.perf_counter() - start) * 1e3)
    return times


def measure(model: Model, args: argparse.Namespace, context: int, batch: int, bandwidth: float) -> list[dict]:
    """A row for each contender."""
    field = [each.warm_up() for each in contenders(model, args, context, batch)]
    for each in field:
        if each.host:
            each.cache.fetched.zero_()
    times, weights = interleaved(field, args.steps, args.new_chunks), weight_bytes(model)
    median = {name: statistics.median(values) for name, values in times.items()}
    full = [each.name for each in field if each.budget == 1]
    layers = model.cfg.num_hidden_layers
    kernels = {each.name: launched(each.step) / layers for each in field} if model.device.type == "cuda" else {}
    rows = []
    for each in field:
        low, _, high = statistics.quantiles(times[each.name], n=4)
        ms, read = median[each.name], weights + each.cache_bytes
        rows.append(
            {
                "contender": each.name,
                "budget": each.budget,
                "page_size": args.page_size,
                "context": context,
                "batch": batch,
                "ms_per_token": ms,
                "ms_spread": high - low,
                "tokens_per_s": batch / ms * 1e3,
                "bytes_read": read,
                "cache_bytes": each.cache_bytes,
                "roofline_ms": read / bandwidth * 1e3,
                "roofline_share": read / bandwidth * 1e3 / ms,
                "speedup_vs": {name: median[name] / ms for name in full},
                "speedup_limit": (weights + field[0].cache_bytes) / read,
                "compile_s": each.compile_s,
                "kernels": kernels.get(each.name),
            }
        )
        if each.cache is not None:
            held = each.cache.count_bytes()
            rows[-1] |= {"resident_bytes": held.resident, "allocated_bytes": held.allocated}
        if each.host:
            new = each.cache.new_chunks(args.steps)
            bus = new * int(each.cache.n_retrieve.sum()) * each.cache.costs.page
            rows[-1] |= {"host_bytes": held.host, "new_chunks": new, "bus_bytes": bus}
    return rows


def line(row: dict) -> str:
    ms, read = row["ms_per_token"], row["bytes_read"]
    return (
        f"{row['batch']:5d} {row['context']:8d} {row['contender']:>26}{ms:10.3f}{row['ms_spread']:10.3f}"
        f"{row['tokens_per_s']:10.0f}{read / 1e6:10.1f}{read / ms / 1e6:10.1f}{row['roofline_share']:10.0%}"
        f"{row['speedup_vs']['dense']:9.2f}x{row['speedup_limit']:9.2f}x{row['compile_s']:10.1f}"
        + ("" if row["kernels"] is None else f"{row['kernels']:10.1f}")
    )


def plot(rows: list[dict], file: Path) -> None:
    """Milliseconds, with the roofline dashed, and speed-up, with what the bytes allow dashed.

    A row of pictures against the context for each batch, and against the batch for each context, that has several.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [
        (x, fixed, group)
        for x, fixed in (("context", "batch"), ("batch", "context"))
        for group in sorted({row[fixed] for row in rows})
        if len({row[x] for row in rows if row[fixed] == group}) > 1
    ] or [("context", "batch", rows[0]["batch"])]
    names = list(dict.fromkeys(row["contender"] for row in rows))
    figure, axes = plt.subplots(len(lines), 2, figsize=(11, 4 * len(lines)), squeeze=False)
    for (left, right), (x, fixed, group) in zip(axes, lines, strict=True):
        for i, name in enumerate(names):
            mine = sorted((r for r in rows if r["contender"] == name and r[fixed] == group), key=lambda r: r[x])
            at, colour = [row[x] for row in mine], f"C{i}"
            left.plot(at, [row["ms_per_token"] for row in mine], marker="o", ms=4, color=colour, label=name)
            left.plot(at, [row["roofline_ms"] for row in mine], ls="--", lw=0.8, color=colour)
            right.plot(at, [row["speedup_vs"]["dense"] for row in mine], marker="o", ms=4, color=colour, label=name)
            right.plot(at, [row["speedup_limit"] for row in mine], ls="--", lw=0.8, color=colour)
        left.set(ylabel="ms a step (dashed: roofline)", yscale="log", title=f"{fixed} {group}")
        right.set(ylabel="speed-up over dense (dashed: at most)", title=f"{fixed} {group}")
        for axis in (left, right):
            axis.set(xlabel=x, xscale="log")
            ticks = sorted({row[x] for row in rows if row[fixed] == group})
            axis.set_xticks(ticks, [str(n) for n in ticks])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=7)
    figure.suptitle(f"{rows[0]['model']}, {rows[0]['dtype']}, {rows[0]['machine']}")
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--contexts", type=int, nargs="*", default=[8192, 32768], help="prompt tokens (default: 8192 32768); none: draw"
    )
    add("--batches", type=int, nargs="+", default=[1], help="sequences decoded together (default: 1)")
    add("--budgets", type=float, nargs="*", default=[0.05, 0.1, 0.2], help="of hybridkv (default: 0.05 0.1 0.2)")
    add(
        "--retrieving-layers",
        type=float,
        nargs="+",
        default=[1.0],
        metavar="S",
        help="shares of the layers in which heads of hybridkv may be dynamic (default: 1)",
    )
    add("--attended", type=int, nargs="*", default=[], help="and with so many prompt tokens read a step")
    add("--stores", nargs="*", choices=("device", "host"), default=[], help="of hybridkv (default: the device's own)")
    add("--new-chunks", type=float, default=0.16, help="share of chunks that a step must fetch (default: 0.16)")
    add("--page-size", type=int, default=HybridConfig.page_size, help="tokens of a page (default: 16)")
    add("--inductor", type=inductor_options, nargs="*", default=[], metavar="NAME=VALUE", help="see bench/inductor.py")
    add("--steps", type=int, default=30, help="timed steps of each contender (default: 30)")
    add("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS[:4], help="(default: all but eager)")
    add("--plot", type=Path, help="picture of this model's rows in --out, or of this run's")
    add_model_arguments(parser)
    args = parser.parse_args(argv)
    if "dense" not in args.contenders:
        parser.error("dense is what the others are compared with: add it to --contenders")

    model = make_model(args)
    about, bandwidth = describe("bench.decode", args, argv), copy_bandwidth(args.device)
    print(f"copies run at {bandwidth / 1e9:.1f} GB/s: the roofline")
    print(f"batch {'context':>8} {'cache':>26}" + "".join(f"{h:>10}" for h in COLUMNS), flush=True)
    rows = []
    for batch in args.batches:
        for context in args.contexts:
            try:
                found = measure(model, args, context, batch, bandwidth)
            except torch.OutOfMemoryError:
                print(f"{batch:5d} {context:8d} does not fit into the device's memory", flush=True)
                continue
            for row in found:
                print(line(row), flush=True)
                write_row(args.out, row | about)
                rows.append(row | about)
    if args.plot and args.out:
        rows = [row for row in map(json.loads, args.out.read_text().splitlines()) if row["model"] == about["model"]]
    if args.plot and rows:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
