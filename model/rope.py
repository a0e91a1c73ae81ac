"""Rotary position embedding: plain, three-dimensional (M-RoPE) and the vision tower's two-dimensional one.

M-RoPE (Qwen2-VL, arXiv 2409.12191, section 2.1) gives every token a time, a height and a width position. Text has
all three equal, so it behaves like plain RoPE; the frequencies of a head are split into three sections, one for each.
"""

import torch
from einops import rearrange, repeat
from torch import Tensor


def inverse_frequencies(dim: int, theta: float, device: torch.device | None = None) -> Tensor:
    """Angular frequencies in radians per position, shape (dim / 2,)."""
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)


def rotation(positions: Tensor, inv_freq: Tensor, section: tuple[int, int, int] | None) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every token's angles.

    Args:
        positions: (3, B, T) time, height and width positions; plain RoPE uses the first row.
        inv_freq: (D / 2,) frequencies.
        section: how many frequencies follow time, height and width; None for plain RoPE.

    Returns:
        cos, sin: (B, 1, T, D) in float32, ready to broadcast over heads.
    """
    angles = positions[..., None].float() * inv_freq  # (3, B, T, D/2)
    if section is None:
        angles = angles[0]
    else:
        angles = torch.cat([part[i] for i, part in enumerate(angles.split(section, dim=-1))], dim=-1)
    angles = torch.cat((angles, angles), dim=-1)[:, None]  # (B, 1, T, D)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the two halves of the last dimension against each other; `cos` and `sin` broadcast to `x`."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def prompt_positions(
    input_ids: Tensor,
    image_token_id: int,
    video_token_id: int,
    grids: list[tuple[int, int, int]],
    seconds_per_grid: list[float],
    merge: int,
    tokens_per_second: float,
) -> Tensor:
    """Time, height and width positions of one prompt.

    Text counts on by one. An image or video starts where the text before it stopped; height and width count merged
    patches, time counts `tokens_per_second` a second (always 0 within an image). What follows starts one past the
    largest of the three, so that no later token shares a position with an earlier one.

    By decision that is not what transformers does from 5.3 on, where text after a video starts max(height, width)
    past the video's start, whatever its time span. The two agree as long as the last time position is below
    max(height, width) of the grid in tokens: every image, and every video short enough. From then on (at 2 frames a
    second and 13 x 23 tokens from about 13 seconds on) transformers lets the text fall inside the video's time span,
    and every position after that video differs. The checkpoints were trained with the rule used here.

    Args:
        input_ids: (T,) with placeholders already expanded, one per merged patch.
        grids: (t, h, w) in patches for each image or video, in the order of the prompt.
        seconds_per_grid: seconds between two time steps, one per entry of `grids`; 0 for images.
        merge: patches merged per side (`spatial_merge_size`).

    Returns:
        (3, T) int64.

    Raises:
        ValueError: the placeholders and the grids do not match.
    """
    visual = (input_ids == image_token_id) | (input_ids == video_token_id)
    parts, at, start, length = [], 0, 0, input_ids.numel()
    for (t, h, w), seconds in zip(grids, seconds_per_grid, strict=True):
        hits = visual[at:].nonzero()
        if not len(hits):
            raise ValueError(f"the prompt has fewer image or video placeholders than the {len(grids)} given inputs")
        text = int(hits[0])
        parts.append(torch.arange(text).expand(3, -1) + start)
        start += text
        h, w = h // merge, w // merge
        if not visual[at + text : at + text + t * h * w].all() or at + text + t * h * w > length:
            raise ValueError(
                f"an input of {t} x {h} x {w} visual tokens has fewer placeholders than that in the prompt"
            )
        time = (torch.arange(t) * seconds * tokens_per_second).long()
        grid = torch.stack(
            (
                repeat(time, "t -> t h w", h=h, w=w),
                repeat(torch.arange(h), "h -> t h w", t=t, w=w),
                repeat(torch.arange(w), "w -> t h w", t=t, h=h),
            )
        )
        grid = rearrange(grid, "s t h w -> s (t h w)") + start
        parts.append(grid)
        start = int(grid.max()) + 1
        at += text + t * h * w
    if visual[at:].any():
        raise ValueError("the prompt has more image or video placeholders than inputs")
    parts.append(torch.arange(length - at).expand(3, -1) + start)
    return torch.cat(parts, dim=1)
