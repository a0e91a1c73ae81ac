"""What a model's caches will take, from its config.json alone: no weights are read or downloaded.

    python -m hybridkv.estimate Qwen/Qwen2.5-VL-7B-Instruct --tokens 30000 --memory 48GB
    python -m hybridkv.estimate FOLDER --tokens 30000 --batch 8 --budget 0.05 --json
    python -m hybridkv.estimate demo --tokens 4000

The arithmetic is that of the cache itself: a plan is made for a prompt of so many tokens, and what its tensors would
take is counted. A quarter of the heads is dynamic, in three quarters of the layers. `device` is held there by weights
apart, room for new tokens included; `step` is what a step reads of the caches; `bus` is what a step fetches from host
memory if `--new-chunks` of the chunks that it reads are new. With `--memory`: the largest batch of such prompts, and
the longest prompts in such a batch that the model can read, that fit beside the weights. What a prefill needs for a
moment comes on top: activations, and one layer's keys and values.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from hybridkv import demos
from hybridkv.cache.capacity import Capacity
from hybridkv.cli import Parser, one_line_errors, positive
from hybridkv.config import HybridConfig
from hybridkv.model import CheckpointError, InputError, Model
from hybridkv.model.config import Config, load_config
from hybridkv.planning.classify import highest, retrieving_layers
from hybridkv.planning.head_profile import HeadProfile
from hybridkv.planning.plan import Costs, Plan, budgeted_plan, full_bytes, full_plan, static_score
from hybridkv.planning.prefill import Prefill
from hybridkv.report import size

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LARGEST_BATCH = 4096  # that is counted: larger ones take minutes to count, and no such batch is decoded
UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass(frozen=True)
class Estimate:
    """Bytes of the caches of a batch.

    Attributes:
        device_bytes: on the device, room for new tokens included. host_bytes: in host memory.
        step_bytes: read by a decoding step. bus_bytes: fetched from the host by one.
        everything_kept: against the budget: what every head must keep takes as much as the full cache.
        largest_batch, largest_tokens: what fits into the memory that was asked about, LARGEST_BATCH prompts at most;
            None where none was.
    """

    device_bytes: int
    host_bytes: int
    step_bytes: int
    bus_bytes: int
    everything_kept: bool = False
    largest_batch: int | None = None
    largest_tokens: int | None = None


@dataclass(frozen=True)
class Question:
    """What is asked about a model: prompts of `tokens` tokens, of which the last `always` are kept in every head."""

    cfg: Config
    config: HybridConfig
    dtype: torch.dtype
    tokens: int
    batch: int = 1
    new_tokens: int = 128
    always: int = 64
    new_chunks: float = 0.16

    def outline(self) -> Prefill:
        """The record of such a prompt before it is read."""
        layers, heads = self.cfg.num_hidden_layers, self.cfg.num_key_value_heads
        need = torch.arange(float(layers * heads)).view(layers, heads)  # which heads they are makes no difference
        config = replace(self.config, head_profile=self.config.head_profile or HeadProfile(need, need))
        prunable = torch.arange(self.tokens) < self.tokens - self.always
        return Prefill(prunable, config).outline(layers, torch.zeros(heads, 0, self.cfg.head_dim, dtype=self.dtype))

    def ours(self) -> Estimate:
        """The hybrid cache.

        Raises:
            BudgetError: the budget can't hold what must be kept.
        """
        outline = self.outline()
        layers = retrieving_layers(outline)
        dynamic = highest(outline.config.head_profile.need, self.config.dynamic_share, layers)
        room = layers * dynamic.shape[1]
        return self.of_plan(budgeted_plan(outline, dynamic, static_score, retrieving=room))

    def full(self) -> Estimate:
        """A plain full cache."""
        plan = full_plan(self.outline())
        bytes_of = [full_bytes(n, plan.n_read.numel(), self.costs, plan.page_size) for n in (0, self.new_tokens)]
        prompts = self.batch * full_bytes(self.tokens, plan.n_read.numel(), self.costs, plan.page_size)
        return Estimate(prompts + self.batch * sum(bytes_of), 0, prompts, 0)

    def of_plan(self, plan: Plan) -> Estimate:
        """A cache for a batch of prompts with this plan."""
        capacity = Capacity.of([plan] * self.batch, self.new_tokens)
        chunks = int(plan.n_retrieve.sum()) * self.batch * self.new_chunks
        return Estimate(
            device_bytes=capacity.device_bytes(self.costs, self.batch * plan.n_read.shape[1]),
            host_bytes=capacity.host_bytes(self.costs),
            step_bytes=self.batch * plan.step_bytes(self.costs),
            bus_bytes=round(chunks * self.costs.page) if plan.host else 0,
            everything_kept=plan.no_room,
        )

    @property
    def costs(self) -> Costs:
        return Costs.of(self.config, self.cfg.head_dim, self.dtype)


def largest(fits: Callable[[int], bool]) -> int:
    """The largest number that fits, if all below it do; 0 if none does."""
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def with_largest(question: Question, kind: str, room: int) -> Estimate:
    """`full` or `ours`, and what fits into `room` bytes."""

    def fits(**changes: int) -> bool:
        if changes.get("batch", 0) > LARGEST_BATCH:
            return False
        if changes.get("tokens", 0) + question.new_tokens > question.cfg.max_position_embeddings:
            return False
        try:
            return getattr(replace(question, **changes), kind)().device_bytes <= room
        except ValueError:  # too few tokens for this budget
            return changes.get("tokens", 0) < question.tokens

    return replace(
        getattr(question, kind)(),
        largest_batch=largest(lambda n: fits(batch=n)),
        largest_tokens=largest(lambda n: fits(tokens=n)),
    )


def weight_bytes(cfg: Config, dtype: torch.dtype) -> int:
    """All of a model's weights, its vision tower's included."""
    with torch.device("meta"):
        return sum(p.numel() for p in Model(cfg).parameters()) * dtype.itemsize


def memory(text: str) -> int:
    """An argument such as 24GB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kMGT]?)B?", text)
    if not found or not float(found[1]):
        raise argparse.ArgumentTypeError(f"must be bytes such as 24GB, got {text!r}")
    return int(float(found[1]) * UNITS[found[2]])


