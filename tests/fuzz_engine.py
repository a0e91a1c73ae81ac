"""Random prompts, configurations, policies and calls through the engine, uncompiled.

    python -m tests.fuzz_engine --cases 2000

Valid ones are answered twice, and must agree to the token: at a budget of 1 with the dense cache, below it with an
engine that is fresh, plans after reading where the first planned before, and answers each prompt of a batch alone.
Others must end in a ValueError, TypeError or RuntimeError that says something.
"""

import argparse
import math
import random
from collections import Counter
from dataclasses import dataclass

import torch

from demo.tiny_vlm import config as tiny_config
from demo.tiny_vlm import random_model
from hybridkv import BudgetError, Engine, HybridConfig, Sampling
from hybridkv.planning.policies import POLICIES
from tests.lab import head_profile

REFUSALS = (ValueError, TypeError, RuntimeError)
WRONG = [-1, 0, 2, 3.5, math.nan, math.inf, -math.inf, 10**30, "x", None, [], (), True]


@dataclass
class Words:
    """A prompt of token ids alone, or with a mask."""

    input_ids: torch.Tensor
    prunable: torch.Tensor | None
    grids: tuple = ()
    seconds_per_grid: tuple = ()
    spans: tuple = ()


def draw_prompt(rng: random.Random, tokens: int) -> Words:
    ids = torch.tensor([rng.randrange(256) for _ in range(tokens)])
    if rng.random() < 0.3:
        return Words(ids, None)
    start, end = sorted(rng.randrange(tokens + 1) for _ in range(2))
    mask = torch.zeros(tokens, dtype=torch.bool)
    mask[start:end] = True
    if rng.random() < 0.2:
        mask = torch.tensor([rng.random() < 0.7 for _ in range(tokens)])
    return Words(ids, mask)


def draw_config(rng: random.Random, **chosen) -> HybridConfig:
    fields = {
        "budget": rng.choice([1.0, 1.0, 0.1, 0.3, 0.5, rng.uniform(0.01, 1)]),
        "strict": rng.random() < 0.5,
        "page_size": rng.choice([16, 16, 32, 64]),
        "classifier": rng.choice(["focus", "focus", "profile", "threshold"]),
        "dynamic_share": rng.choice([0, 0.25, 0.5, 1, rng.random()]),
        "dynamic_weight": rng.choice([0.5, 1, 2]),
        "retrieval": rng.choice(["sketch", "sketch", "bound", "exact"]),
        "group": rng.choice(["mean", "max"]),
        "tiles": rng.random() < 0.3,
        "sketch_rank": rng.choice([None, 4, 8]),
        "window": rng.randint(1, 40),
        "score": rng.choice(["max", "mean"]),
        "pool": rng.choice([1, 5, 15]),
        "sinks": rng.randint(0, 6),
        "recent": rng.randint(0, 20),
        "head_profile": head_profile(2, 2),
        "store": rng.choice([None, "device", "host"]),
        "stickiness": rng.choice([1, 2, 100]),
    }
    return HybridConfig(**fields | chosen)


def answer(engine: Engine, prompts: list[Words], limits: list[int], sampling: Sampling) -> list[list[int]]:
    return [r.token_ids for r in engine.generate(prompts, limits, sampling)]


class Late:
    """The model, which does not say how deep it is: what it reads is planned afterwards."""

    def __init__(self, model: torch.nn.Module):
        self.prefill, self.step = model.prefill, model.step


