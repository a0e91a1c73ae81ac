"""What is lost when static heads keep only the newest tokens of a long answer, in one pass over the answer.

    python -m bench.keep_new --model smollm2 --tasks copy program --tokens 2000 --new-tokens 2000 --keep-new 1024 256

The answer is given, so that thousands of tokens take seconds: `copy` repeats a letter that fills the context, `program`
and `prose` go on with it as it began. Its tokens attend to what the default plan leaves of the prompt: static heads to
the tokens that they kept and to the newest tokens of the answer, dynamic heads to everything, as if they retrieved
without a miss. (`bench.long_answers` takes the steps themselves.) For each stretch of the answer: KL to the full
cache's next-token distribution in nats a token, and how often both choose the same token. `device` is what the cache
takes for prompt and answer, its store on the host, `full` what a full cache takes.
"""

import argparse
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.common import write_row
from bench.judge import Lab, divergence, load_lab
from bench.long_answers import stretches
from bench.tasks import ITEMS, PEOPLE, filler, program
from hybridkv.cache.capacity import Capacity, Costs
from hybridkv.cache.pack import lane_tokens
from hybridkv.config import HybridConfig
from hybridkv.model import Processor, Prompt
from hybridkv.planning.plan import Plan, full_bytes
from hybridkv.planning.policies import POLICIES
from hybridkv.planning.prefill import Prefill

QUESTIONS = {
    "copy": "Copy the letter between 'Begin of the letter.' and 'End of the letter.' word for word.",
    "program": "Write the next functions of this file, in the same style.",
    "prose": "Continue this day book in the same style.",
}


def long_case(processor: Processor, task: str, tokens: int, new_tokens: int, index: int) -> tuple[Prompt, Tensor]:
    """A context of about `tokens` tokens with its question, and up to `new_tokens` tokens of a right answer."""
    rng = random.Random(f"long/{task}/{tokens}/{index}")

    def letter(n: int) -> list[str]:
        return [f"{rng.choice(PEOPLE)} wrote: {' '.join(rng.sample(ITEMS, 6))}." for _ in range(n)]

    make = {
        "copy": letter,
        "prose": partial(filler, rng),
        "program": lambda n: program(rng, filler(rng, n))[0].split("\n\n"),
    }

    def ids(parts: Sequence[str]) -> list[int]:
        return processor.tokenizer(ends.join(parts), add_special_tokens=False)["input_ids"]

    ends = "\n\n" if task == "program" else "\n"
    each = len(ids(make[task](20))) / 20
    read, more = make[task](round(tokens / each)), make[task](1 + round(new_tokens / each))
    if task == "copy":
        context, answer = "\n".join(["Begin of the letter.", *read, "End of the letter."]), read
    else:
        context, answer = ends.join(read), more
    return processor(QUESTIONS[task], context=context), torch.tensor(ids(answer)[:new_tokens])


def attend(kept: Tensor, newest: Tensor, k: Tensor, v: Tensor, q: Tensor, new_k: Tensor, new_v: Tensor) -> Tensor:
    """Attention of an answer's A tokens, one KV head at a time.

    Args:
        kept: (H, T) bool, what each head has of the prompt. newest: (H,) how many of the answer's tokens it keeps.
        k, v: (H, T, D) the prompt's. q: (1, Hq, A, D); new_k, new_v: (1, H, A, D) the answer's.
    """
    back = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])  # (A, A)
    out = []
    for head, group in enumerate(q[0].unflatten(0, (len(k), -1))):  # (G, A, D)
        mask = torch.cat((kept[head].expand(len(back), -1), (back >= 0) & (back < newest[head])), 1)  # (A, T + A)
        keys, values = (torch.cat((old[head], new[0, head])) for old, new in ((k, new_k), (v, new_v)))
        out.append(
            F.scaled_dot_product_attention(
                group, keys.expand(len(group), -1, -1), values.expand(len(group), -1, -1), attn_mask=mask
            )
        )
    return torch.cat(out)[None]