def read_config(name: str) -> Config:
    """`config.json` of a folder, of `demo`, or of a model on the Hub, of which nothing else is downloaded."""
    name = str(demos.MODEL) if name == "demo" else name
    if Path(name).expanduser().is_dir():
        return load_config(Path(name).expanduser())
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name, re.ASCII):
        raise InputError(f"{name[:200]!r} is neither a folder nor a Hub name such as Qwen/Qwen2.5-VL-7B-Instruct")
    from huggingface_hub import hf_hub_download

    try:
        return load_config(Path(hf_hub_download(name, "config.json")).parent)
    except CheckpointError:
        raise
    except Exception as e:  # any: the Hub client's HTTP library, and with it the errors of a network, change
        reason = (str(e).strip() or type(e).__name__).splitlines()[0][:200]
        raise CheckpointError(f"the config.json of {name[:200]!r} could not be downloaded: {reason}") from e


def build_parser() -> Parser:
    parser = Parser("estimate", __doc__)
    add = parser.add_argument
    add("model", metavar="MODEL", help="a folder with config.json, a name on the Hugging Face Hub, or demo")
    add("--tokens", type=positive, required=True, metavar="N", help="tokens of each prompt")
    add("--batch", type=positive, default=1, metavar="B", help="prompts decoded together (default: 1)")
    add("--budget", type=float, default=0.1, metavar="B", help="share of the full cache's bytes (default: 0.1)")
    add("--store", choices=("device", "host"), default="host", help="where chunks of dynamic heads are (default: host)")
    add("--max-new-tokens", type=positive, default=128, metavar="N", help="longest answer (default: 128)")
    add("--keep-new", type=positive, metavar="N", help="newest tokens that static heads keep (default: all)")
    add("--always", type=positive, default=64, metavar="N", help="text that every head keeps (default: 64 tokens)")
    add("--new-chunks", type=float, default=0.16, metavar="S", help="share of chunks that is fetched (default: 0.16)")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of weights and caches (default: bfloat16)")
    add("--memory", type=memory, metavar="24GB", help="of the device: what fits?")
    add("--json", action="store_true", help="one JSON object")
    return parser


def run(args: argparse.Namespace) -> None:
    if not 0 <= args.new_chunks <= 1:
        raise InputError(f"--new-chunks must lie in [0, 1], got {args.new_chunks}")
    if args.always >= args.tokens:
        raise InputError(f"--always {args.always} leaves nothing of {args.tokens} tokens to compress")
    if args.batch > LARGEST_BATCH:
        raise InputError(f"--batch must be {LARGEST_BATCH} at most, got {args.batch}")
    cfg, dtype = read_config(args.model), DTYPES[args.dtype]
    if args.tokens + args.max_new_tokens > cfg.max_position_embeddings:
        raise InputError(
            f"{args.tokens} tokens and {args.max_new_tokens} new ones are more than the {cfg.max_position_embeddings} "
            "that the model reads"
        )
    config = HybridConfig(budget=args.budget, store=args.store, keep_new=args.keep_new)
    question = Question(cfg, config, dtype, args.tokens, args.batch, args.max_new_tokens, args.always, args.new_chunks)
    weights = weight_bytes(cfg, dtype)
    if args.memory is not None and args.memory <= weights:
        raise InputError(f"the weights alone take {size(weights)}, more than {size(args.memory)}")
    found = {
        kind: getattr(question, kind)() if args.memory is None else with_largest(question, kind, args.memory - weights)
        for kind in ("full", "ours")
    }
    if args.json:
        asked = {"model": args.model, "tokens": args.tokens, "batch": args.batch, "budget": args.budget}
        caches = {kind: asdict(each) for kind, each in found.items()}
        print(json.dumps(asked | {"store": args.store, "dtype": args.dtype, "weight_bytes": weights} | caches))
        return
    print(f"weights {size(weights)}; {args.batch} x {args.tokens} tokens, {args.dtype}")
    head = ["cache", "device", "host", "step", "bus"] + ["largest batch", "longest prompts"] * (args.memory is not None)
    cells = [head]
    for kind, each in found.items():
        name = "full" if kind == "full" else f"hybridkv {args.budget:g}"
        sizes = [size(each.device_bytes), size(each.host_bytes), size(each.step_bytes), size(each.bus_bytes)]
        more = "" if each.largest_batch != LARGEST_BATCH else " or more"
        fits = [f"{each.largest_batch}{more}", f"{each.largest_tokens} tokens"] * (args.memory is not None)
        cells.append([name, *sizes, *fits])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    if found["ours"].everything_kept:
        kept = int((~question.outline().prunable).sum())
        print(
            f"note: nothing is pruned: the {kept} of {args.tokens} tokens that every head keeps, in pages and with "
            "tables, take as much as the full cache",
            file=sys.stderr,
        )
    print("\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells))


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    with one_line_errors(parser, "ask about fewer tokens"):
        run(parser.parse_args(argv))


if __name__ == "__main__":
    main()
