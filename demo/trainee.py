"""The model in training: what inference runs, with factored key tables and auxiliary heads that export leaves out."""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from demo import boards as bd
from demo.batches import END_OF_TURN, IMAGE, READS, Batch
from demo.vocabulary import KEY_TOKENS, VOCABULARY, encode, token_id
from hybridkv.model.config import parse_config
from hybridkv.model.decoder import Model
from hybridkv.model.rope import prompt_positions

RETRIEVES = 3  # the layer whose heads, one of each group and the last, are told where the evidence lies
TWINS = 1  # the layer whose last head is told, on a board that is shown again, where each cell was the first time
SEEN = ("key", "value", "right", "down", "colour")  # the auxiliary losses of the visual embeddings, see `Trainee.see`
SIZES = {  # hidden_size is heads x 32, as transformers wants it
    "small": dict(layers=8, heads=8, kv_heads=4, mlp=384, vision=128),  # 12 MB in bf16
    "large": dict(layers=8, heads=12, kv_heads=4, mlp=512, vision=160),
}


def config(layers: int, heads: int, kv_heads: int, mlp: int, vision: int) -> dict:
    """`config.json` in the published, flat layout."""
    hidden_size = 32 * heads
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "hidden_size": hidden_size,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 32,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 7, 7]},
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": len(VOCABULARY),
        "bos_token_id": token_id("<|endoftext|>"),
        "eos_token_id": END_OF_TURN,
        "image_token_id": IMAGE,
        "video_token_id": token_id("<|video_pad|>"),
        "vision_start_token_id": token_id("<|vision_start|>"),
        "vision_end_token_id": token_id("<|vision_end|>"),
        "vision_config": {
            "depth": 2,
            "hidden_size": vision,
            "intermediate_size": 2 * vision,
            "num_heads": 4,
            "in_chans": 3,
            "out_hidden_size": hidden_size,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
            "hidden_act": "silu",
        },
    }


(END,) = encode(f" {bd.END}")
BOARDS = encode(" 1 2 3 4")
COLOURS = encode(" " + " ".join(bd.COLOURS))


class KeyTable(nn.Module):
    """(vocab, C) weights in which a key token is the sum of its two glyphs' rows, and `end` of the two empty rows."""

    def __init__(self, width: int, std: float = 0.1):
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.randn(len(bd.GLYPHS) + 1, width) * std) for _ in range(2))
        self.rest = nn.Parameter(torch.randn(len(VOCABULARY), width) * std)

    def glyph_logits(self, x: Tensor) -> Tensor:
        """How well the rows of the first and the second glyph (the last: of none) fit: (M, C) to (M, 2, 49)."""
        return torch.stack([x @ self.first.T, x @ self.second.T], 1)

    @torch.no_grad()
    def split(self, table: Tensor) -> None:
        """Takes over (vocab, C) weights: the rows whose sums come closest to them, the means of both glyphs' equal."""
        self.rest.copy_(table)
        keys = rearrange(table[KEY_TOKENS.start : KEY_TOKENS.stop], "(a b) c -> a b c", a=len(bd.GLYPHS))
        half = keys.mean((0, 1)) / 2
        self.first[:-1] = keys.mean(1) - half
        self.second[:-1] = keys.mean(0) - half
        self.first[-1] = self.second[-1] = table[END] / 2

    def table(self) -> Tensor:
        keys = rearrange(self.first[:-1, None] + self.second[:-1], "a b c -> (a b) c")
        table = torch.cat([self.rest[: KEY_TOKENS.start], keys, self.rest[KEY_TOKENS.stop :]])
        return table.index_copy(0, torch.tensor([END], device=table.device), (self.first[-1:] + self.second[-1:]))


