"""Time to the first token of a question that is read with its context, and of one about a reading; random weights.

    python -m bench.reading_speed --shape qwen2.5-vl-7b --dtype bfloat16 --tokens 30000    # on a GPU
    python -m bench.reading_speed --tokens 4096                                            # anywhere

Nothing is compiled. `beside` is what the device allocated at most beside weights and cache, known on a GPU alone, and
`layers` the same in layers of the reading: two of them, and what the profile of a layer's window needs.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from bench.common import QUESTION, add_model_arguments, describe, make_model, spread_profile, write_row
from hybridkv.config import HybridConfig
from hybridkv.engine import Engine
from hybridkv.model import Prompt
from hybridkv.model.decoder import Model
from hybridkv.report import size


def random_prompt(model: Model, tokens: int, question: int) -> Prompt:
    """The same random context, and another question at its end."""
    ids = torch.randint(model.cfg.vocab_size, (tokens,), generator=torch.Generator().manual_seed(0))
    ids[-QUESTION:] = torch.randint(
        model.cfg.vocab_size, (QUESTION,), generator=torch.Generator().manual_seed(1 + question)
    )
    return Prompt(ids, torch.arange(tokens) < tokens - QUESTION, 0, None, [], [])


def timed(model: Model, work: Callable[[], object]) -> tuple[float, int, object]:
    """Seconds, the most bytes that the device allocated meanwhile (0 if it does not say), and what came out."""
    cuda = model.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    done = work()  # ends with a token on the host, or all layers there
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start, torch.cuda.max_memory_allocated() if cuda else 0, done


def measure(model: Model, policy: str, config: HybridConfig, tokens: int, repeats: int) -> dict:
    """One policy: seconds of reading, of question 1, of those after it, and of reading everything again."""
    engine = Engine(model, config, policy, compile=False)
    first, *later = [random_prompt(model, tokens, n) for n in range(repeats + 2)]
    engine.generate([first], 1)  # warms up, and makes the cache
    read_s, _, reading = timed(model, lambda: engine.read(first, tokens=tokens - QUESTION))
    next_s, _, _ = timed(model, lambda: engine.ask(reading, first, 1))
    asked = [timed(model, lambda p=p: engine.ask(reading, p, 1)) for p in later[1:]]
    again = [timed(model, lambda p=p: engine.generate([p], 1)) for p in later[1:]]
    row = {
        "policy": policy,
        "tokens": tokens,
        "budget": config.budget,
        "read_s": read_s,
        "first_s": read_s + next_s,
        "next_s": statistics.median(seconds for seconds, _, _ in asked),
        "again_s": statistics.median(seconds for seconds, _, _ in again),
        "reading_bytes": reading.bytes,
        "beside_bytes": None,
    }
    if model.device.type == "cuda":
        held = sum(t.nbytes for t in (*model.parameters(), *model.buffers(), *engine.cache.buffers()) if t.is_cuda)
        row["beside_bytes"] = max(peak for _, peak, _ in asked) - held
    return row


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--tokens", nargs="+", type=int, default=[4096], help=f"of context and question (default: 4096); {QUESTION} ask"
    )
    add("--policies", nargs="+", default=["hybridkv", "snapkv"])
    add("--retrieving-layers", type=float, default=1.0, help="share of the layers that retrieve (default: 1)")
    add("--budget", type=float, default=0.1)
    add("--repeats", type=int, default=5, help="questions after the first (default: 5)")
    add_model_arguments(parser)
    args = parser.parse_args(argv)
    if min(args.tokens) < 4 * QUESTION or args.repeats < 1:
        parser.error(f"at least {4 * QUESTION} tokens, and one question after the first, make a measurement")
    model, about = make_model(args), describe("bench.reading_speed", args, argv)
    share = args.retrieving_layers
    profile = spread_profile(model.cfg, share) if share < 1 else None
    config = HybridConfig(budget=args.budget, strict=False, head_profile=profile, retrieving_layers=share)
    for tokens in args.tokens:
        for policy in args.policies:
            row = measure(model, policy, config, tokens, args.repeats)
            layer = row["reading_bytes"] / model.cfg.num_hidden_layers
            beside = "-" if row["beside_bytes"] is None else size(row["beside_bytes"])
            layers = "" if row["beside_bytes"] is None else f", {row['beside_bytes'] / layer:.1f} layers"
            print(
                f"{tokens:6d} {policy:>10}: question 1 {row['first_s']:.3f} s, later {row['next_s']:.3f} s "
                f"({row['first_s'] / row['next_s']:.1f}x sooner), anew {row['again_s']:.3f} s; "
                f"reading {size(row['reading_bytes'])}, beside the cache {beside}{layers}",
                flush=True,
            )
            write_row(args.out, row | {"retrieving_layers": share} | about)


if __name__ == "__main__":
    main()
