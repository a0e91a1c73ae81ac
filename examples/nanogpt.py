"""The hybrid cache in a nanoGPT-style code base: what changes is marked with `# kv`.

A small GPT with learned positions is trained for half a minute on Python's own documentation, byte by byte. Then it
reads a page of it that it has not seen, and goes on: with the full cache, with a quarter of it, and with a quarter of
it in a compiled step of its own.

    python examples/nanogpt.py [--seconds 30]
"""

import argparse
import time
from dataclasses import dataclass
from pydoc_data.topics import topics

import torch
import torch.nn as nn
from torch.nn import functional as F

from hybridkv import Capacity, Engine, HybridCache, HybridConfig, Prefill, Sampling, hybrid_plan
from hybridkv.cache.attention import why_uncompiled


@dataclass
class GPTConfig:
    block_size: int = 512
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
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, idx, pos, kv=None):  # kv: (B, T) tokens and positions -> (B, T, vocab) logits
        x = self.wte(idx) + self.wpe(pos)
        for i, block in enumerate(self.h):
            x = block(x, kv[i] if kv else None)  # kv
        return F.linear(self.ln_f(x), self.wte.weight)

    # kv: the two calls that hybridkv.Engine makes
    def prefill(self, prompt, kv):
        idx = prompt.input_ids[None]
        return self(idx, torch.arange(idx.shape[1])[None], kv)[:, -1], idx.shape[1]

    def step(self, token, position, kv):
        return self(token[:, None], position[:, None], kv)[:, -1]


@dataclass
class Prompt:
    input_ids: torch.Tensor  # (T,)
    prunable: torch.Tensor | None = None  # (T,) bool; None: all but the last tokens, which are taken for the question


@torch.enable_grad()
def train(model: GPT, text: torch.Tensor, seconds: float) -> float:
    """Learns to continue text, at all positions. Returns the last steps' loss, in nats a byte."""
    matrices = [p for p in model.h.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    optimizers = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.0), torch.optim.AdamW(others, lr=5e-3)
    length, losses, end = 128, [], time.time() + seconds
    while time.time() < end or len(losses) < 5:
        start = torch.randint(len(text) - length, (16,))
        batch = torch.stack([text[s : s + length + 1] for s in start])
        pos = torch.randint(model.wpe.num_embeddings - length, (16, 1)) + torch.arange(length)
        loss = F.cross_entropy(model(batch[:, :-1], pos).flatten(0, 1), batch[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    return sum(losses[-20:]) / len(losses[-20:])


@torch.no_grad()
def with_a_step_of_its_own(model: GPT, prompt: Prompt, config: HybridConfig, new_tokens: int, compile=torch.compile):
    """What `Engine` does, without it: read, plan, pack, then the same compiled function for every token."""
    prefill = Prefill(prompt.prunable, config)
    logits, position = model.prefill(prompt, prefill)
    plan = hybrid_plan(prefill)
    cache = HybridCache(Capacity.of([plan], new_tokens), 1, prefill)
    cache.load([prefill], [plan], new_tokens)
    going_on = torch.ones(1, dtype=torch.bool)

    def step(token, position):
        token = model.step(token, position, cache).argmax(-1)
        cache.advance(going_on)  # the token that every layer has just appended counts
        return token

    step = compile(step, fullgraph=True)
    token, position = logits.argmax(-1), torch.tensor([position])
    tokens = [int(token)]
    while len(tokens) < new_tokens:
        token = step(token, position)
        position = position + 1
        tokens.append(int(token))
    return tokens


def duration(text: str) -> float:
    if not 0 <= float(text) < float("inf"):  # nan is neither
        raise argparse.ArgumentTypeError(f"must be seconds, 0 or more, got {text}")
    return float(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=duration, default=30.0, help="of training")
    seconds = parser.parse_args().seconds
    torch.manual_seed(0)
    model = GPT(GPTConfig())
    text = torch.tensor(list(" ".join(" ".join(topics.values()).split()).encode()))
    seen, unseen = text[:-20_000], text[-20_000:]
    loss = train(model, seen, seconds)
    print(f"trained for {seconds:g} s on {len(seen):,} bytes: {loss:.2f} nats a byte")
    model.eval().requires_grad_(False)
    prompt, config = Prompt(unseen[5000:5400]), HybridConfig(budget=0.25)

    def show(name: str, tokens: list[int], read: float) -> None:
        print(f"{name:21s} reads {read:.1%} of the cache a step: {bytes(tokens).decode(errors='replace')!r}")

    for policy in ("full", "hybridkv"):
        engine = Engine(model, config, policy)
        (result,) = engine.generate([prompt], 64, Sampling(temperature=0.7))  # the same draws for both
        read = engine.stats.bytes.step / engine.stats.bytes.full
        show(policy, result.token_ids, read)
    if why := why_uncompiled(torch.device("cpu")):
        print(f"its own step is left out: {why}")
        return
    show("its own step, greedy", with_a_step_of_its_own(model, prompt, config, 64), read)


if __name__ == "__main__":
    main()
