"""The hybrid cache in a nanoGPT-style code base: what changes is marked with `# kv`.

A small GPT with learned positions reads a prompt once, then decodes with a quarter of the cache in one compiled step.

    python examples/nanogpt.py
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F

from hybridkv import Engine, HybridConfig


@dataclass
class GPTConfig:
    block_size: int = 2048
    vocab_size: int = 256
    n_layer: int = 3
    n_head: int = 4
    n_embd: int = 128


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, kv=None):  # kv
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(C, dim=2)
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in (q, k, v))  # (B, nh, T, hs)
        y = kv(q, k, v) if kv else F.scaled_dot_product_attention(q, k, v, is_causal=True)  # kv
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = nn.Sequential(
            nn.Linear(config.n_embd, 4 * config.n_embd), nn.GELU(), nn.Linear(4 * config.n_embd, config.n_embd)
        )

    def forward(self, x, kv=None):  # kv
        x = x + self.attn(self.ln_1(x), kv)  # kv
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)

    def forward(self, idx, pos, kv=None):  # kv: (B, T) tokens and positions -> (B, vocab) logits of the last one
        x = self.wte(idx) + self.wpe(pos)
        for i, block in enumerate(self.h):
            x = block(x, kv[i] if kv else None)  # kv
        return F.linear(self.ln_f(x[:, -1]), self.wte.weight)

    # kv: the two calls that hybridkv.Engine makes
    def prefill(self, prompt, kv):
        idx = prompt.input_ids[None]
        return self(idx, torch.arange(idx.shape[1])[None], kv), idx.shape[1]

    def step(self, token, position, kv):
        return self(token[:, None], position[:, None], kv)


@dataclass
class Prompt:
    input_ids: torch.Tensor  # (T,)
    prunable: torch.Tensor | None = None  # (T,) bool; None: all but the last tokens, which are taken for the question


def main() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig()).eval()
    prompt = Prompt(torch.randint(256, (1500,)))
    for policy in ("full", "hybridkv"):
        engine = Engine(model, HybridConfig(budget=0.25), policy)
        (result,) = engine.generate([prompt], max_new_tokens=32)
        read = engine.stats.bytes.step / engine.stats.bytes.full
        print(f"{policy:8s} reads {read:.1%} of the cache a step: {result.token_ids[:12]} ...")


if __name__ == "__main__":
    main()
