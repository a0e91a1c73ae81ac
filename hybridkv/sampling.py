"""How the next token is chosen from its logits."""

from dataclasses import dataclass

from torch import Tensor

# Below, the likeliest token always wins; above, all tokens are about equally likely. Neither is a matter of rounding.
TEMPERATURES = (1e-3, 1e3)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the likeliest token; else in [0.001, 1000].
        top_p: draws from the likeliest tokens up to this probability, in (0, 1].
        seed: in [0, 2^63); counts up over the batch.

    Raises:
        ValueError: a number that is out of its range, or none.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        low, high = TEMPERATURES
        if not (self.temperature == 0 or low <= self.temperature <= high):  # NaN is neither
            raise ValueError(f"temperature must be 0 or lie in [{low:g}, {high:g}], got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if not (isinstance(self.seed, int) and 0 <= self.seed < 2**63):
            raise ValueError(f"seed must be a whole number from 0 to 2^63 - 1, got {self.seed}")


def sample(logits: Tensor, temperature: Tensor, top_p: Tensor, noise: Tensor) -> Tensor:
    """Draws from the smallest set of tokens whose probability reaches `top_p`.

    Inverse transform sampling: the randomness comes in as numbers, so that compiled and uncompiled draw the same.

    Args:
        logits: (B, V). temperature, top_p: scalars. noise: (B,) uniform in [0, 1).

    Returns:
        (B,) int64.
    """
    logits = logits.float()
    logits = logits - logits.amax(-1, keepdim=True)  # before dividing, so that nothing overflows at low temperatures
    p, token = (logits / temperature).softmax(-1).sort(-1, descending=True)
    before = p.cumsum(-1) - p  # probability of the tokens that are likelier
    p = p.where(before < top_p, 0.0)  # never empties: the first token has nothing before it
    cumulative = p.cumsum(-1)
    at = (cumulative < noise[:, None] * cumulative[:, -1:]).sum(-1, keepdim=True)
    return token.gather(1, at.clamp(max=logits.shape[-1] - 1))[:, 0]
