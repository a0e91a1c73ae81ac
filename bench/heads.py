"""Which heads need retrieval? Takes it from one KV head at a time and measures what that does to the answers.

    python -m bench.heads --model demo --task chain

All heads are dynamic, but one, which is pruned to the same number of pages by what the prompt's text attends to. The KL
to the full cache that this adds is the head's *need*. Beside it stand the mean ranks that the classifiers give the
head, and how well they agree: Spearman's correlation, and the share of the total need that falls on the half of the
heads which the classifier would make dynamic (half, on average, if it knew nothing).
"""

import argparse
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from bench.judge import Lab, Variant, load_lab, parse_variant
from bench.tasks import make_case
from hybridkv.classify import movement, ranks
from hybridkv.plan import Plan, budgeted_plan, static_scores, text_attention
from hybridkv.profile import Prefill


def spare(kept: tuple[int, int] | None, prefill: Prefill) -> Plan:
    """Every head dynamic but `kept` (layer, head), which is static."""
    dynamic = torch.ones(len(prefill.layers), len(prefill.layers[0].k), dtype=torch.bool)
    if kept:
        dynamic[kept] = False
    return budgeted_plan(prefill, dynamic, static_scores(prefill))


def measure(lab: Lab, args: argparse.Namespace) -> tuple[np.ndarray, dict[str, np.ndarray], float]:
    """Need (layers, H) in nats a token, each classifier's mean rank (layers, H), and KL with all heads dynamic."""
    layers, heads = lab.model.cfg.num_hidden_layers, lab.model.cfg.num_key_value_heads
    config = replace(parse_variant(args.variant).config, budget=args.budget)
    every = [None, *np.ndindex(layers, heads)]
    variants = [Variant(str(kept), partial(spare, kept), config) for kept in every]
    kl: list[list[float]] = [[] for _ in every]
    moved: dict[str, list[torch.Tensor]] = {"focus": [], "ranks": []}
    starts = range(0, args.samples, args.batch)
    with tqdm(total=len(every) * len(starts), desc=f"{args.task} {args.tokens}", leave=False, disable=None) as bar:
        for start in starts:
            indices = range(start, min(start + args.batch, args.samples))
            cases = [make_case(lab.processor, args.task, args.tokens, i) for i in indices]
            for prefill in lab.read(cases, config).prefills:
                mass, overlap, focus = text_attention(prefill)
                moved["focus"].append(ranks(focus))
                moved["ranks"].append(movement(mass, overlap))
            for into, (_, rows) in zip(kl, lab.measure(cases, variants), strict=True):
                into += [row["kl"] for row in rows]
                bar.update()
    mean = np.array([np.mean(values) for values in kl])
    need = (mean[1:] - mean[0]).reshape(layers, heads)
    means = {name: torch.stack(each).double().mean(0).numpy() for name, each in moved.items()}
    return need, means, float(mean[0])


def agreement(need: np.ndarray, rank: np.ndarray) -> tuple[float, float]:
    """Spearman's correlation, and the share of the (positive) need in the upper half of the ranking."""
    a, b = (x.ravel().argsort().argsort() for x in (need, rank))
    positive = need.clip(0).ravel()
    upper = b >= b.size // 2
    return float(np.corrcoef(a, b)[0, 1]), float(positive[upper].sum() / max(positive.sum(), 1e-12))


def plot(need: np.ndarray, ranks: dict[str, np.ndarray], title: str, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = {"need: KL without its retrieval": need} | {f"rank by {name}": rank for name, rank in ranks.items()}
    figure, axes = plt.subplots(1, len(shown), figsize=(4 * len(shown), 0.45 * len(need) + 1.6))
    for axis, (label, values) in zip(axes, shown.items(), strict=True):
        image = axis.imshow(values, aspect="auto", cmap="viridis")
        axis.set(title=label, xlabel="KV head", ylabel="layer")
        figure.colorbar(image, ax=axis)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="demo, or a checkpoint folder")
    parser.add_argument("--task", default="chain")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--budget", type=float, default=0.1)
    parser.add_argument("--variant", default="hybridkv", help="configuration, as in bench.quality")
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="one JSON object")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    need, ranks, base = measure(load_lab(args.model, args.device), args)
    print(f"KL with every head dynamic: {base:.4f}\nneed of each head (layers down, KV heads across):")
    print("\n".join("  ".join(f"{x:8.4f}" for x in row) for row in need))
    row = {**vars(args), "need": need.tolist(), "base_kl": base, "classifiers": {}}
    for name, rank in ranks.items():
        correlation, covered = agreement(need, rank)
        print(f"{name}: Spearman {correlation:.2f}; its upper half covers {covered:.0%} of the need")
        row["classifiers"][name] = {"rank": rank.tolist(), "spearman": correlation, "covered": covered}
    if args.out:
        args.out.write_text(json.dumps(row, default=str) + "\n")
    if args.plot:
        plot(need, ranks, f"{args.model}, {args.task}, {args.tokens} tokens, budget {args.budget:g}", args.plot)


if __name__ == "__main__":
    main()
