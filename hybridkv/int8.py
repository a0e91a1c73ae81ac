"""Keys and values in a byte a number, for readings: half of what they take in bfloat16, a quarter of float32.

Each channel of a head has a scale of its own, anew in every block of tokens: keys have channels that are tens of times
larger than the others.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64  # tokens


@dataclass(frozen=True)
class Int8:
    """A tensor (H, T, D) as whole multiples of its scales; `to` brings it back.

    Attributes:
        numbers: (H, N, BLOCK, D) int8, in [-127, 127]; the last block is filled up with zeros.
        scale: (H, N, D) in the tensor's dtype.
        tokens: T.
    """

    numbers: Tensor
    scale: Tensor
    tokens: int

    @classmethod
    def of(cls, t: Tensor) -> "Int8":
        """A tensor (H, T, D), rounded."""
        blocks = F.pad(t, (0, 0, 0, -t.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))  # (H, N, BLOCK, D)
        scale = blocks.abs().amax(2) / 127
        scale = torch.where(scale > 0, scale, 1)
        numbers = (blocks / scale[:, :, None]).round().clamp(-127, 127).to(torch.int8)
        return cls(numbers, scale, t.shape[1])

    def to(self, device: torch.device, non_blocking: bool = False) -> Tensor:
        """The tensor (H, T, D) on a device, to which it travels as it is."""
        numbers, scale = (t.to(device, non_blocking=non_blocking) for t in (self.numbers, self.scale))
        return (numbers * scale[:, :, None]).flatten(1, 2)[:, : self.tokens]

    def each(self, change: Callable[[Tensor], Tensor]) -> "Int8":
        """With both tensors changed: moved, say."""
        return replace(self, numbers=change(self.numbers), scale=change(self.scale))

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.scale.shape[0], self.tokens, self.scale.shape[-1]

    @property
    def dtype(self) -> torch.dtype:
        """Of what `to` gives."""
        return self.scale.dtype

    @property
    def nbytes(self) -> int:
        return self.numbers.nbytes + self.scale.nbytes

    def fits_together(self) -> bool:
        """Whether shapes and dtypes are those of such a tensor."""
        blocks = -(-self.tokens // BLOCK)
        good = self.scale.dim() == 3 and self.scale.shape[1] == blocks and self.scale.is_floating_point()
        heads, dim = self.scale.shape[0], self.scale.shape[-1]
        return good and self.numbers.shape == (heads, blocks, BLOCK, dim) and self.numbers.dtype == torch.int8
