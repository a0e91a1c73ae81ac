"""Decoding steps one after the other, and when the host reads their tokens.

Reading a step's tokens makes the host wait for the device, and the device then waits for the host's next launch. On a
GPU the next step is therefore launched first: it needs nothing from the host. Where all sequences turn out to have
ended, that one step is thrown away.
"""

import time
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor


class Launched:
    """A step on its way. Its tokens are copied to the host behind it, and waited for when they are read.

    Attributes:
        seconds: what the device took for it; on a GPU known once it was read.
    """

    def __init__(self, step: Callable[[], Tensor], device: torch.device):
        self.events = None
        begun = time.perf_counter()
        if device.type != "cuda":
            self.tokens = step().clone()  # the next step may write over its own result
            self.seconds = time.perf_counter() - begun
            return
        self.events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        stream = torch.cuda.current_stream(device)  # the current device may be another
        self.events[0].record(stream)
        tokens = step()
        self.tokens = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
        self.tokens.copy_(tokens, non_blocking=True)
        self.events[1].record(stream)

    def read(self) -> list[int]:
        if self.events:
            self.events[1].synchronize()  # the one place where the host waits
            self.seconds = self.events[0].elapsed_time(self.events[1]) / 1e3
        return self.tokens.tolist()


class Steps:
    """The steps of one generation.

    Args:
        step: computes the next token of every sequence, (B,).
        count: how many steps there may be.
        device: that they run on.
        alone: the first so many are read before the next is launched: they compile and record. None for all.

    Attributes:
        seconds: of each step that was read.
    """

    def __init__(self, step: Callable[[], Tensor], count: int, device: torch.device, alone: int | None):
        self.step, self.left, self.device = step, count, device
        self.alone = count if alone is None else alone
        self.under_way: deque[Launched] = deque()
        self.seconds: list[float] = []

    def tokens(self) -> list[int]:
        """The next token of every sequence."""
        wanted = 1 if len(self.seconds) < self.alone else 2
        while self.left and len(self.under_way) < wanted:
            self.under_way.append(Launched(self.step, self.device))
            self.left -= 1
        first = self.under_way.popleft()
        tokens = first.read()
        self.seconds.append(first.seconds)
        return tokens
