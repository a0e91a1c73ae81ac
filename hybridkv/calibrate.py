"""Measures an offline head profile: which KV heads need retrieval, and which look at pictures, on sample prompts.

    python -m hybridkv.calibrate --model demo --out heads.json
    python -m hybridkv.calibrate --model FOLDER --prompts samples.jsonl --out heads.json

Use it as `HybridConfig(classifier="profile", head_profile="heads.json")`, or with the policy `sparsemm`. A line of the
samples is `{"prompt": "...", "images": ["a.png"], "context": "..."}`; images and context may be left out. The bundled
model is measured on the bundled demos if no samples are given.

A head's need is what pruning it alone does to the answer, not to its own output: in the bundled model, whose answers
hang on a few heads, outputs that change most are not those that matter. All heads are tried in one batch.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor
from tqdm import tqdm

from hybridkv import demos
from hybridkv.config import HybridConfig
from hybridkv.model import CheckpointError, InputError, Model, Processor, Prompt, from_pretrained
from hybridkv.planning.head_profile import HeadProfile
from hybridkv.planning.plan import budgeted_plan, static_scores
from hybridkv.planning.prefill import Prefill

NEW_TOKENS = 32  # of an answer that are looked at


class Observer:
    """A full cache for one sequence, read by several variants of the same answer at once.

    Variant 0 sees everything. Variant 1 + layer * H + head sees everything, too, but in that one head only what pruning
    would keep. They share the prompt's keys and values; those of new tokens differ from the pruned layer on.

    Attributes:
        visual: (layers, H) sum over steps of variant 0's attention on prunable tokens.
    """

    def __init__(self, prefill: Prefill):
        shape = (len(prefill.layers), len(prefill.layers[0].k))
        plan = budgeted_plan(prefill, torch.zeros(shape, dtype=torch.bool), static_scores(prefill))
        kept = plan.pages * plan.page_size  # (layers, H)
        self.variants = 1 + kept.numel()
        self.prunable = prefill.prunable
        self.prompt = [(layer.k, layer.v) for layer in prefill.layers]
        self.new = [(layer.k.new_empty(self.variants, *layer.k[:, :0].shape),) * 2 for layer in prefill.layers]
        self.dropped = []  # for each layer (H, T)
        for order, count in zip(plan.order, kept, strict=True):
            rank = order.argsort(-1)  # (H, T) place of each token in its head's order
            self.dropped.append(rank >= count.to(rank.device)[:, None])
        self.visual = torch.zeros(shape)

    def __getitem__(self, layer: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return partial(self.attend, layer)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, Hq, 1, D); k, v (B, H, 1, D); gives (B, Hq, 1, D); B variants."""
        self.new[layer] = new_k, new_v = tuple(torch.cat(pair, 2) for pair in zip(self.new[layer], (k, v), strict=True))
        prompt_k, prompt_v = self.prompt[layer]  # (H, T, D)
        heads, tokens = prompt_k.shape[:2]
        group = rearrange(q, "b (h g) 1 d -> b h g d", h=heads) * q.shape[-1] ** -0.5
        logits = torch.cat(
            [
                einsum(group, prompt_k, "b h g d, h t d -> b h g t"),
                einsum(group, new_k, "b h g d, b h n d -> b h g n"),
            ],
            -1,
        )
        head = torch.arange(heads, device=q.device)
        pruned = 1 + layer * heads + head
        gone = F.pad(self.dropped[layer], (0, new_k.shape[2]))  # (H, T + n)
        logits[pruned, head] = logits[pruned, head].masked_fill(gone[:, None], float("-inf"))
        seen, own = logits.softmax(-1).split([tokens, new_k.shape[2]], -1)
        self.visual[layer] += seen[0][..., self.prunable].sum(-1).mean(-1).cpu()
        out = einsum(seen, prompt_v, "b h g t, h t d -> b h g d") + einsum(own, new_v, "b h g n, b h n d -> b h g d")
        return rearrange(out, "b h g d -> b (h g) 1 d")


@torch.no_grad()
def calibrate(
    model: Model, prompts: Sequence[Prompt], config: HybridConfig, eos: Sequence[int], new_tokens: int, name: str = ""
) -> HeadProfile:
    """Reads each prompt, writes up to `new_tokens` tokens with the full cache, and averages what pruning a head does.

    Raises:
        ValueError: nothing to measure: a budget that prunes nothing, or no prompt that got an answer.
    """
    if config.budget == 1:
        raise ValueError("a budget of 1 prunes nothing: give a smaller one")
    need, visual = [], []
    for prompt in tqdm(prompts, desc="prompts", leave=False, disable=None):
        prefill = Prefill(prompt.prunable, config, spans=prompt.spans)
        logits, position = model.prefill(prompt, prefill)
        observer, divergence = Observer(prefill), []
        token = logits.argmax()
        while len(divergence) < new_tokens and int(token) not in eos:
            at = torch.full((observer.variants,), position + len(divergence), device=token.device)
            logits = model.step(token.expand(observer.variants), at, observer).float().log_softmax(-1)  # (variants, V)
            divergence.append((logits[0].exp() * (logits[0] - logits[1:])).sum(-1).cpu())
            token = logits[0].argmax()
        if divergence:
            need.append(torch.stack(divergence).mean(0).view_as(observer.visual))
            visual.append(observer.visual / len(divergence))
    if not need:
        raise ValueError("no prompt got an answer of a single token: nothing was measured")
    return HeadProfile(torch.stack(need).mean(0), torch.stack(visual).mean(0), len(need), name)


def read_samples(file: Path, processor: Processor) -> list[Prompt]:
    """One prompt a line; see the module."""
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as e:
        raise InputError(f"{file} can't be read as JSON lines: {e}") from e
    if not rows or not all(isinstance(row, dict) and "prompt" in row for row in rows):
        raise InputError(f'{file} must hold one JSON object with a "prompt" on each line')
    return [processor(row["prompt"], images=row.get("images", ()), context=row.get("context", "")) for row in rows]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m hybridkv.calibrate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="a checkpoint folder, a Hub name, or demo: the bundled one")
    parser.add_argument("--prompts", type=Path, help="sample prompts, JSON lines")
    parser.add_argument("--out", type=Path, required=True, help="the profile, a small JSON file")
    parser.add_argument("--budget", type=float, default=0.1, help="what heads are pruned to (default: 0.1)")
    parser.add_argument(
        "--new-tokens", type=int, default=NEW_TOKENS, help=f"longest answer looked at (default: {NEW_TOKENS})"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    try:
        folder = demos.MODEL if args.model == "demo" else args.model
        processor = Processor.from_pretrained(folder)
        if args.prompts:
            prompts = read_samples(args.prompts, processor)
        elif args.model == "demo":
            prompts = [processor(demo.prompt, images=demo.images) for demo in demos.load().values()]
        else:
            raise InputError("--prompts is missing: only the bundled model has samples of its own")
        config = HybridConfig(budget=args.budget, strict=False)
        model = from_pretrained(folder, dtype=torch.float32 if args.device == "cpu" else None, device=args.device)
        profile = calibrate(model, prompts, config, model.cfg.eos_token_id, args.new_tokens, args.model)
    except (CheckpointError, InputError, ValueError) as e:
        parser.exit(2, f"{parser.prog}: error: {' '.join(str(e).split())}\n")
    profile.save(args.out)
    print(f"{args.out}: {profile.need.shape[0]} layers x {profile.need.shape[1]} KV heads, {profile.prompts} prompts")


if __name__ == "__main__":
    main()
