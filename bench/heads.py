"""Which heads need retrieval? Takes it from one KV head at a time and measures what that does to the answers.

    python -m bench.heads --model demo --task chain
    python -m bench.heads --model smollm2 --task program --tokens 2000 --head-profile bench/results/profile-smollm2.json

All heads are dynamic, but one, which is pruned to the same number of pages by what the prompt's text attends to. The KL
to the full cache that this adds is the head's *need*; with --head-profile it is what `hybridkv.calibrate` measured on
sample prompts instead. Beside it stand the mean ranks that the classifiers give the head, and how well they agree:
Spearman's correlation, and the share of the total need that falls on the heads which the classifier would make dynamic,
mean over prompts (`dynamic_share` of it, on average, if it knew nothing).
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from bench.judge import Lab, Variant, load_lab, parse_variant
from bench.tasks import Case, make_case
from hybridkv.config import HybridConfig
from hybridkv.planning.classify import of_heads, overlap, ranks
from hybridkv.planning.head_profile import HeadProfile
from hybridkv.planning.plan import Plan, budgeted_plan, static_score
from hybridkv.planning.prefill import Prefill
from hybridkv.planning.variants import movement


def spare(kept: tuple[int, int] | None, prefill: Prefill) -> Plan:
    """Every head dynamic but `kept` (layer, head), which is static."""
    dynamic = torch.ones(prefill.shape, dtype=torch.bool)
    if kept:
        dynamic[kept] = False
    return budgeted_plan(prefill, dynamic, static_score)


def head_shape(lab: Lab) -> tuple[int, int]:
    return lab.model.cfg.num_hidden_layers, lab.model.cfg.num_key_value_heads


def batches(lab: Lab, args: argparse.Namespace) -> Iterator[list[Case]]:
    for start in range(0, args.samples, args.batch):
        indices = range(start, min(start + args.batch, args.samples))
        yield [make_case(lab.processor, args.task, args.tokens, i) for i in indices]


def measure(lab: Lab, config: HybridConfig, args: argparse.Namespace) -> tuple[np.ndarray, float]:
    """Need (layers, H) in nats a token, and KL with all heads dynamic."""
    shape, config = head_shape(lab), replace(config, dynamic_weight=1.0)  # or the pruned head would get half the pages
    every = [None, *np.ndindex(shape)]
    variants = [Variant(str(kept), partial(spare, kept), config) for kept in every]
    kl: list[list[float]] = [[] for _ in every]
    with tqdm(total=len(every) * -(-args.samples // args.batch), leave=False, disable=None) as bar:
        for cases in batches(lab, args):
            for into, (_, rows) in zip(kl, lab.measure(cases, variants), strict=True):
                into += [row["kl"] for row in rows]
                bar.update()
    mean = np.array([np.mean(values) for values in kl])
    return (mean[1:] - mean[0]).reshape(shape), float(mean[0])


def rankings(lab: Lab, config: HybridConfig, args: argparse.Namespace) -> dict[str, np.ndarray]:
    """The ranks that each classifier gives the heads of each prompt, (N, layers, H)."""
    found: dict[str, list[np.ndarray]] = {"focus": [], "ranks": []}
    for cases in batches(lab, args):
        for prefill in lab.read(cases, config).prefills:
            mass, focus = of_heads(prefill, "context_mass"), of_heads(prefill, "focus")
            found["focus"].append(ranks(focus).numpy())
            found["ranks"].append(movement(mass, overlap(prefill)).numpy())
    return {name: np.stack(each) for name, each in found.items()}


def agreement(need: np.ndarray, rank: np.ndarray, share: float) -> tuple[float, float]:
    """Spearman's correlation, and the part of the (positive) need on the `share` of the heads that rank highest."""
    a, b = (x.ravel().argsort().argsort() for x in (need, rank))
    positive = need.clip(0).ravel()
    upper = b >= b.size - round(share * b.size)
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
    parser.add_argument("--model", default="demo", help="as in bench.quality")
    parser.add_argument("--task", default="chain")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--budget", type=float, default=0.1)
    parser.add_argument("--variant", default="hybridkv", help="configuration, as in bench.quality")
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="one JSON object")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--head-profile", type=Path, help="take the need from this file instead of measuring it")
    args = parser.parse_args()
    lab = load_lab(args.model, args.device)
    config = replace(parse_variant(args.variant).config, budget=args.budget)
    row = {**vars(args), "classifiers": {}}
    if args.head_profile:
        need = HeadProfile.load(args.head_profile).need.numpy()
        if need.shape != head_shape(lab):
            parser.error(f"{args.head_profile} profiles {need.shape} layers and heads, the model has {head_shape(lab)}")
    else:
        need, row["base_kl"] = measure(lab, config, args)
        print(f"KL with every head dynamic: {row['base_kl']:.4f}\nneed of each head (layers down, KV heads across):")
        print("\n".join("  ".join(f"{x:8.4f}" for x in line) for line in need))
    row["need"] = need.tolist()
    means = {}
    for name, each in rankings(lab, config, args).items():
        agreed = np.array([agreement(need, rank, config.dynamic_share) for rank in each])
        correlation, covered = agreed.mean(0)
        means[name] = each.mean(0)
        row["classifiers"][name] = {"rank": means[name].tolist(), "spearman": correlation, "covered": covered}
        print(f"{name}: Spearman {correlation:.2f}; covers {covered:.0%} of the need with {config.dynamic_share:.0%}")
    if args.out:
        args.out.write_text(json.dumps(row, default=str) + "\n")
    if args.plot:
        plot(need, means, f"{args.model}, {args.task}, {args.tokens} tokens, budget {args.budget:g}", args.plot)


if __name__ == "__main__":
    main()
