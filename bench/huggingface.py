"""Milliseconds a token of `generate` in a Hugging Face model, and bytes of its cache: transformers' caches and ours.

    python -m bench.huggingface --model .cache/smollm2 --contexts 2048 --steps 15 --out FILE

`dynamic` is a `DynamicCache`, uncompiled; `static` a `StaticCache`, compiled; `eager` and `hybridkv` are ours,
uncompiled and compiled. A prompt is random tokens: what a step costs does not hang on them. The median of all steps but
the first two, of one `generate` after another that compiled.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache, StoppingCriteriaList

from bench.common import cpu_name, write_row
from hybridkv.hf import HybridKVCache, compile

CONTENDERS = ("dynamic", "static", "eager", "hybridkv")


def full_bytes(config, tokens: int, itemsize: int) -> int:
    """Of a plain full cache."""
    text = config.get_text_config(decoder=True)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * tokens * text.num_hidden_layers * text.num_key_value_heads * head_dim * itemsize


def measure(model: PreTrainedModel, inputs: dict, contender: str, budget: float, steps: int) -> dict:
    """Milliseconds a token, and bytes that the prompt's cache holds and a step reads of it."""
    tokens, new = inputs["input_ids"].shape[1], steps + 3
    full = full_bytes(model.config, tokens, model.dtype.itemsize)
    model.set_attn_implementation("hybridkv" if contender in ("eager", "hybridkv") else "sdpa")
    model.generation_config.compile_config = None
    if contender in ("static", "hybridkv"):
        compile(model)
    if contender == "dynamic":
        cache, held, read = DynamicCache(config=model.config), full, full
    elif contender == "static":
        cache = StaticCache(config=model.config, max_cache_len=tokens + new)
        held = read = full_bytes(model.config, tokens + new, model.dtype.itemsize)
    else:
        cache = HybridKVCache(model, inputs, budget=budget, max_new_tokens=new)
    for _ in range(2 if contender in ("static", "hybridkv") else 1):
        cache.reset()
        times: list[float] = []

        def note(ids, scores, times=times):
            times.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        how = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, disable_compile=contender == "eager")
        start = time.perf_counter()
        model.generate(**inputs, past_key_values=cache, stopping_criteria=StoppingCriteriaList([note]), **how)
    if isinstance(cache, HybridKVCache):
        held, read = cache.stats().bytes.resident, cache.stats().bytes.step
    apart = [b - a for a, b in itertools.pairwise(times)]
    return {
        "ms_per_token": statistics.median(apart[2:]) * 1e3,
        "first_token_s": times[0] - start,
        "full_bytes": full,
        "resident_bytes": held,
        "step_bytes": read,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a checkpoint folder or Hub name")
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048])
    parser.add_argument("--budget", type=float, default=0.1)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--out", type=Path, help="append JSON lines to this file")
    args = parser.parse_args(argv)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).to(args.device).eval()
    about = {
        "model": args.model,
        "budget": args.budget,
        "device": args.device,
        "dtype": args.dtype,
        "machine": torch.cuda.get_device_name() if args.device.startswith("cuda") else cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "command": f"python -m bench.huggingface {' '.join(sys.argv[1:] if argv is None else argv)}",
    }
    print(
        f"torch {about['torch']}, transformers {about['transformers']}, {about['machine']}, {about['threads']} threads"
    )
    print(f"{'tokens':>7}  {'cache':9} {'ms a token':>10} {'held':>9} {'a step reads':>13}")
    for context in args.contexts:
        ids = torch.randint(model.config.get_text_config().vocab_size, (1, context), device=args.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for contender in args.contenders:
            row = about | {"context": context, "contender": contender}
            row |= measure(model, inputs, contender, args.budget, args.steps)
            write_row(args.out, row)
            held, read = (f"{row[name] / row['full_bytes']:.1%}" for name in ("resident_bytes", "step_bytes"))
            print(f"{context:7}  {contender:9} {row['ms_per_token']:10.1f} {held:>9} {read:>13}", flush=True)


if __name__ == "__main__":
    main()
