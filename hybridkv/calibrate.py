"""Measures an offline head profile: which KV heads need retrieval, and which look at pictures, on sample prompts.

    python -m hybridkv.calibrate --model demo --out heads.json
    python -m hybridkv.calibrate --model FOLDER --prompts samples.jsonl --out heads.json

Use it as `HybridConfig(classifier="profile", head_profile="heads.json")`, or with the policy `sparsemm`. A line of the
samples is `{"prompt": "...", "images": ["a.png"], "context": "..."}`; images and context may be left out. The bundled
model is measured on the bundled demos if no samples are given.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from einops import einsum, rearrange
from torch import Tensor
from tqdm import tqdm

from hybridkv import demos
from hybridkv.config import HybridConfig
from hybridkv.head_profile import HeadProfile
from hybridkv.plan import budgeted_plan, static_scores
from hybridkv.profile import Prefill
from model import CheckpointError, InputError, Model, Processor, Prompt, from_pretrained


class Observer:
    """A full cache for one sequence that also computes what every head would have put out if it had been pruned.

    Sums over layers' calls, (layers, H) each: `change`, the length of a head's change relative to its layer's output;
    `visual`, its attention on prunable tokens.
    """

    def __init__(self, prefill: Prefill):
        shape = (len(prefill.layers), len(prefill.layers[0].k))
        plan = budgeted_plan(prefill, torch.zeros(shape, dtype=torch.bool), static_scores(prefill))
        kept = plan.pages * plan.page_size  # (layers, H)
        self.prunable = prefill.prunable
        self.k, self.v = [layer.k for layer in prefill.layers], [layer.v for layer in prefill.layers]
        self.dropped = []  # for each layer (H, T)
        for order, count in zip(plan.order, kept, strict=True):
            rank = order.argsort(-1)  # (H, T) place of each token in its head's order
            self.dropped.append(rank >= count.to(rank.device)[:, None])
        self.change, self.visual = torch.zeros(shape), torch.zeros(shape)

    def __getitem__(self, layer: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return partial(self.attend, layer)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (1, Hq, 1, D); k, v (1, H, 1, D); gives (1, Hq, 1, D)."""
        self.k[layer], self.v[layer] = (torch.cat(pair, 1) for pair in ((self.k[layer], k[0]), (self.v[layer], v[0])))
        heads = len(k[0])
        group = rearrange(q, "1 (h g) 1 d -> h g d", h=heads)
        logits = einsum(group, self.k[layer], "h g d, h t d -> h g t") * q.shape[-1] ** -0.5
        prompt = len(self.prunable)
        gone = logits.clone()
        gone[..., :prompt].masked_fill_(self.dropped[layer][:, None], float("-inf"))
        probabilities = logits.softmax(-1)
        out, pruned = (einsum(p, self.v[layer], "h g t, h t d -> h g d") for p in (probabilities, gone.softmax(-1)))
        self.change[layer] += ((out - pruned).flatten(1).norm(dim=1) / out.norm()).cpu()
        self.visual[layer] += probabilities[..., :prompt][..., self.prunable].sum(-1).mean(-1).cpu()
        return rearrange(out, "h g d -> 1 (h g) 1 d")


@torch.no_grad()
def calibrate(
    model: Model, prompts: Sequence[Prompt], config: HybridConfig, eos: Sequence[int], new_tokens: int, name: str = ""
) -> HeadProfile:
    """Reads each prompt, writes up to `new_tokens` tokens with the full cache, and averages what the heads did.

    Raises:
        ValueError: nothing to measure: a budget that prunes nothing, or no prompt that got an answer.
    """
    if config.budget == 1:
        raise ValueError("a budget of 1 prunes nothing: give a smaller one")
    need, visual = [], []
    for prompt in tqdm(prompts, desc="prompts", leave=False, disable=None):
        prefill = Prefill(prompt.prunable, config, spans=prompt.spans)
        logits, position = model.prefill(prompt, prefill)
        observer, steps = Observer(prefill), 0
        while steps < new_tokens and (token := int(logits.argmax())) not in eos:
            at = torch.tensor([position + steps], device=logits.device)
            logits = model.step(torch.tensor([token], device=logits.device), at, observer)
            steps += 1
        if steps:
            need.append(observer.change / steps)
            visual.append(observer.visual / steps)
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
    parser.add_argument("--new-tokens", type=int, default=32, help="longest answer looked at (default: 32)")
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