class Trainee(nn.Module):
    """The model, its factored tables, and the auxiliary heads."""

    def __init__(self, raw: dict):
        super().__init__()
        self.model = Model(parse_config(raw))
        width = self.model.cfg.hidden_size
        self.embed, self.head = KeyTable(width), KeyTable(width)
        del self.model.embed_tokens, self.model.lm_head
        self.right, self.down = (nn.Linear(width, width, bias=False) for _ in range(2))
        for name, p in self.model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "attn.proj.weight")):
                nn.init.zeros_(p)  # every block starts as the identity

    def see(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Visual embeddings (B * n * R * C, C) and the auxiliary losses.

        A cell's own key is read off with the rows of the input embeddings, its pointer and colour with those of the
        output head, its neighbours with the latter through a matrix each: pictures come in the code that text already
        has, and what is to be said of a cell is one matrix away from it.
        """
        seen = self.model.visual(batch.patches, batch.grids)
        glyphs = {
            "key": self.embed.glyph_logits(seen),
            "value": self.head.glyph_logits(seen),
            "right": self.head.glyph_logits(self.right(seen)),
            "down": self.head.glyph_logits(self.down(seen)),
        }
        losses = {k: F.cross_entropy(v.flatten(0, 1), batch.cells[k].flatten()) for k, v in glyphs.items()}
        losses["colour"] = F.cross_entropy(seen @ self.head.rest[COLOURS].T, batch.cells["colour"][:, 0])
        return seen, losses

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (M, vocab) at the M labelled tokens, and the auxiliary losses."""
        seen, losses = self.see(batch)

        def watch(layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> None:
            prefix = len(batch.prefix)
            if layer == RETRIEVES:
                losses["evidence"] = surprise(q[:, :, prefix:], k, mask, batch.evidence, batch.reads)
                losses.update(self.readings(v, batch))
            if layer == TWINS and (batch.twin >= 0).any():
                losses["twin"] = twin_surprise(q[:, -1, :prefix], k[:, -1, :prefix], batch.twin)

        states = answer_states(self.model, self.embed.table(), seen, batch, watch)
        return F.linear(states, self.head.table()), losses

    def readings(self, v: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Losses of what each retrieving head would say if it looked at one cell alone, or at one key in a question.

        Args:
            v: (B, H, P + T, D) values of all tokens.
        """
        out = self.model.layers[RETRIEVES].self_attn.o_proj.weight  # (C, Hq * D)
        out = rearrange(out, "c (q d) -> q d c", d=v.shape[3])
        groups, heads = reading_heads(len(out), v.shape[1])
        cells, asked = v[:, :, : len(batch.prefix)][:, :, batch.prefix == IMAGE], v[:, -1, len(batch.prefix) :]
        said = {
            kind: rearrange(cells[:, group] @ out[head], "b n c -> (b n) c")
            for kind, group, head in zip(READS, groups, heads, strict=True)
        }
        keys = (batch.ids >= KEY_TOKENS.start) & (batch.ids < KEY_TOKENS.stop) & (batch.question >= 0)
        said["word"] = asked[keys] @ out[-1]
        number = batch.ids[keys] - KEY_TOKENS.start
        word = torch.stack([number // len(bd.GLYPHS), number % len(bd.GLYPHS)], 1)
        losses = {}
        for kind, target in (
            *((kind, batch.cells[kind]) for kind in ("value", "right", "down")),
            ("name", batch.cells["key"]),
            ("word", word),
        ):
            logits = self.head.glyph_logits(said[kind])
            losses[f"say {kind}"] = F.cross_entropy(logits.flatten(0, 1), target.flatten())
        for kind, words in (("colour", COLOURS), ("board", BOARDS)):
            losses[f"say {kind}"] = F.cross_entropy(said["paper"] @ self.head.rest[words].T, batch.cells[kind][:, 0])
        return losses

    def take(self, model: Model) -> None:
        """Takes over an exported checkpoint's weights; the heads that name neighbours begin anew."""
        self.model.load_state_dict(model.state_dict(), strict=False)  # the tables are not among ours
        self.embed.split(model.embed_tokens.weight)
        self.head.split(model.lm_head.weight)

    @torch.no_grad()
    def sharpen(self, picture: float, retrieval: float) -> None:
        """Multiplies the queries of the vision tower's full attention, and those of the layer that retrieves."""
        tower = self.model.visual
        for i in tower.cfg.fullatt_block_indexes:
            for p in tower.blocks[i].attn.qkv.parameters():
                p[: len(p) // 3] *= picture
        for p in self.model.layers[RETRIEVES].self_attn.q_proj.parameters():
            p *= retrieval

    @torch.no_grad()
    def prefer_near(self, nats: float) -> None:
        """In the vision tower's full attention, adds `nats` to the score of the same row, and of the same column.

        Along one slow rotary frequency, so the bonus falls with the distance: to -0.8 of it over 60 cells. There the
        three faster frequencies are almost where they were, and at the edges of large boards what lies 60 cells away
        was taken for a neighbour. (The slower ones hardly move within a picture.)
        """
        tower = self.model.visual
        frequencies = tower.cfg.hidden_size // tower.cfg.num_heads // 4  # of rows; as many of columns follow
        slow = frequencies // 2 - 1  # 10000 ** (-3 / 8): 0.03 radians a patch
        for i in tower.cfg.fullatt_block_indexes:
            query, key, _ = rearrange(tower.blocks[i].attn.qkv.bias, "(s n d) -> s n d", s=3, n=tower.cfg.num_heads)
            for bias in (query, key):
                bias[:, [slow, frequencies + slow]] += (nats * math.sqrt(bias.shape[1])) ** 0.5

    def export(self) -> dict[str, Tensor]:
        """Published names to bf16 tensors."""
        state = self.model.state_dict()
        state |= {"embed_tokens.weight": self.embed.table(), "lm_head.weight": self.head.table()}
        published = {k if k.startswith(("visual.", "lm_head.")) else f"model.{k}": v for k, v in state.items()}
        return {k: v.detach().to("cpu", torch.bfloat16).contiguous() for k, v in published.items()}


def answer_states(
    model: Model, table: Tensor, seen: Tensor, batch: Batch, watch: Callable[..., None] | None = None
) -> Tensor:
    """Hidden states (M, C) at the M labelled tokens.

    Args:
        table: (vocab, C) input embeddings.
        seen: (B * n * R * C, C) visual embeddings.
        watch: called in every layer with its number, q, k and v of all tokens, and the questions' mask.
    """
    size, prefix = len(batch.ids), len(batch.prefix)
    ids = torch.cat([batch.prefix.expand(size, -1), batch.ids], 1)
    x = F.embedding(ids, table)
    x = x.masked_scatter((ids == IMAGE)[..., None], seen.to(x.dtype))
    n = len(batch.grids) // size
    start = prompt_positions(batch.prefix.cpu(), IMAGE, -1, batch.grids[:n], [0.0] * n, 2, 1.0).to(x.device)
    asked = (batch.position + start.max() + 1).expand(3, -1, -1)
    positions = torch.cat([start[:, None].expand(-1, size, -1), asked], 2)

    own = batch.question[:, :, None] == batch.question[:, None]
    own &= torch.ones_like(own[0]).tril()
    mask = torch.cat([own.new_ones(*own.shape[:2], prefix), own], 2)[:, None]  # (B, 1, T, P + T)

    def layer_attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if watch:
            watch(layer, q, k, v, mask)
        return attend(q, k, v, prefix, mask)

    kv = [partial(layer_attention, i) for i in range(len(model.layers))]
    hidden = model(x, positions, kv)[:, prefix:]
    return hidden[batch.labels >= 0]


def reading_heads(query_heads: int, kv_heads: int) -> tuple[list[int], list[int]]:
    """For each of READS its KV head and its query head: the first of each group, and the last of the last group."""
    group = query_heads // kv_heads
    return [*range(kv_heads), kv_heads - 1], [*range(0, query_heads, group), query_heads - 1]


def surprise(q: Tensor, k: Tensor, mask: Tensor, evidence: Tensor, reads: Tensor) -> Tensor:
    """Mean negative log attention on the evidence, of the head that is to read it.

    Args:
        q: (B, Hq, T, D). k: (B, H, S, D). mask: (B, 1, T, S) bool.
        evidence: (B, T) the column to look at; -1: any. reads: (B, T) index into READS.
    """
    groups, heads = reading_heads(q.shape[1], k.shape[1])
    logits = (q[:, heads] @ k[:, groups].mT * q.shape[-1] ** -0.5).masked_fill(~mask, float("-inf"))
    b, t = (evidence >= 0).nonzero(as_tuple=True)
    logits = logits[b, reads[b, t], t]  # (M, S)
    return F.cross_entropy(logits, evidence[b, t])


def twin_surprise(q: Tensor, k: Tensor, twin: Tensor) -> Tensor:
    """Mean negative log attention, causal, of every cell on its twin: q, k (B, P, D), twin (P,); -1: it has none."""
    rows = (twin >= 0).nonzero()[:, 0]
    logits = q[:, rows] @ k.mT * q.shape[-1] ** -0.5  # (B, M, P)
    later = torch.arange(len(twin), device=twin.device) > rows[:, None]
    logits = logits.masked_fill(later, float("-inf"))
    return F.cross_entropy(logits.flatten(0, 1), twin[rows].repeat(len(q)))


def attend(q: Tensor, k: Tensor, v: Tensor, prefix: int, mask: Tensor) -> Tensor:
    """The prefix causally, the questions by their mask. q (B, Hq, P + T, D); k, v (B, H, P + T, D)."""
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    seen = F.scaled_dot_product_attention(q[:, :, :prefix], k[:, :, :prefix], v[:, :, :prefix], is_causal=True)
    asked = F.scaled_dot_product_attention(q[:, :, prefix:], k, v, attn_mask=mask)
    return torch.cat([seen, asked], 2)
