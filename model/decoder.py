"""The decoder: grouped-query attention with rotary positions, SwiGLU, RMSNorm. Qwen2.5-VL, Qwen2 and Llama alike.

Attention does not know where keys and values are kept. Each layer calls `kv(q, k, v)`: with `causal_attention` it is
a plain forward pass, with a recorder from `hybridkv` it is the prefill, with a cache it is one decoding step.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from hybridkv.model.config import Config
from hybridkv.model.joined import Joined
from hybridkv.model.rope import inverse_frequencies, prompt_positions, rotate, rotation
from hybridkv.model.vision import VisionTower

LayerKV = Callable[[Tensor, Tensor, Tensor], Tensor]

SLICE = 1024  # tokens of a prompt that go through all of a layer but attention at once


class PromptLike(Protocol):
    """What the model reads; `hybridkv.model.processing.Processor` makes one."""

    input_ids: Tensor  # (T,) placeholders expanded
    patches: Tensor | None  # (N, patch_dim) of all images and videos, in the order of the prompt
    grids: list[tuple[int, int, int]]
    seconds_per_grid: list[float]


def whole(parts: Sequence[Tensor], dim: int) -> Tensor:
    """What was made in slices, in one piece."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every token attends to itself and what is before it. q (B, Hq, T, D); k, v (B, H, T, D)."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


