"""Trains the demo model: a miniature Qwen2.5-VL that reads boards (`demo.boards`). Resumable; CPU or CUDA.

    python -m demo.train FOLDER

The module that is trained is the one that inference runs (`model.Model`), with two additions that are gone from the
exported checkpoint: the embeddings of the 2,304 key tokens are sums of two glyph embeddings (expanded on export), and
linear heads on the visual embeddings name each cell's own glyphs, its colour, and its right and lower neighbours' keys
(an auxiliary loss: what is not in a visual embedding can't be retrieved). Many questions share one board, hidden from
each other by the attention mask.
"""

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from demo import boards as bd
from demo.muon import Muon
from demo.tiny_vlm import save_processing
from demo.vocabulary import KEY_TOKENS, VOCABULARY, WORD, encode, token_id
from model.config import parse_config
from model.decoder import Model
from model.rope import prompt_positions

END_OF_TURN, IMAGE = token_id("<|im_end|>"), token_id("<|image_pad|>")
BEFORE = encode("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n")
ASSISTANT = encode("<|im_end|>\n<|im_start|>assistant\n")
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])


# ---- data -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """How the boards of one batch look: all samples of a batch have the same shape."""

    rows: int
    cols: int
    n: int = 1
    compare: bool = False

    @property
    def cells(self) -> int:
        return self.rows * self.cols * self.n


@dataclass(frozen=True)
class Batch:
    patches: Tensor  # (B * n * N, 1176)
    grids: list[tuple[int, int, int]]
    prefix: Tensor  # (P,) token ids up to the last picture's end, the same for all samples
    cells: dict[str, Tensor]  # each (B * n * R * C, parts): what the auxiliary heads should name
    ids: Tensor  # (B, T) questions and answers, one after the other
    labels: Tensor  # (B, T) the next token of an answer; -100 elsewhere
    question: Tensor  # (B, T) number of the question; -1 is padding
    position: Tensor  # (B, T) from the end of the prefix on
    task: Tensor  # (B, T) index into TASKS

    def to(self, device: str) -> "Batch":
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, cells={k: v.to(device) for k, v in self.cells.items()}, **moved)


