"""What a cache kept of its prompts and what each step retrieved, for who wants to look at it.

Only a cache made with `record=True` has this. Its compiled step writes the chosen chunks into one more buffer; any
other cache's step has neither the buffer nor the copy, and no branch that could take it.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hybridkv.cache.pack import Kept
from hybridkv.planning.plan import Plan

Head = tuple[int, int]  # layer, KV head


@dataclass
class Record:
    """What happened to one prompt.

    Attributes:
        plan: what its lanes keep.
        kept: for every layer and KV head, the prompt tokens (N,) that it stores, in the order of its pages: chunks,
            fixed pages, tail page.
        retrieved: for every step, the numbers of the chunks that each dynamic head read, in rising order. Chunks of
            the prompt come first, `plan.lane_chunks` of them; the others are pages that new tokens have filled.
    """

    plan: Plan
    kept: list[list[Tensor]] = field(default_factory=list)
    retrieved: list[dict[Head, Tensor]] = field(default_factory=list)

    def chunk_tokens(self, head: Head, chunk: int) -> Tensor:
        """The prompt tokens, at most `page_size`, that lie in one chunk of a dynamic head."""
        layer, h = head
        size, tokens = self.plan.page_size, self.kept[layer][h]
        if chunk < self.plan.lane_chunks:
            return tokens[chunk * size : (chunk + 1) * size]
        # The first tail page to be closed began with prompt tokens.
        in_tail = int(self.plan.fill[layer, h])
        return tokens[len(tokens) - in_tail :] if chunk == self.plan.lane_chunks else tokens[:0]


class Recording(nn.Module):
    """Takes notes for a `HybridCache`.

    Args:
        rows: retrieving layers, rows of each, and the most chunks that one retrieves: (N, R, K).
    """

    def __init__(self, rows: tuple[int, int, int], device: torch.device):
        super().__init__()
        self.register_buffer("chosen", torch.zeros(rows, dtype=torch.int32, device=device), persistent=False)
        self.records: list[Record] = []

    def note(self, nth: Tensor, chunks: Tensor) -> None:
        """Inside the step: the numbers of the chunks (R, K) that the nth retrieving layer reads."""
        self.chosen.index_copy_(0, nth.view(1), chunks[None].int())

    def begin(self, plans: list[Plan]) -> None:
        """New prompts take the place of the old."""
        self.records = [Record(plan) for plan in plans]

    def keep(self, b: int, kept: Kept) -> None:
        """The next layer of prompt `b` is packed."""
        self.records[b].kept.append([tokens.cpu() for tokens in kept.tokens])

    def take(self, lane: Tensor, n_retrieve: Tensor, layers: list[int]) -> None:
        """Adds the step that has just run to the records. Waits for the device: not part of the step.

        Args:
            lane, n_retrieve: (N, R), as in the cache.
            layers: the N layers that retrieve.
        """
        chosen, lane, n_retrieve = (t.cpu() for t in (self.chosen, lane, n_retrieve))
        heads = self.records[0].plan.dynamic.shape[1]
        steps: list[dict[Head, Tensor]] = [{} for _ in self.records]
        for n, layer in enumerate(layers):
            for row in (lane[n] < len(self.records) * heads).nonzero()[:, 0].tolist():
                b, head = divmod(int(lane[n, row]), heads)
                steps[b][layer, head] = chosen[n, row, : n_retrieve[n, row]].long().sort().values
        for record, step in zip(self.records, steps, strict=True):
            record.retrieved.append(step)
