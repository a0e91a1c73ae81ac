"""A head's need of retrieval: how far the answer moves from the full cache's when this head alone is pruned.

What pruning does to the answer counts, not to the head's own output: in the bundled model, whose answers hang on a few
heads, outputs that change most are not those that matter. Many heads are tried in one batch, each in its own copy of
the answer; all copies share the prompt's cache.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from hybridkv.config import HybridConfig
from hybridkv.planning.head_profile import HeadProfile
from hybridkv.planning.plan import budgeted_plan, static_score
from hybridkv.planning.prefill import Prefill

AT_ONCE = 1 << 30  # bytes that the scores and logits of one batch may take, about


class Observer:
    """A full cache for one sequence, read by several variants of the same answer at once.

    Variant 0 sees everything. Variant n sees everything, too, but in the n-th of some heads only what pruning would
    keep. They share the prompt's keys and values; those of new tokens differ from the pruned layer on.

    Args:
        dropped: for each layer (H, T) bool, what pruning takes from its heads.
        heads: (N,) int64, layer * H + head.

    Attributes:
        visual: (layers, H) sum over steps of variant 0's attention on prunable tokens.
    """

    def __init__(self, prefill: Prefill, dropped: list[Tensor], heads: Tensor):
        self.variants, self.heads, self.dropped = 1 + len(heads), heads, dropped
        self.prunable = prefill.prunable
        self.prompt = [(layer.k, layer.v) for layer in prefill.layers]
        self.new = [(layer.k.new_empty(self.variants, *layer.k[:, :0].shape),) * 2 for layer in prefill.layers]
        self.visual = torch.zeros(prefill.shape)

    def __getitem__(self, layer: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return partial(self.attend, layer)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, Hq, 1, D); k, v (B, H, 1, D); gives (B, Hq, 1, D); B variants."""
        self.new[layer] = new_k, new_v = tuple(torch.cat(pair, 2) for pair in zip(self.new[layer], (k, v), strict=True))
        prompt_k, prompt_v = self.prompt[layer]  # (H, T, D)
        heads, tokens = prompt_k.shape[:2]
        group = rearrange(q, "b (h g) 1 d -> b h g d", h=heads) * q.shape[-1] ** -0.5
        logits = torch.cat(
            [
                einsum(group, prompt_k, "b h g d, h t d -> b h g t"),
                einsum(group, new_k, "b h g d, b h n d -> b h g n"),
            ],
            -1,
        )
        mine = (self.heads // heads == layer).nonzero()[:, 0]
        head = (self.heads[mine] % heads).to(q.device)
        pruned = (1 + mine).to(q.device)
        gone = F.pad(self.dropped[layer], (0, new_k.shape[2]))[head]  # (N, T + n)
        logits[pruned, head] = logits[pruned, head].masked_fill(gone[:, None], float("-inf"))
        seen, own = logits.softmax(-1).split([tokens, new_k.shape[2]], -1)
        self.visual[layer] += seen[0][..., self.prunable].sum(-1).mean(-1).float().cpu()
        out = einsum(seen, prompt_v, "b h g t, h t d -> b h g d") + einsum(own, new_v, "b h g n, b h n d -> b h g d")
        return rearrange(out, "b h g d -> b (h g) 1 d")


def pruned_tokens(prefill: Prefill) -> list[Tensor]:
    """What each head would lose if all were pruned to `config.budget`: for each layer (H, T) bool."""
    plan = budgeted_plan(prefill, torch.zeros(prefill.shape, dtype=torch.bool), static_score)
    dropped = []
    for layer, count in enumerate(plan.n_read * plan.page_size):
        rank = plan.order(prefill, layer).argsort(-1)  # (H, T) place of each token in its head's order
        dropped.append(rank >= count.to(rank.device)[:, None])
    return dropped


def greedy(
    model: nn.Module, observer: Observer, token: Tensor, position: int, eos: Sequence[int], limit: int
) -> list[int]:
    """The full cache's own answer, from its first token on: up to `limit` tokens, the end token left out."""
    path: list[int] = []
    while len(path) < limit and int(token) not in eos:
        path.append(int(token))
        at = torch.full((1,), position + len(path) - 1, device=token.device)
        token = model.step(token.view(1), at, observer)[0].argmax()
    return path


def divergence(
    model: nn.Module, observer: Observer, path: Sequence[int], position: int, device: torch.device
) -> Tensor:
    """KL of each pruned variant from variant 0, in nats a token, mean over the tokens after each of the path: (N,)."""
    total = torch.zeros(observer.variants - 1)
    for n, token in enumerate(path):
        tokens, at = (torch.full((observer.variants,), x, device=device) for x in (token, position + n))
        logits = model.step(tokens, at, observer).float().log_softmax(-1)  # (variants, V)
        kl = (logits[0].exp() * (logits[0] - logits[1:])).sum(-1)
        total += kl.clamp(min=0).cpu()  # below 0 only by rounding
    return total / len(path)


@torch.no_grad()
def measure_heads(
    model: nn.Module,
    prompt: object,
    config: HybridConfig,
    new_tokens: int,
    eos: Sequence[int] = (),
    answer: Sequence[int] | None = None,
    at_once: int = AT_ONCE,
) -> HeadProfile | None:
    """The head profile of one prompt.

    Args:
        model: as `Engine` takes it.
        config: its budget is what a head is pruned to.
        new_tokens: the most that are looked at.
        answer: tokens to follow; None follows the full cache's own likeliest ones, up to one of `eos`.
        at_once: bytes; heads are measured in as many batches as keep their scores and logits below that.

    Returns:
        None if there is not one token of an answer.

    Raises:
        ValueError: the model's numbers are not finite.
    """
    prefill = Prefill(prompt.prunable, config, spans=prompt.spans)
    logits, position = model.prefill(prompt, prefill)
    dropped, device = pruned_tokens(prefill), logits.device
    if answer is None:
        alone = Observer(prefill, dropped, torch.arange(0))
        answer = greedy(model, alone, logits[0].argmax(), position, eos, new_tokens)
    path = list(answer)[:new_tokens]
    if not path:
        return None
    # Three copies are alive at a time: of scores (Hq, T + n) and of logits (V).
    each = 3 * 4 * (prefill.layers[0].q.shape[0] * (len(prefill.prunable) + len(path)) + logits.shape[-1])
    lanes = prefill.shape[0] * prefill.shape[1]
    need = []
    for heads in torch.arange(lanes).split(max(1, at_once // each)):
        observer = Observer(prefill, dropped, heads)
        need.append(divergence(model, observer, path, position, device))
    return HeadProfile(torch.cat(need).view(prefill.shape), observer.visual / len(path))
