"""A checkpoint's fingerprint: equal for equal weights, whatever file, device or dtype they came from."""

import hashlib

import torch
from torch import nn

EACH = 256  # numbers that are looked at in a tensor: training moves all of them


def fingerprint(model: nn.Module) -> str:
    """32 hexadecimal digits for a model's weights and configuration, from a sample of each tensor.

    Numbers are rounded to bfloat16 first, so that a checkpoint stored in that is the same in float32.

    Args:
        model: its `cfg`, if it has one, counts as well: positions and the like are no weights.
    """
    seen = hashlib.sha256(repr(getattr(model, "cfg", type(model).__name__)).encode())
    for name, value in sorted(model.state_dict().items()):
        seen.update(f"{name} {tuple(value.shape)}".encode())
        flat = value.reshape(-1)
        at = torch.linspace(0, max(0, flat.numel() - 1), min(EACH, flat.numel()), device="cpu", dtype=torch.float64)
        some = flat[at.long().to(flat.device)].to(torch.bfloat16).cpu()
        seen.update(some.view(torch.int16).numpy().tobytes())
    return seen.hexdigest()[:32]
