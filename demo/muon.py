"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon), with all matrices of one shape orthogonalised together.

`torch.optim.Muon` does the same arithmetic, one matrix at a time and always in bfloat16: on a CPU without bfloat16
units its step takes several times as long as the model's forward and backward pass together.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """Five Newton-Schulz steps towards the nearest matrices with singular values 1. g (..., M, N)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g.shape[-2] > g.shape[-1]
    x = g.mT if tall else g
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; the step is scaled by sqrt(max(1, rows / columns))."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.1):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            for (rows, cols), params in by_shape.items():
                momenta, gradients = [], [p.grad for p in params]
                for p in params:
                    state = self.state[p]
                    if not state:
                        state["momentum"] = torch.zeros_like(p)
                    momenta.append(state["momentum"])
                torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
                update = torch.stack(torch._foreach_lerp(gradients, momenta, group["momentum"]))
                update = orthogonalise(update.bfloat16() if update.is_cuda else update).to(update.dtype)
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_sub_(params, update.unbind(), alpha=group["lr"] * max(1, rows / cols) ** 0.5)
