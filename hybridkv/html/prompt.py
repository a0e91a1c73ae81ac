"""What the page shows of a prompt: its pictures as the model saw them, and its text, token by token."""

import base64
import io
from collections.abc import Sequence

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from hybridkv.model import Processor, Prompt

MOST_PIXELS = 4_000_000  # of all pictures of a page together; beyond, they are scaled down
BROKEN = "\ufffd"  # what an unfinished character decodes to


def pictures(processor: Processor, prompt: Prompt) -> list[list[Image.Image]]:
    """The pictures of every input, one for each time step, as the model saw them: made back from its patches.

    Where a prompt has none, since a reading holds what the model made of them, they are grey.
    """
    if not prompt.grids:
        return []
    vision, how = processor.cfg.vision, processor.patcher.image_processor
    sizes = [t * h * w for t, h, w in prompt.grids]
    if prompt.patches is None or len(prompt.patches) != sum(sizes):
        size = vision.patch_size
        return [[Image.new("RGB", (w * size, h * size), "grey")] * t for t, h, w in prompt.grids]
    mean, std = (torch.tensor(x).view(-1, 1, 1) for x in (how.image_mean, how.image_std))
    shown = []
    for patches, (t, h, w) in zip(prompt.patches.split(sizes), prompt.grids, strict=True):
        merge = vision.spatial_merge_size
        pixels = rearrange(
            patches,
            "(t h w m n) (c s p q) -> t s c (h m p) (w n q)",
            t=t, h=h // merge, w=w // merge, m=merge, n=merge,
            c=vision.in_channels, s=vision.temporal_patch_size, p=vision.patch_size,
        )[:, 0]  # fmt: skip
        pixels = ((pixels * std + mean) * 255).round().clamp(0, 255).byte()  # (t, 3, height, width)
        shown.append([Image.fromarray(rearrange(frame, "c h w -> h w c").numpy()) for frame in pixels])
    return shown


def data_uri(picture: Image.Image, scale: float = 1.0) -> str:
    """A picture inside the page, as PNG or JPEG, whichever is shorter. scale: of both sides, at most 1."""
    if scale < 1:
        picture = picture.resize([max(1, round(scale * side)) for side in picture.size])
    if picture.getcolors(256):
        picture = picture.quantize(256, dither=Image.Dither.NONE)
    kinds = []
    for kind, how in (("png", {"optimize": True}), ("jpeg", {"quality": 85})):
        file = io.BytesIO()
        (picture if kind == "png" else picture.convert("RGB")).save(file, kind, **how)
        kinds.append((kind, file.getvalue()))
    kind, content = min(kinds, key=lambda k: len(k[1]))
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def inputs(processor: Processor, prompt: Prompt) -> list[dict]:
    """Each picture or video: where its tokens start, its size in tokens, and a data URI for each time step."""
    shown = pictures(processor, prompt)
    area = sum(frame.width * frame.height for frames in shown for frame in frames)
    scale = min(1.0, (MOST_PIXELS / area) ** 0.5) if area else 1.0
    return [
        {"start": start, "h": h, "w": w, "frames": [data_uri(frame, scale) for frame in frames]}
        for (start, _, h, w), frames in zip(prompt.spans, shown, strict=True)
    ]


def texts(processor: Processor, prompt: Prompt) -> list[dict]:
    """The runs of text between pictures: where each starts, and what each of its tokens says."""
    runs, at = [], 0
    for start, t, h, w in [*prompt.spans, (len(prompt.input_ids), 0, 0, 0)]:
        if at < start:
            runs.append({"start": at, "pieces": pieces(processor, prompt.input_ids[at:start])})
        at = start + t * h * w
    return runs


def pieces(processor: Processor, token_ids: Sequence[int] | Tensor) -> list[str]:
    """What each token adds to the text; a character of several tokens comes with its last one."""
    out, ids, shown = [], [int(i) for i in token_ids], ""
    start = 0  # decoded from here on, so that long texts take no square of their length
    for n in range(1, len(ids) + 1):
        text = processor.decode(ids[start:n])
        if text.endswith(BROKEN) and n < len(ids):
            out.append("")
            continue
        out.append(text[len(shown) :])
        shown = text
        if n - start >= 32:
            # A few tokens stay, since some tokenizers write the first token of a text without its space.
            start, shown = n - 1, processor.decode(ids[n - 1 : n])
    return out
