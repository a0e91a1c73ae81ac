"""The vision tower of Qwen2.5-VL (arXiv 2502.13923, section 2.1): patches in, one embedding per 2 x 2 patches out.

Most layers attend within windows of `window_size` pixels, a few over the whole frame. Patches are sorted by window
once at the start, so that a window is a run of rows, and sorted back at the end.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from hybridkv.model.config import VisionConfig
from hybridkv.model.rope import inverse_frequencies, rotate

RunGroups = list[Tensor]  # each (n_runs, run_length): the rows of all attention runs of one length

PART = 1 << 15  # patches of several frames that are looked at together: more are no faster, and take memory


class PatchEmbed(nn.Module):
    def __init__(self, cfg: VisionConfig):
        super().__init__()
        size = (cfg.temporal_patch_size, cfg.patch_size, cfg.patch_size)
        # A convolution whose stride is its kernel: stored as one, computed as one matrix product.
        self.proj = nn.Conv3d(cfg.in_channels, cfg.hidden_size, size, stride=size, bias=False)

    def forward(self, patches: Tensor) -> Tensor:  # (N, patch_dim) -> (N, hidden_size)
        return F.linear(patches.to(self.proj.weight.dtype), self.proj.weight.flatten(1))


class Attention(nn.Module):
    def __init__(self, cfg: VisionConfig):
        super().__init__()
        self.num_heads = cfg.num_heads
        self.qkv = nn.Linear(cfg.hidden_size, 3 * cfg.hidden_size)
        self.proj = nn.Linear(cfg.hidden_size, cfg.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, groups: RunGroups) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "n (s h d) -> s n h d", s=3, h=self.num_heads)
        q, k = (rotate(t.float(), cos, sin).to(t.dtype) for t in (q, k))
        out = torch.empty_like(v)
        for rows in groups:
            run = [rearrange(t[rows], "m n h d -> m h n d") for t in (q, k, v)]
            out[rows] = rearrange(F.scaled_dot_product_attention(*run), "m h n d -> m n h d")
        return self.proj(rearrange(out, "n h d -> n (h d)"))


class MLP(nn.Module):
    def __init__(self, cfg: VisionConfig):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size)
        self.up_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size)
        self.down_proj = nn.Linear(cfg.intermediate_size, cfg.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, cfg: VisionConfig):
        super().__init__()
        self.norm1 = nn.RMSNorm(cfg.hidden_size, eps=1e-6)
        self.norm2 = nn.RMSNorm(cfg.hidden_size, eps=1e-6)
        self.attn = Attention(cfg)
        self.mlp = MLP(cfg)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, groups: RunGroups) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin, groups)
        return x + self.mlp(self.norm2(x))


class Merger(nn.Module):
    """Concatenates each 2 x 2 patches and projects them to the decoder's width."""

    def __init__(self, cfg: VisionConfig):
        super().__init__()
        self.unit = cfg.spatial_merge_size**2
        width = cfg.hidden_size * self.unit
        self.ln_q = nn.RMSNorm(cfg.hidden_size, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, cfg.out_hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(rearrange(self.ln_q(x), "(n u) c -> n (u c)", u=self.unit))


@dataclass(frozen=True)
class Layout:
    """How the patches of a batch of images and frames are ordered and grouped; see `layout`."""

    order: Tensor  # (N / unit,) merged patch i of the sorted sequence is merged patch order[i] of the input
    positions: Tensor  # (2, N) row and column of each sorted patch
    windows: RunGroups
    frames: RunGroups


def _group_runs(lengths: list[int]) -> RunGroups:
    """Consecutive runs of the given lengths, gathered by length so that equal runs share one attention call."""
    starts: dict[int, list[int]] = {}
    at = 0
    for n in lengths:
        starts.setdefault(n, []).append(at)
        at += n
    return [torch.tensor(s)[:, None] + torch.arange(n) for n, s in starts.items()]


def layout(grids: list[tuple[int, int, int]], cfg: VisionConfig) -> Layout:
    """Window order, positions and attention runs for inputs of (t, h, w) patches.

    Patches arrive with each merge unit's patches side by side, units in raster order, which is how the image
    processor lays them out.
    """
    merge, unit = cfg.spatial_merge_size, cfg.spatial_merge_size**2
    window = cfg.window_size // cfg.patch_size // merge  # in merged patches
    order, positions, window_lengths, frame_lengths, offset = [], [], [], [], 0
    for t, h, w in grids:
        rows, cols = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        per_unit = [
            rearrange(p, "(h a) (w b) -> (h w) (a b)", a=merge, b=merge) for p in (rows, cols)
        ]  # each (units, unit)
        units = torch.arange(h // merge * (w // merge)).view(h // merge, w // merge)
        tiles = [tile.flatten() for band in units.split(window, 0) for tile in band.split(window, 1)]
        frame_order = torch.cat(tiles)
        for _ in range(t):
            order.append(frame_order + offset)
            positions.append(torch.stack([p[frame_order].flatten() for p in per_unit]))
            window_lengths += [tile.numel() * unit for tile in tiles]
            frame_lengths.append(h * w)
            offset += units.numel()
    return Layout(torch.cat(order), torch.cat(positions, 1), _group_runs(window_lengths), _group_runs(frame_lengths))


def in_parts(grids: list[tuple[int, int, int]]) -> list[list[tuple[int, int, int]]]:
    """Images and videos in parts of up to PART patches, one frame at least. No frame looks at another."""
    parts, room = [], 0
    for t, h, w in grids:
        while t:
            if room < h * w:
                parts.append([])
                room = max(PART, h * w)
            frames = min(t, room // (h * w))
            parts[-1].append((frames, h, w))
            t, room = t - frames, room - frames * h * w
    return parts


class VisionTower(nn.Module):
    def __init__(self, cfg: VisionConfig):
        super().__init__()
        self.cfg = cfg
        self.patch_embed = PatchEmbed(cfg)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.depth))
        self.merger = Merger(cfg)

    def forward(self, patches: Tensor, grids: list[tuple[int, int, int]]) -> Tensor:
        """Embeddings of all inputs, one after the other.

        Args:
            patches: (N, patch_dim) normalised pixels, merge units side by side, on whatever device.
            grids: (t, h, w) in patches of each image or video.

        Returns:
            (N / merge**2, out_hidden_size)
        """
        parts = in_parts(grids)
        sizes = [sum(t * h * w for t, h, w in part) for part in parts]
        device = self.patch_embed.proj.weight.device
        return torch.cat([self.look(p.to(device), g) for p, g in zip(patches.split(sizes), parts, strict=True)])

    def look(self, patches: Tensor, grids: list[tuple[int, int, int]]) -> Tensor:
        """`forward` for what is looked at together."""
        plan = layout(grids, self.cfg)
        device = patches.device
        order, positions = plan.order.to(device), plan.positions.to(device)
        windows, frames = ([g.to(device) for g in groups] for groups in (plan.windows, plan.frames))

        head_dim = self.cfg.hidden_size // self.cfg.num_heads
        angles = positions[..., None] * inverse_frequencies(head_dim // 2, self.cfg.rope_theta, device)  # (2, N, D/4)
        angles = rearrange(angles, "s n f -> n 1 (s f)").repeat(1, 1, 2)  # (N, 1, D)
        cos, sin = angles.cos(), angles.sin()

        unit = self.cfg.spatial_merge_size**2
        x = rearrange(self.patch_embed(patches), "(n u) c -> n u c", u=unit)[order]
        x = rearrange(x, "n u c -> (n u) c")
        for i, block in enumerate(self.blocks):
            x = block(x, cos, sin, frames if i in self.cfg.fullatt_block_indexes else windows)
        return self.merger(x)[order.argsort()]