class Attention(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        self.head_dim = cfg.head_dim
        q_dim, kv_dim = cfg.num_attention_heads * cfg.head_dim, cfg.num_key_value_heads * cfg.head_dim
        self.q_proj = nn.Linear(cfg.hidden_size, q_dim, bias=cfg.attention_bias)
        self.k_proj = nn.Linear(cfg.hidden_size, kv_dim, bias=cfg.attention_bias)
        self.v_proj = nn.Linear(cfg.hidden_size, kv_dim, bias=cfg.attention_bias)
        self.o_proj = nn.Linear(q_dim, cfg.hidden_size, bias=False)
        self.qkv = Joined(self.q_proj, self.k_proj, self.v_proj)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, Hq, T, D), k and v (B, H, T, D) of x (B, T, C), positions applied."""
        q, k, v = (rearrange(y, "b t (h d) -> b h t d", d=self.head_dim) for y in self.qkv(x))
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def forward(self, out: Tensor) -> Tensor:
        """(B, T, C) of what was attended to, (B, Hq, T, D)."""
        return self.o_proj(rearrange(out, "b h t d -> b t (h d)"))


class MLP(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.up_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.down_proj = nn.Linear(cfg.intermediate_size, cfg.hidden_size, bias=False)
        self.gate_up = Joined(self.gate_proj, self.up_proj)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(cfg.hidden_size, eps=cfg.rms_norm_eps)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = nn.RMSNorm(cfg.hidden_size, eps=cfg.rms_norm_eps)
        self.mlp = MLP(cfg)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, kv: LayerKV) -> Tensor:
        """x (B, T, C) -> (B, T, C). In slices: else a long prompt needs for a moment far more than its cache takes."""
        slices = zip(x.split(SLICE, 1), cos.split(SLICE, 2), sin.split(SLICE, 2), strict=True)
        parts = [self.self_attn.project(self.input_layernorm(part), *angles) for part, *angles in slices]
        q, k, v = (whole(each, 2) for each in zip(*parts, strict=True))
        del parts
        out = kv(q, k, v)
        del q, k, v
        slices = zip(x.split(SLICE, 1), out.split(SLICE, 2), strict=True)
        return whole([self.behind_attention(*part) for part in slices], 1)

    def behind_attention(self, x: Tensor, out: Tensor) -> Tensor:
        """x (B, T, C), and what it attended to, out (B, Hq, T, D) -> (B, T, C)."""
        x = x + self.self_attn(out)
        return x + self.mlp(self.post_attention_layernorm(x))


@torch.compiler.nested_compile_region
def run_block(block: Block, x: Tensor, cos: Tensor, sin: Tensor, kv: LayerKV) -> Tensor:
    """One layer; under `torch.compile` all layers share one compiled region."""
    return block(x, cos, sin, kv)


class Model(nn.Module):
    """Token ids and pixels in, logits out. Weights come from `model.from_pretrained`."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        self.visual = VisionTower(cfg.vision) if cfg.vision else None
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.num_hidden_layers))
        self.norm = nn.RMSNorm(cfg.hidden_size, eps=cfg.rms_norm_eps)
        self.lm_head = None if cfg.tie_word_embeddings else nn.Linear(cfg.hidden_size, cfg.vocab_size, bias=False)

    def join(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        """Makes one matmul of q, k and v, and one of gate and up, for inference; see `Joined.join`."""
        for module in self.modules():
            if isinstance(module, Joined):
                module.join(device, dtype)

    @property
    def n_layers(self) -> int:
        return self.cfg.num_hidden_layers

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.weight.dtype

    def embed(self, prompt: PromptLike, start: int = 0) -> tuple[Tensor, Tensor]:
        """Embeddings (1, T, C) and positions (3, 1, T) of one prompt, visual embeddings in their places.

        Args:
            start: the first token to embed; the T from it on are, and pictures before it need no patches.
        """
        outside = (prompt.input_ids < 0) | (prompt.input_ids >= self.cfg.vocab_size)
        if outside.any():
            raise ValueError(
                f"token {int(prompt.input_ids[outside][0])} is not in a vocabulary of {self.cfg.vocab_size}"
            )
        tokens, ids = len(prompt.input_ids), prompt.input_ids[start:].to(self.device)
        x = self.embed_tokens(ids)
        if self.visual is None:
            if prompt.grids:
                raise ValueError("this checkpoint is text-only: it can't look at images or videos")
            return x[None], torch.arange(start, tokens, device=self.device).expand(3, 1, -1)
        cfg, vision = self.cfg, self.cfg.vision
        positions = prompt_positions(
            prompt.input_ids.cpu(),
            cfg.image_token_id,
            cfg.video_token_id,
            prompt.grids,
            prompt.seconds_per_grid,
            vision.spatial_merge_size,
            vision.tokens_per_second,
        )[:, start:].to(self.device)
        visual = (ids == cfg.image_token_id) | (ids == cfg.video_token_id)
        if visual.any():
            patches, grids = self._unseen(prompt, int(visual.sum()))
            seen = self.visual(patches, grids)
            x = x.masked_scatter(visual[:, None], seen.to(x.dtype))
        return x[None], positions[:, None]

    def _unseen(self, prompt: PromptLike, tokens: int) -> tuple[Tensor, list[tuple[int, int, int]]]:
        """Patches and grids of the last pictures, which these many visual tokens stand for."""
        patches = tokens * self.cfg.vision.spatial_merge_size**2
        sizes = [t * h * w for t, h, w in prompt.grids]
        n = next((n for n in range(1, len(sizes) + 1) if sum(sizes[-n:]) == patches), None)
        if n is None:
            raise ValueError("a prompt can be read on after a picture, not from the middle of one")
        if prompt.patches is None or len(prompt.patches) < patches:
            raise ValueError("a picture's size alone is not enough to look at it: give the picture, or its reading")
        return prompt.patches[-patches:], prompt.grids[-n:]

    def forward(self, x: Tensor, positions: Tensor, kv: Sequence[LayerKV] | None = None) -> Tensor:
        """Hidden states of embedded tokens.

        Args:
            x: (B, T, C) embeddings; a batch of different lengths is padded on the right, where no real token looks.
            positions: (3, B, T).
            kv: one callable for each layer; None attends causally and keeps nothing.

        Returns:
            (B, T, C), normalised, for `logits`.
        """
        inv_freq = inverse_frequencies(self.cfg.head_dim, self.cfg.rope_theta, x.device)
        cos, sin = (t.to(x.dtype) for t in rotation(positions, inv_freq, self.cfg.mrope_section))
        for i, block in enumerate(self.layers):
            x = run_block(block, x, cos, sin, causal_attention if kv is None else kv[i])
        return whole([self.norm(part) for part in x.split(SLICE, 1)], 1)

    def logits(self, hidden: Tensor) -> Tensor:
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        return F.linear(hidden, head.weight)

    def prefill(self, prompt: PromptLike, kv: Sequence[LayerKV], start: int = 0) -> tuple[Tensor, int]:
        """Reads one prompt. Returns the logits (1, vocab) of the token after it and that token's position.

        Args:
            kv: one callable for each layer.
            start: tokens that were read before; only those after them go through the layers.
        """
        x, positions = self.embed(prompt, start)
        hidden = self.forward(x, positions, kv)
        return self.logits(hidden[:, -1]), int(positions.max()) + 1

    def step(self, token: Tensor, position: Tensor, kv: Sequence[LayerKV]) -> Tensor:
        """One decoding step: tokens (B,) at positions (B,) give logits (B, vocab)."""
        positions = position[None, :, None].expand(3, -1, -1)  # generated text: all three sections equal
        return self.logits(self.forward(self.embed_tokens(token)[:, None], positions, kv)[:, -1])
