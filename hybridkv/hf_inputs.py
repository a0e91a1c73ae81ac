"""What a Hugging Face model is about to read: where padding ends, what may be pruned, where pictures lie."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hybridkv.config import HybridConfig
from hybridkv.planning.prefill import all_but_question
from hybridkv.planning.prune import Span

IDS = {
    "image": ("image_token_id", "image_token_index"),
    "video": ("video_token_id", "video_token_index"),
}


@dataclass(frozen=True)
class Layout:
    """One sequence of a batch.

    Attributes:
        pad: tokens of padding before the prompt.
        prunable: (T,) bool on the CPU, the tokens that may be pruned or moved, without padding.
        spans: where pictures lie in the prompt, without padding.
    """

    pad: int
    prunable: Tensor
    spans: tuple[Span, ...] = ()


def layouts(
    model_config, inputs: Mapping | Tensor, config: HybridConfig, prunable: Tensor | None = None, copies: int = 1
) -> list[Layout]:
    """The layout of every sequence that `generate` will read.

    Prunable are the pictures' and videos' tokens. A prompt without any is text: then all tokens are prunable but the
    last `config.window`, which are taken for the question.

    Args:
        model_config: of transformers; its `image_token_id` and `video_token_id` say what a picture is.
        inputs: what goes to `generate`: `input_ids` (B, T) or `inputs_embeds` (B, T, C), and whatever comes with them.
        config: its `window` is the question's length, where no picture says what is context.
        prunable: (B, T) or (T,) bool, the user's own choice; padding counts, and is ignored.
        copies: sequences of each prompt (`num_return_sequences`), one after the other.

    Raises:
        ValueError: the inputs are none, are not padded on the left, or say too little.
    """
    inputs = {"input_ids": inputs} if isinstance(inputs, Tensor) else inputs
    if not isinstance(inputs, Mapping):
        raise ValueError(f"inputs must be what generate gets, a dict or token ids, not {type(inputs).__name__}")
    ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
    given = ids if ids is not None else embeds
    if not isinstance(given, Tensor) or given.dim() != (3 if ids is None else 2) or not given.numel() or given.is_meta:
        raise ValueError("inputs must hold input_ids (B, T) or inputs_embeds (B, T, C), tensors with a token at least")
    batch, tokens = given.shape[:2]
    real = real_tokens(inputs.get("attention_mask"), batch, tokens)
    kinds = visual_tokens(model_config, ids, batch, tokens)
    visual = kinds["image"] | kinds["video"]
    if prunable is None:
        if ids is None and known_ids(model_config):
            raise ValueError("inputs_embeds do not say where pictures are: give prunable, a mask (B, T) of what may go")
        if not visual.any() and has_pictures(inputs):
            raise ValueError(
                "the inputs have pictures, but no token of theirs was found by the model's config (image_token_id): "
                "give prunable, a mask (B, T) of the tokens that may be pruned"
            )
    else:
        if not isinstance(prunable, Tensor) or prunable.dtype != torch.bool:
            raise ValueError("prunable must be a bool tensor (B, T) or (T,): True for tokens that may be pruned")
        if prunable.shape not in ((batch, tokens), (tokens,)):
            raise ValueError(f"prunable must be ({batch}, {tokens}) or ({tokens},), got {tuple(prunable.shape)}")
        prunable = prunable.cpu().expand(batch, tokens)
    grids = {kind: iter(grid_rows(inputs.get(f"{kind}_grid_thw"))) for kind in IDS}
    merge = getattr(getattr(model_config, "vision_config", None), "spatial_merge_size", None) or 1
    out = []
    for b in range(batch):
        spans = []
        for kind, rows in grids.items():
            mine = kinds[kind][b]
            if f"{kind}_grid_thw" in inputs:
                spans += grid_spans(mine, rows, merge)
            else:
                spans += run_spans(mine, tile_tokens(model_config))
        pad = int((~real[b]).sum())
        if prunable is not None:
            mask = prunable[b, pad:].clone()
        elif visual[b].any():
            mask = visual[b, pad:].clone()
        else:
            mask = all_but_question(tokens - pad, config)
        moved = tuple((start - pad, t, h, w) for start, t, h, w in sorted(spans))
        out += [Layout(pad, mask, moved)] * copies
    for kind, rows in grids.items():
        if next(rows, None) is not None:
            raise ValueError(f"{kind}_grid_thw has more {kind}s than the prompts have {kind} tokens for")
    return out


def has_pictures(inputs: Mapping | Tensor) -> bool:
    """Whether the inputs hold pixels."""
    return not isinstance(inputs, Tensor) and any(name.startswith("pixel_values") for name in inputs)


def real_tokens(mask: Tensor | None, batch: int, tokens: int) -> Tensor:
    """(B, T) bool, False where a prompt is padded, which must be on the left."""
    if mask is None:
        return torch.ones(batch, tokens, dtype=torch.bool)
    if not isinstance(mask, Tensor):
        raise ValueError(f"attention_mask must be a tensor ({batch}, {tokens}), not {type(mask).__name__}")
    if mask.shape != (batch, tokens):
        raise ValueError(f"attention_mask must be ({batch}, {tokens}), as the inputs, got {tuple(mask.shape)}")
    real = mask.cpu().bool()
    if (real[:, :-1] & ~real[:, 1:]).any() or not real[:, -1].all():
        raise ValueError("prompts must be padded on the left: tokenizer.padding_side = 'left'")
    return real


def known_ids(config) -> dict[str, int]:
    """The token of a picture, and of a video, if the model has any."""
    found = {kind: [getattr(config, name, None) for name in names] for kind, names in IDS.items()}
    return {kind: ids[0] for kind, some in found.items() if (ids := [i for i in some if isinstance(i, int)])}


def visual_tokens(config, ids: Tensor | None, batch: int, tokens: int) -> dict[str, Tensor]:
    """For images and for videos, which tokens (B, T) are theirs."""
    none, known = torch.zeros(batch, tokens, dtype=torch.bool), known_ids(config)
    return {kind: ids.cpu() == known[kind] if ids is not None and kind in known else none for kind in IDS}


def grid_rows(grid: Tensor | None) -> list[tuple[int, int, int]]:
    return [] if grid is None else [tuple(row) for row in grid.tolist()]


def grid_spans(mine: Tensor, rows: Iterator[tuple[int, int, int]], merge: int) -> list[Span]:
    """Spans of one sequence's pictures, whose sizes in patches come next in `rows`.

    A video whose frames lie apart, with a time before each, is as many pictures.

    Args:
        mine: (T,) bool, the sequence's tokens of this kind. merge: patches along each side of a token.
    """
    spans, places, used = [], mine.nonzero()[:, 0].tolist(), 0
    while used < len(places):
        row = next(rows, None)
        size = 0 if row is None else row[0] * row[1] * row[2] // merge**2
        if not size or used + size > len(places):
            raise ValueError(
                f"a prompt has {len(places)} tokens for pictures of a kind, which is not what its grid_thw add up to"
            )
        t, h, w = row[0], row[1] // merge, row[2] // merge
        apart = places[used + size - 1] - places[used] != size - 1
        for _ in range(t if apart else 1):
            spans.append((places[used], 1 if apart else t, h, w))
            used += h * w * (1 if apart else t)
    return spans


def run_spans(mine: Tensor, tile: int | None) -> list[Span]:
    """Spans of one sequence's runs of image tokens, where no grid says how they lie.

    A run of whole square tiles is so many pictures; any other is a line.

    Args:
        mine: (T,) bool. tile: tokens of one tile, if all have as many.
    """
    edges = torch.diff(mine.int(), prepend=torch.zeros(1, dtype=torch.int32), append=torch.zeros(1, dtype=torch.int32))
    spans = []
    for start, end in zip((edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist(), strict=True):
        length, side = end - start, round((tile or 0) ** 0.5)
        if side and side * side == tile and length % tile == 0:
            spans.append((start, length // tile, side, side))
        else:
            spans.append((start, 1, 1, length))
    return spans


def tile_tokens(config) -> int | None:
    """Tokens that each picture, or each tile of one, becomes, if the config says so."""
    vision = getattr(config, "vision_config", None)
    for name in ("mm_tokens_per_image", "image_seq_length"):  # Gemma 3; InternVL
        if isinstance(found := getattr(config, name, None), int):
            return found
    sizes = [
        getattr(vision, "image_size", None),
        getattr(vision, "patch_size", None),
        getattr(config, "scale_factor", None),
    ]
    if all(isinstance(size, int) for size in sizes):  # Idefics 3, SmolVLM
        image, patch, scale = sizes
        return (image // patch // scale) ** 2
    return None
