"""A batch of prompts on its way through a Hugging Face model, whole or in chunks: dense attention, and a record."""

import torch
import transformers
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hybridkv.config import HybridConfig
from hybridkv.hf_prompt import Announced
from hybridkv.hf_serving import scaled
from hybridkv.planning.prefill import Prefill, Window

IN_CHUNKS = (5, 23)  # before, transformers gives every chunk all pictures, or none


class BatchPrefill:
    """What was read so far.

    Args:
        announced: the prompts. n_layers: that will call.

    Attributes:
        prefills: the record of each sequence; a layer is in it once all its tokens were read.
        seen: tokens that all layers have read.
    """

    def __init__(self, announced: Announced, n_layers: int, config: HybridConfig):
        self.announced, self.layouts, self.n_layers = announced, announced.layouts, n_layers
        self.prefills = [Prefill(layout.prunable, config, spans=layout.spans) for layout in self.layouts]
        self.seen, self.last = 0, 0  # tokens of all chunks; of the last one
        self._parts: dict[int, list[tuple[Tensor, Tensor, list[Tensor]]]] = {}  # of layers that are not complete
        self._rows: list[Tensor] | None = None  # of the windows

    def attend(
        self, index: int, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None
    ) -> tuple[Tensor, bool]:
        """One layer's attention over a chunk, (B, T', Hq, D), and whether that completes the layer.

        Args:
            q: (B, Hq, T', D); k, v: (B, H, T', D), positions applied. mask: (B, 1, T', S) over all tokens so far.
        """
        complete, parts = self._check(k, mask), self._parts.setdefault(index, [])
        parts.append((k, v, self._window_queries(scaled(q, scaling))))
        if len(parts) > 1:
            k, v = (torch.cat([part[i] for part in parts], 2) for i in (0, 1))
        out, _ = sdpa_attention_forward(module, q, k, v, mask, scaling=scaling)
        if complete:
            for b, (layout, prefill) in enumerate(zip(self.layouts, self.prefills, strict=True)):
                asking = torch.cat([part[2][b] for part in parts], 1)[:, self._order[b]]
                prefill.record(index, asking, k[b, :, layout.pad :], v[b, :, layout.pad :])
            del self._parts[index]
        if index == self.n_layers - 1:
            self.seen, self.last = self.seen + q.shape[2], q.shape[2]
        return out, complete

    def expect(self, ids: Tensor | None, embeddings: Tensor | None) -> None:
        """Looks at what the model is about to read, ids (B, T') or embeddings (B, T', C), before anything is computed.

        Raises:
            ValueError: these are not the prompts that were announced.
        """
        given = embeddings if ids is None else ids
        if given is None:
            return  # which the model itself refuses
        self._check_sizes(*given.shape[:2])
        self.announced.check(ids, embeddings, self.seen)

    def _check(self, k: Tensor, mask: Tensor | None) -> bool:
        """Whether this chunk is the last one. What the model hides must be the padding that was announced."""
        batch = len(self.layouts)
        complete = self._check_sizes(k.shape[0], k.shape[2])
        if not complete and self.announced.pictures and transformers_version() < IN_CHUNKS:
            raise NotImplementedError(
                f"transformers {transformers.__version__} can't read pictures in chunks: leave prefill_chunk_size out, "
                f"or use transformers {IN_CHUNKS[0]}.{IN_CHUNKS[1]}"
            )
        if complete and mask is not None:
            seen = mask[:, 0, -1, : self.announced.tokens]  # (B, T)
            pad = (~seen if seen.dtype == torch.bool else seen != 0).sum(-1).expand(batch).tolist()
        if complete and (pad if mask is not None else [0] * batch) != [layout.pad for layout in self.layouts]:
            raise ValueError("the model hides other tokens than the attention_mask that the cache was made with")
        return complete

    def _check_sizes(self, batch: int, new: int) -> bool:
        """Whether so many tokens complete the prompts."""
        if batch != len(self.layouts):
            raise ValueError(
                f"the cache was made for {len(self.layouts)} sequences, the model reads {batch}. Beam search is not "
                "possible; for several answers to a prompt give num_return_sequences to the cache, too"
            )
        tokens, seen = self.announced.tokens, self.seen + new
        if seen > tokens or (seen < tokens and new == 1 and self.last > 1):
            raise ValueError(
                f"the cache was made for prompts of {tokens} tokens, the model reads {seen} or more. If that is no "
                "assisted decoding, which is not possible: make it, or call cache.reset, with what goes to generate"
            )
        return seen == tokens

    def _window_queries(self, q: Tensor) -> list[Tensor]:
        """For each sequence, the chunk's queries (Hq, N, D) that its record will look at, in the prompt's order."""
        if self._rows is None:
            windows = [Window.of(p.prunable, p.config, p.spans).rows.to(q.device) for p in self.prefills]
            self._rows = [rows.sort().values + layout.pad for rows, layout in zip(windows, self.layouts, strict=True)]
            self._order = [rows.argsort().argsort() for rows in windows]  # back to the window's
        chunks = [rows[(rows >= self.seen) & (rows < self.seen + q.shape[2])] - self.seen for rows in self._rows]
        return [q[b].index_select(1, rows) for b, rows in enumerate(chunks)]


def transformers_version() -> tuple[int, ...]:
    """Its major and minor number."""
    return tuple(int(part) for part in transformers.__version__.split(".")[:2])
