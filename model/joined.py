"""Linear layers that read the same input, run as one matmul: in a small batch a step waits for calls, not for bytes."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Joined(nn.Module):
    """The outputs of several linear layers for one input; one matmul once `join` was called.

    The layers keep their names, and their weights become views of one tensor, so that a checkpoint is read and written
    as ever and nothing is held twice. What replaces a weight (`load_state_dict(assign=True)`, `.to()`) joins them anew.
    Only for inference: gradients do not reach the views.

    Args:
        layers: of the module that this one is part of, registered there before it.
    """

    def __init__(self, *layers: nn.Linear):
        super().__init__()
        self._layers = layers  # in a tuple, which makes them no children: they belong to the parent
        self.sizes = [layer.out_features for layer in layers]
        self.register_buffer("weight", None, persistent=False)
        self.register_buffer("bias", None, persistent=False)
        self.register_load_state_dict_post_hook(lambda module, _: module._join_again())

    def join(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        """Makes one tensor of the weights, one of the biases, and views of them of the layers' own.

        Args:
            device, dtype: of the new tensors; None for those of the layers. Weights on the meta device have no numbers
                yet: their places are made, to be filled in.
        """
        self.weight = _whole(self._layers, "weight", device, dtype)
        self.bias = None if self._layers[0].bias is None else _whole(self._layers, "bias", device, dtype)

    def _join_again(self) -> None:
        if self.weight is not None:
            self.join()

    def _apply(self, fn: Callable, recurse: bool = True) -> "Joined":
        """For `.to()` and the like: the layers have been moved already."""
        self._join_again()
        return self

    def forward(self, x: Tensor) -> Sequence[Tensor]:
        """x (..., C) gives (..., size) for each layer."""
        if self.weight is None:
            return [layer(x) for layer in self._layers]
        return F.linear(x, self.weight, self.bias).split(self.sizes, -1)


@torch.no_grad()
def _whole(layers: Sequence[nn.Linear], name: str, device: torch.device | None, dtype: torch.dtype | None) -> Tensor:
    """The layers' parameters of this name, one behind the other, and views in their place."""
    parts = [getattr(layer, name) for layer in layers]
    shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
    whole = torch.empty(shape, device=device or parts[0].device, dtype=dtype or parts[0].dtype)
    for layer, part, view in zip(layers, parts, whole.split([len(part) for part in parts]), strict=True):
        if not part.is_meta:
            view.copy_(part)
        setattr(layer, name, nn.Parameter(view, requires_grad=False))
    return whole