def valid(rng: random.Random, model: torch.nn.Module) -> str:
    config, policy = draw_config(rng), rng.choice([*POLICIES, "dense"])
    prompts = [draw_prompt(rng, rng.choice([1, 2, 15, 16, 17, rng.randint(3, 300)])) for _ in range(rng.randint(1, 3))]
    limits = [rng.randint(1, 12) for _ in prompts]
    # A seed for each prompt, as the engine counts them up over a batch.
    sampling = Sampling(rng.choice([0, 0, 0.7, 5.0]), rng.choice([1.0, 0.9, 0.1]), rng.randrange(1000))
    engine = Engine(model, config, policy, compile=False)
    try:
        found = answer(engine, prompts, limits, sampling)
    except BudgetError:
        return "over budget" if config.strict and config.budget < 1 else "wrong"
    if config.strict and policy not in ("full", "dense") and config.budget < 1 and len(prompts) == 1:
        cost, whole = engine.stats.bytes, engine.stats.attended_tokens == len(prompts[0].input_ids)
        if cost.step > config.budget * cost.full and not whole:  # kept whole where nothing could be saved
            return "wrong"
    if found != answer(engine, prompts, limits, sampling):  # in the same tensors
        return "wrong"
    other = Engine(Late(model), config, policy, compile=False)
    if config.budget == 1 or policy == "full":
        other = Engine(model, config, "dense", compile=False)
    alone = [
        answer(other, [prompt], [limit], Sampling(sampling.temperature, sampling.top_p, sampling.seed + b))[0]
        for b, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
    ]
    return "right" if found == alone else "wrong"


def invalid(rng: random.Random, model: torch.nn.Module) -> str:
    """One thing of a call is wrong, or may be: then the answer has the length that was asked for."""
    prompts, limits, chosen, sampling = [draw_prompt(rng, rng.randint(1, 100))], [4], {}, {}
    fields = [
        "budget", "page_size", "classifier", "dynamic_share", "threshold", "head_profile", "dynamic_weight",
        "retrieval", "group", "sketch_rank", "window", "score", "pool", "pool_weight", "pool_side", "sinks", "recent",
    ]  # fmt: skip
    match rng.choice(["config", "config", "config", "sampling", "limits", "mask", "ids", "policy", "order"]):
        case "config":
            chosen = {rng.choice(fields): rng.choice(WRONG)}
        case "sampling":
            sampling = {rng.choice(["temperature", "top_p", "seed"]): rng.choice([*WRONG, 1e-40, 1e308, 10**20])}
        case "limits":
            limits = rng.choice([0, -3, [], [4, 4], [0], [-1], 2.5, None, "4", ["a"]])
        case "mask":
            prompts[0].prunable = rng.choice([torch.ones(rng.randint(0, 300), dtype=torch.bool), torch.ones(2, 3), "x"])
        case "ids":
            prompts[0].input_ids = rng.choice(
                [torch.zeros(0, dtype=torch.long), torch.tensor([10**6, 2, 3]), None, [1]]
            )
            prompts[0].prunable = None
        case "policy":
            policy = rng.choice([lambda p: None, lambda p: p, lambda: None, "nothing", 3, lambda p: p.layers[99]])
            try:
                answer(Engine(model, HybridConfig(), policy, compile=False), prompts, [4], Sampling())
            except (*REFUSALS, IndexError) as e:  # the policy's own mistake is its own error
                return "refused" if str(e) else "wrong"
            return "wrong"
        case "order":
            engine = Engine(model, HybridConfig(strict=False), compile=False)
            first, second = (engine.stream(prompts, 4) for _ in range(2))
            next(first), next(second)
            try:
                next(first)
            except RuntimeError:
                return "refused"
            return "wrong"
    try:
        engine = Engine(model, draw_config(rng, **{"strict": False} | chosen), compile=False)
        tokens = answer(engine, prompts, limits, Sampling(**sampling))
    except REFUSALS as e:
        return "refused" if str(e) else "wrong"
    return "right" if [len(row) for row in tokens] == ([limits] if isinstance(limits, int) else limits) else "wrong"


def fuzz(cases: int, seed: int = 0) -> dict[str, int]:
    """Counts of outcomes: right, refused, over budget, and, which must be none, wrong."""
    model = random_model(tiny_config(layers=2, hidden_size=96, heads=6, kv_heads=2, head_dim=16, tie=False))
    counts = Counter()
    for case in range(cases):
        rng = random.Random(f"{seed} {case}")  # so that each can be repeated alone
        outcome = (valid if rng.random() < 0.6 else invalid)(rng, model)
        counts[outcome] += 1
        if outcome == "wrong":
            print(f"case {case} of seed {seed} is wrong")
    return dict(counts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(fuzz(args.cases, args.seed))