def patchify(pixels: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 to (N, 1176), as the image processor of Qwen2-VL does without resizing."""
    x = (torch.tensor(pixels).float() / 255 - MEAN) / STD
    x = rearrange(x, "(r a y) (c b x) k -> (r c a b) k 1 (y x)", a=2, b=2, y=14, x=14)
    return x.expand(-1, -1, 2, -1).flatten(1)


def cell_targets(board: bd.Board) -> dict[str, np.ndarray]:
    """What can be read off every cell and its neighbours: (R * C, parts) integers, parts of a key being two glyphs."""

    def glyphs(keys: np.ndarray) -> np.ndarray:
        parts = np.stack([keys // len(bd.GLYPHS), keys % len(bd.GLYPHS)], -1)
        return np.where(keys[..., None] == bd.NONE, len(bd.GLYPHS), parts).reshape(-1, 2)

    right, down = (np.full_like(board.keys, bd.NONE) for _ in range(2))
    right[:, :-1], down[:-1] = board.keys[:, 1:], board.keys[1:]
    return {
        "key": glyphs(board.keys),
        "value": glyphs(board.values),
        "right": glyphs(right),
        "down": glyphs(down),
        "colour": np.where(board.keys == bd.NONE, -100, board.colours).reshape(-1, 1),
    }


def make_batch(rng: np.random.Generator, scene: Scene, size: int, tasks: dict[str, float], room: int) -> Batch:
    """`size` samples of one scene, each with questions until `room` tokens are filled."""
    names, weights = list(tasks), np.array(list(tasks.values()), dtype=float)
    weights /= weights.sum()
    pixels, cells = [], []
    ids, labels = torch.full((size, room), END_OF_TURN), torch.full((size, room), -100)
    question, position = torch.full((size, room), -1), torch.zeros(size, room, dtype=torch.long)
    task = torch.zeros_like(position)
    for b in range(size):
        boards = bd.make_boards(rng, scene.n, scene.rows, scene.cols, scene.compare)
        pixels += [patchify(bd.draw(rng, board)) for board in boards]
        cells += [cell_targets(board) for board in boards]
        at = number = 0
        while True:
            kind = names[rng.choice(len(names), p=weights)]
            asked = bd.ask(rng, boards, kind, hard=bool(rng.random() < 0.6))
            ask, answer = encode(asked.text) + ASSISTANT, [*encode(f" {asked.answer}"), END_OF_TURN]
            length = len(ask) + len(answer)
            if at + length > room:
                if number:
                    break
                continue  # an answer longer than the room: another question
            ids[b, at : at + length] = torch.tensor(ask + answer)
            labels[b, at + len(ask) - 1 : at + length - 1] = torch.tensor(answer)
            question[b, at : at + length] = number
            position[b, at : at + length] = torch.arange(length)
            task[b, at : at + length] = bd.TASKS.index(kind)
            at, number = at + length, number + 1
    tokens = scene.rows * scene.cols
    picture = encode("<|vision_start|>") + [IMAGE] * tokens + encode("<|vision_end|>")
    return Batch(
        patches=torch.cat(pixels),
        grids=[(1, 2 * scene.rows, 2 * scene.cols)] * (size * scene.n),
        prefix=torch.tensor(BEFORE + picture * scene.n),
        cells={k: torch.from_numpy(np.concatenate([c[k] for c in cells])) for k in cells[0]},
        ids=ids,
        labels=labels,
        question=question,
        position=position,
        task=task,
    )


# ---- model ----------------------------------------------------------------------------------------------------------

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


class KeyTable(nn.Module):
    """(vocab, C) weights in which a key token is the sum of its two glyphs' rows. The glyph after the last is none."""

    def __init__(self, width: int, std: float):
        super().__init__()
        self.rest = nn.Parameter(torch.randn(len(VOCABULARY), width) * std)
        self.first, self.second = (nn.Parameter(torch.randn(len(bd.GLYPHS) + 1, width) * std) for _ in range(2))

    def table(self) -> Tensor:
        keys = rearrange(self.first[:-1, None] + self.second[:-1], "a b c -> (a b) c")
        return torch.cat([self.rest[: KEY_TOKENS.start], keys, self.rest[KEY_TOKENS.stop :]])

    def glyph_logits(self, x: Tensor) -> Tensor:
        """How well the rows of the first and the second glyph fit: (M, C) to (M, 2, 49)."""
        return torch.stack([x @ self.first.T, x @ self.second.T], 1)


class Trainee(nn.Module):
    """The model, its factored tables, and the auxiliary heads."""

    def __init__(self, raw: dict):
        super().__init__()
        self.model = Model(parse_config(raw))
        width = self.model.cfg.hidden_size
        self.embed, self.head = KeyTable(width, 0.1), KeyTable(width, 0.1)
        del self.model.embed_tokens, self.model.lm_head
        self.right, self.down = KeyTable(width, 0.1), KeyTable(width, 0.1)
        del self.right.rest, self.down.rest
        self.colour = nn.Linear(width, len(bd.COLOURS))
        for name, p in self.model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "attn.proj.weight")):
                nn.init.zeros_(p)  # every block starts as the identity

    def see(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Visual embeddings (B * n * R * C, C) and the auxiliary losses.

        A cell's own key is read off with the rows of the input embeddings, its pointer with those of the output head:
        pictures come in the code that text already has.
        """
        seen = self.model.visual(batch.patches, batch.grids)
        named = {"key": self.embed, "value": self.head, "right": self.right, "down": self.down}
        losses = {
            kind: F.cross_entropy(table.glyph_logits(seen).flatten(0, 1), batch.cells[kind].flatten())
            for kind, table in named.items()
        }
        losses["colour"] = F.cross_entropy(self.colour(seen), batch.cells["colour"][:, 0])
        return seen, losses

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (M, vocab) at the M labelled tokens, and the auxiliary losses."""
        seen, losses = self.see(batch)
        return F.linear(answer_states(self.model, self.embed.table(), seen, batch), self.head.table()), losses

    def export(self) -> dict[str, Tensor]:
        """Published names to bf16 tensors."""
        state = self.model.state_dict()
        state |= {"embed_tokens.weight": self.embed.table(), "lm_head.weight": self.head.table()}
        published = {k if k.startswith(("visual.", "lm_head.")) else f"model.{k}": v for k, v in state.items()}
        return {k: v.detach().to("cpu", torch.bfloat16).contiguous() for k, v in published.items()}


def answer_states(model: Model, table: Tensor, seen: Tensor, batch: Batch) -> Tensor:
    """Hidden states (M, C) at the M labelled tokens.

    Args:
        table: (vocab, C) input embeddings.
        seen: (B * n * R * C, C) visual embeddings.
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
    kv = partial(attend, prefix=prefix, mask=mask)
    hidden = model(x, positions, [kv] * len(model.layers))[:, prefix:]
    return hidden[batch.labels >= 0]


def attend(q: Tensor, k: Tensor, v: Tensor, prefix: int, mask: Tensor) -> Tensor:
    """The prefix causally, the questions by their mask. q (B, Hq, P + T, D); k, v (B, H, P + T, D)."""
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    seen = F.scaled_dot_product_attention(q[:, :, :prefix], k[:, :, :prefix], v[:, :, :prefix], is_causal=True)
    asked = F.scaled_dot_product_attention(q[:, :, prefix:], k, v, attn_mask=mask)
    return torch.cat([seen, asked], 2)


# ---- schedule -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """Some steps on boards of some sizes.

    Attributes:
        steps: how many.
        low, high: bounds of rows and columns, drawn log-uniformly.
        cells: boards a step, counted in cells; and at most so many cells in a prompt, unless `largest` is above it.
        room: tokens of questions and answers beside every prompt; 0 trains the vision tower alone.
        several: share of steps with two to four boards; and `compared` with two boards to compare.
        probe: weight of the auxiliary losses.
        lr: learning rate at the stage's first and last step, as a share of the full one.
        vision: share of that for the vision tower. Muon's steps have the same length however small the gradient is:
            at the full rate a tower that reads well forgets.
    """

    name: str
    steps: int
    low: int
    high: int
    cells: int
    room: int
    several: float = 0.0
    compared: float = 0.0
    probe: float = 0.5
    largest: int = 0
    lr: tuple[float, float] = (1.0, 1.0)
    vision: float = 1.0
    tasks: dict[str, float] = field(default_factory=lambda: dict(SINGLE))


SINGLE = {"lookup": 2, "lookups": 1, "colour": 1, "right": 2, "down": 2, "chain": 3, "describe": 1}
SEVERAL = {"which": 4, "lookup": 2, "chain": 2, "right": 1, "down": 1}
COMPARED = {"compare": 2, "changed": 1}

STAGES = [
    Stage("glyphs", 250, 6, 10, cells=2400, room=0, probe=1.0),
    Stage("neighbours", 250, 6, 12, cells=2400, room=0, probe=1.0, lr=(1.0, 0.3)),
    Stage("first", 150, 2, 3, cells=240, room=56, tasks={"lookup": 1, "chain": 2}, vision=0.1),
    Stage("tasks", 300, 3, 6, cells=480, room=96, several=0.2, compared=0.2, vision=0.1, lr=(1.0, 0.6)),
    Stage("small", 450, 4, 12, cells=800, room=160, several=0.2, compared=0.15, vision=0.1, lr=(0.6, 0.5)),
    Stage("middle", 400, 6, 24, cells=1500, room=256, several=0.2, compared=0.15, vision=0.1, lr=(0.5, 0.5)),
    Stage("large", 400, 8, 64, 2400, 320, largest=4096, several=0.2, compared=0.15, vision=0.1, lr=(0.5, 0.02)),
]

MUON_LR, ADAM_LR, WARMUP = 0.02, 2e-3, 20
SAVE_EVERY = 50


def draw_scene(rng: np.random.Generator, stage: Stage) -> tuple[Scene, dict[str, float]]:
    kind = rng.random()
    while True:
        rows, cols = (round(2 ** rng.uniform(math.log2(stage.low), math.log2(stage.high))) for _ in range(2))
        if kind < stage.compared:
            scene, tasks = Scene(rows, cols, 2, True), COMPARED
        elif kind < stage.compared + stage.several:
            scene, tasks = Scene(rows, cols, int(rng.integers(2, 5))), SEVERAL
        else:
            scene, tasks = Scene(rows, cols), stage.tasks
        if scene.cells <= max(stage.cells, stage.largest):
            return scene, tasks


def optimizers(trainee: Trainee) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for tables, patch embedding, norms and biases; vision apart."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, p in trainee.named_parameters():
        vision = name.startswith("model.visual.")
        matrix = p.dim() == 2 and name.startswith("model.")
        groups.setdefault((matrix, vision), []).append(p)

    def grouped(matrix: bool) -> list[dict]:
        return [{"params": groups[matrix, vision], "vision": vision} for vision in (False, True)]

    return [
        Muon(grouped(True), lr=MUON_LR),
        torch.optim.AdamW(grouped(False), lr=ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def exact(logits: Tensor, batch: Batch) -> dict[str, tuple[int, int]]:
    """Right answers and answers per task. An answer is right if each of its tokens is the likeliest after the right
    ones before it, which is when greedy decoding gives it."""
    wrong = torch.zeros_like(batch.labels, dtype=torch.bool)
    wrong[batch.labels >= 0] = logits.argmax(-1) != batch.labels[batch.labels >= 0]
    counts = {}
    for b in range(len(batch.ids)):
        for q in range(int(batch.question[b].max()) + 1):
            mine = batch.question[b] == q
            task = bd.TASKS[int(batch.task[b][mine][0])]
            right, total = counts.get(task, (0, 0))
            counts[task] = (right + int(not wrong[b][mine].any()), total + 1)
    return counts


def step(trainee: Trainee, opts: list, batch: Batch, stage: Stage, done: int) -> tuple[float, dict, Tensor | None]:
    """One update, `done` steps into the stage. Returns the answers' loss, the auxiliary losses and the logits."""
    first, last = stage.lr
    share = last + (first - last) * (1 + math.cos(math.pi * done / stage.steps)) / 2
    for opt, lr in zip(opts, (MUON_LR, ADAM_LR), strict=True):
        for group in opt.param_groups:
            group["lr"] = lr * share * (stage.vision if group["vision"] else 1) * min(1, (done + 1) / WARMUP)
    if stage.room:
        logits, probes = trainee(batch)
        answers = F.cross_entropy(logits, batch.labels[batch.labels >= 0])
    else:
        logits, answers, probes = None, torch.zeros(()), trainee.see(batch)[1]
    (answers + stage.probe * sum(probes.values())).backward()
    for opt in opts:
        opt.step()
        opt.zero_grad()
    return answers.item(), {k: v.item() for k, v in probes.items()}, logits


def train(folder: Path, size: str, device: str) -> Trainee:
    """Runs what is left of the schedule. State, log and curve are in `folder`, saved every SAVE_EVERY steps."""
    torch.manual_seed(0)
    trainee = Trainee(config(**SIZES[size])).to(device)
    opts, at, seconds = optimizers(trainee), 0, 0.0
    if (folder / "state.pt").is_file():
        state = torch.load(folder / "state.pt", map_location=device, weights_only=True)
        if state["size"] != size:
            raise SystemExit(f"{folder} holds a run of --size {state['size']}: choose another folder")
        trainee.load_state_dict(state["trainee"])
        for opt, saved in zip(opts, state["opts"], strict=True):
            opt.load_state_dict(saved)
        at, seconds = state["at"], state["seconds"]
    ends = np.cumsum([stage.steps for stage in STAGES])
    bar = tqdm(total=int(ends[-1]), initial=at, desc="training", smoothing=0.05)
    while at < ends[-1]:
        stage = STAGES[int(np.searchsorted(ends, at, side="right"))]
        done = at - int(ends[STAGES.index(stage)]) + stage.steps
        began = time.perf_counter()
        rng = bd.rng_for("train", at)
        scene, tasks = draw_scene(rng, stage)
        batch = make_batch(rng, scene, max(1, stage.cells // scene.cells), tasks, max(stage.room, 24)).to(device)
        loss, probes, logits = step(trainee, opts, batch, stage, done)
        at, seconds = at + 1, seconds + time.perf_counter() - began
        row = {"step": at, "stage": stage.name, "seconds": round(seconds, 1), **asdict(scene), "loss": round(loss, 4)}
        row |= {"probes": {k: round(v, 4) for k, v in probes.items()}}
        if logits is not None:
            row["right"] = exact(logits, batch)
        with open(folder / "log.jsonl", "a") as log:
            log.write(json.dumps(row) + "\n")
        bar.set_postfix_str(f"{stage.name} loss {loss:.3f}")
        bar.update()
        if at % SAVE_EVERY == 0 or at == ends[-1] or done == stage.steps - 1:
            state = {"trainee": trainee.state_dict(), "opts": [o.state_dict() for o in opts]}
            torch.save(state | {"at": at, "seconds": seconds, "size": size}, folder / "state.tmp")
            (folder / "state.tmp").replace(folder / "state.pt")
    bar.close()
    return trainee


def export(trainee: Trainee, raw: dict, folder: Path) -> None:
    """Writes the checkpoint folder: config, weights in bf16, tokenizer and image processor."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    save_file(trainee.export(), folder / "model.safetensors", metadata={"format": "pt"})
    save_processing(folder, VOCABULARY, WORD)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="state, log, curve and finally the checkpoint; resumes what it finds")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    trainee = train(args.folder, args.size, args.device)
    export(trainee, config(**SIZES[args.size]), args.folder / "checkpoint")


if __name__ == "__main__":
    main()
