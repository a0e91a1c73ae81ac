"""The decoding step: one graph for every token, from the embedding to the next token's number."""

from collections.abc import Callable, Sequence
from types import FunctionType

import torch
from torch import Tensor, nn

from hybridkv.cache.dense import DenseCache
from hybridkv.cache.hybrid import HybridCache
from hybridkv.sampling import sample

# Else the compile cache on disk would refuse graphs with a loop (`retrieve.best_chunks`). Its key covers their bodies.
CPU_OPTIONS = {"unsafe_marked_cacheable_functions": {"torch.ops.higher_order.while_loop": torch.__version__}}


class DecodeState(nn.Module):
    """What a step reads and writes beside the cache. Buffers, so that CUDA graphs can keep their addresses."""

    def __init__(self, batch: int, new_tokens: int, eos: Sequence[int], device: torch.device):
        super().__init__()

        def buffer(name: str, value: Tensor) -> None:
            self.register_buffer(name, value.to(device), persistent=False)

        buffer("token", torch.zeros(batch, dtype=torch.int64))
        buffer("position", torch.zeros(batch, dtype=torch.int64))
        buffer("active", torch.zeros(batch, dtype=torch.bool))
        buffer("count", torch.zeros(1, dtype=torch.int64))  # tokens chosen so far
        buffer("noise", torch.zeros(new_tokens, batch))
        buffer("temperature", torch.ones(()))
        buffer("top_p", torch.ones(()))
        buffer("eos", torch.tensor(eos or [-1]))

    def choose(self, logits: Tensor, greedy: bool) -> Tensor:
        """The next token (B,), which becomes the current one; a sequence that reaches its end is no longer active."""
        if greedy:
            token = logits.argmax(-1)
        else:
            token = sample(logits, self.temperature, self.top_p, self.noise.index_select(0, self.count)[0])
        self.active.logical_and_((token[:, None] != self.eos).all(-1))
        self.token.copy_(token)
        self.count.add_(1)
        return token


def decode_step(model: nn.Module, cache: HybridCache | DenseCache, state: DecodeState, greedy: bool) -> Tensor:
    """One token for every sequence: (B,) int64. The whole of it is one graph."""
    logits = model.step(state.token, state.position, cache)
    check_logits(logits, len(state.token), "step")
    cache.advance(state.active)
    state.position.add_(state.active)
    return state.choose(logits, greedy)


def check_logits(logits: Tensor, batch: int, method: str) -> None:
    """Refuses what is not (batch, V)."""
    if logits.dim() != 2 or logits.shape[0] != batch:
        raise ValueError(
            f"model.{method} must return logits ({batch}, V), one row for each sequence's next token, got "
            f"{tuple(logits.shape)}"
        )


def compiled_step(device: torch.device) -> Callable[..., Tensor]:
    """`decode_step` compiled, for a cache and state of one size.

    Each has a code object of its own, which keeps other sizes' graphs out of Dynamo's count.
    """
    step = FunctionType(decode_step.__code__.replace(), decode_step.__globals__)
    how = {"mode": "reduce-overhead"} if device.type == "cuda" else {"options": CPU_OPTIONS}
    return torch.compile(step, fullgraph=True, dynamic=False, **how)
