"""What the choices of the method were compared with: each a small policy that differs from `hybrid_plan` in one thing.

Nothing here is part of the method. `bench.quality` names them `hybridkv:classifier=random` and so on.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from hybridkv.planning.classify import classify, highest, of_heads, overlap, ranks
from hybridkv.planning.plan import Plan, budgeted_plan, static_score
from hybridkv.planning.prefill import Prefill

CONTEXT_FLOOR = 0.2  # smallest claim of a head that is weighted by its context mass


def by_order(prefill: Prefill, order: Tensor) -> Plan:
    """`hybrid_plan` with the last heads of another order, (layers, H), dynamic."""
    return budgeted_plan(prefill, highest(order, prefill.config.dynamic_share), static_score)


def movement(context_mass: Tensor, overlap: Tensor) -> Tensor:
    """Rank of each head by how much it looks at the context and how much that moves: (layers, H), 0 is most settled."""
    return ranks(ranks(context_mass) + ranks(1 - overlap))


def by_movement(prefill: Prefill) -> Plan:
    """Heads are dynamic that look at the context most, each query somewhere else."""
    return by_order(prefill, movement(of_heads(prefill, "context_mass"), overlap(prefill)))


def reversed_focus(prefill: Prefill) -> Plan:
    """The heads are dynamic that `focus` would make static first."""
    return by_order(prefill, -of_heads(prefill, "focus"))


def random_heads(prefill: Prefill) -> Plan:
    """Any heads are dynamic: other ones for every prompt, the same at every run."""
    mass = of_heads(prefill, "context_mass")
    generator = torch.Generator().manual_seed(int(mass.double().sum() * 1e6))
    return by_order(prefill, torch.randperm(mass.numel(), generator=generator).view_as(mass))


def context_weight(prefill: Prefill) -> Plan:
    """Heads of a type share its pages by how much of their attention falls on the context."""
    weight = of_heads(prefill, "context_mass").clamp(min=CONTEXT_FLOOR)
    return budgeted_plan(prefill, classify(prefill, torch.ones(len(weight)).bool()), static_score, weight)


VARIANTS: dict[str, Callable[[Prefill], Plan]] = {
    "classifier=ranks": by_movement,
    "classifier=reversed": reversed_focus,
    "classifier=random": random_heads,
    "head_weight=context": context_weight,
}
