"""How the next token is chosen from its logits."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 takes the likeliest; seeds count up over the batch."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature can't be negative, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")


def sample(logits: Tensor, temperature: Tensor, top_p: Tensor, noise: Tensor) -> Tensor:
    """Draws from the smallest set of tokens whose probability reaches `top_p`.

    Inverse transform sampling: the randomness comes in as numbers, so that compiled and uncompiled draw the same.

    Args:
        logits: (B, V). temperature, top_p: scalars. noise: (B,) uniform in [0, 1).

    Returns:
        (B,) int64.
    """
    p, token = (logits.float() / temperature).softmax(-1).sort(-1, descending=True)
    before = p.cumsum(-1) - p  # probability of the tokens that are likelier
    p = p.where(before < top_p, 0.0)  # never empties: the first token has nothing before it
    cumulative = p.cumsum(-1)
    at = (cumulative < noise[:, None] * cumulative[:, -1:]).sum(-1, keepdim=True)
    return token.gather(1, at.clamp(max=logits.shape[-1] - 1))[:, 0]