@torch.no_grad()
def answered(lab: Lab, prefill: Prefill, plan: Plan | None, prompt: Prompt, answer: Tensor) -> Tensor:
    """Log-probabilities (A, V) after each token of the answer; without a plan those of the full cache."""
    x, positions = lab.model.embed(
        replace(prompt, input_ids=torch.cat((prompt.input_ids, answer))), len(prompt.input_ids)
    )
    kv = []
    for layer, read in enumerate(prefill.layers):
        kept = torch.zeros(read.k.shape[:2], dtype=torch.bool)
        for head, tokens in enumerate([slice(None)] * len(kept) if plan is None else lane_tokens(plan, prefill, layer)):
            kept[head, tokens] = True
        forgets = (
            torch.zeros(len(kept), dtype=torch.bool) if plan is None or plan.keep_new is None else ~plan.dynamic[layer]
        )
        newest = torch.where(forgets, plan.keep_new if plan and plan.keep_new else 0, len(answer))
        kv.append(partial(attend, kept, newest, read.k, read.v))
    return lab.model.logits(lab.model(x, positions, kv)[0]).log_softmax(-1)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="smollm2", help="as bench.quality's (default: smollm2)")
    add("--tasks", nargs="+", choices=QUESTIONS, default=list(QUESTIONS))
    add("--tokens", type=int, default=2000, help="of each prompt's context, about (default: 2000)")
    add("--new-tokens", type=int, default=2000, help="of each answer (default: 2000)")
    add("--samples", type=int, default=1, help="prompts a task (default: 1)")
    add("--keep-new", type=int, nargs="*", default=[1024, 256], help="beside all (default: 1024 256)")
    add("--budget", type=float, default=0.1)
    add("--out", type=Path, help="append JSON lines to this file")
    args = parser.parse_args(argv)
    lab = load_lab(args.model, "cpu")
    for task in args.tasks:
        found: dict[int | None, list[dict]] = {}
        for index in range(args.samples):
            prompt, answer = long_case(lab.processor, task, args.tokens, args.new_tokens, index)
            prefill = Prefill(prompt.prunable, HybridConfig(budget=args.budget, store="host"))
            with torch.no_grad():
                lab.model.prefill(prompt, prefill)
            want = answered(lab, prefill, None, prompt, answer)
            plan = POLICIES["hybridkv"](prefill)
            for keep in (None, *args.keep_new):
                kept = replace(plan, keep_new=keep)
                got = answered(lab, prefill, kept, prompt, answer)
                costs = Costs.of(prefill.config, lab.model.cfg.head_dim, lab.model.dtype)
                full = full_bytes(plan.tokens + len(answer), plan.n_read.numel(), costs, plan.page_size)
                device = Capacity.of([kept], len(answer)).device_bytes(costs, plan.n_read.shape[1])
                kl, agrees = divergence(want, got), (want.argmax(-1) == got.argmax(-1)).double()
                each = {"answer": len(answer), "device_bytes": device, "full_bytes": full}
                for name, of in (("kl", kl), ("agrees", agrees)):
                    each[name] = [float(of[a:b].mean()) for a, b in stretches(len(answer))]
                found.setdefault(keep, []).append(each)
        for keep, rows in found.items():
            row = {"model": lab.name, "task": task, "tokens": args.tokens, "samples": args.samples, "keep_new": keep}
            row |= {name: torch.tensor([r[name] for r in rows]).double().mean(0).tolist() for name in rows[0]}
            cells = "  ".join(f"{kl:.4f} {same:.0%}" for kl, same in zip(row["kl"], row["agrees"], strict=True))
            held = f"{row['device_bytes'] / 1e6:.1f} of {row['full_bytes'] / 1e6:.1f} MB"
            print(f"{task:8} {row['answer']:.0f} tokens, keeps {keep or 'all':>5}: {cells}  {held}", flush=True)
            write_row(args.out, row | {"budget": args.budget})


if __name__ == "__main__":
    main()
