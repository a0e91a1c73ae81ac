"""kvpress (NVIDIA's collection of cache compressions) on a checkpoint: milliseconds a token, and bytes it really holds.

It pins an older transformers than ours, so it runs in an environment of its own:

    python -m venv peers && peers/bin/pip install -r bench/peers/requirements.txt
    peers/bin/python bench/peers/kvpress_decode.py --model FOLDER --contexts 2048 --budgets 0.1

Text-only Llama and Qwen2 checkpoints, such as the folders that `bench.real_models` makes. On the same weights,
`python -m bench.decode --model FOLDER --contenders dense hybridkv eager` measures ours, and transformers' eager step
without compression. kvpress decodes eagerly. AdaKV is simulated there by masking: its cache stays as large as the full
one.
"""

import argparse
import contextlib
import json
import statistics
import time

import torch
from kvpress import AdaKVPress, PyramidKVPress, SnapKVPress
from transformers import AutoModelForCausalLM, DynamicCache

PRESSES = {
    "snapkv": lambda ratio: SnapKVPress(compression_ratio=ratio),
    "pyramidkv": lambda ratio: PyramidKVPress(compression_ratio=ratio),
    "adakv": lambda ratio: AdaKVPress(SnapKVPress(compression_ratio=ratio)),
}


@torch.no_grad()
def measure(model, tokens: torch.Tensor, press, steps: int) -> tuple[list[float], int]:
    """Milliseconds of each decoding step behind a compressed prompt, tokens (1, T), and bytes of the cache."""
    cache = DynamicCache()
    with press(model) if press else contextlib.nullcontext():
        logits = model(tokens, past_key_values=cache).logits
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    times = []
    for i in range(steps):
        start = time.perf_counter()
        token, at = logits[:, -1:].argmax(-1), torch.tensor([[tokens.shape[1] + i]], device=tokens.device)
        logits = model(token, past_key_values=cache, position_ids=at).logits
        logits[0, -1, 0].item()  # waits for the device
        times.append((time.perf_counter() - start) * 1e3)
    return times[3:], held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a text checkpoint folder")
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.1])
    parser.add_argument("--steps", type=int, default=33, help="three of them are not timed (default: 33)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", help="append JSON lines to this file")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, attn_implementation="sdpa").to(args.device)
    print(f"{'context':>8} {'press':>16} {'ms/token':>9} {'MB held':>9}")
    for context in args.contexts:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(1000, (1, context), generator=generator).to(args.device)
        field = {"none": (None, 1.0)}
        field |= {f"{name} {b:g}": (make(1 - b), b) for name, make in PRESSES.items() for b in args.budgets}
        for name, (press, budget) in field.items():
            times, held = measure(model, tokens, press, args.steps)
            ms = statistics.median(times)
            print(f"{context:8d} {name:>16} {ms:9.2f} {held / 1e6:9.1f}", flush=True)
            row = {"contender": f"kvpress {name}", "context": context, "budget": budget, "ms_per_token": ms}
            row |= {"held_bytes": held, "model": args.model, "dtype": args.dtype, "device": args.device}
            if args.out:
                with open(args.out, "a", encoding="utf-8") as out:
                    out.write(json.dumps(row | {"torch": torch.__version__}) + "\n")


if __name__ == "__main__":
    main()
