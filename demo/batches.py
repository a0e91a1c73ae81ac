"""Training batches: boards of one shape, and for each sample many questions that do not see each other."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from demo import boards as bd
from demo.vocabulary import KEY_TOKENS, encode, token_id

END_OF_TURN, IMAGE = token_id("<|im_end|>"), token_id("<|image_pad|>")
BEFORE = encode("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n")
ASSISTANT = encode("<|im_end|>\n<|im_start|>assistant\n")
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])

# How often each task is asked of one board, of several boards, and of two boards to compare.
SINGLE = {"lookup": 1, "lookups": 1, "colour": 1, "right": 2, "down": 2, "chain": 2, "describe": 2}
SEVERAL = {"which": 4, "lookup": 2, "chain": 2, "right": 1, "down": 1}
COMPARED = {"compare": 1, "changed": 2}


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
    pixels: Tensor  # (B * n, H, W, 3) uint8
    grids: list[tuple[int, int, int]]
    prefix: Tensor  # (P,) token ids up to the last picture's end, the same for all samples
    cells: dict[str, Tensor]  # each (B * n * R * C, parts): what the auxiliary heads should name
    ids: Tensor  # (B, T) questions and answers, one after the other
    labels: Tensor  # (B, T) the next token of an answer; -100 elsewhere
    question: Tensor  # (B, T) number of the question; -1 is padding
    position: Tensor  # (B, T) from the end of the prefix on
    task: Tensor  # (B, T) index into TASKS
    evidence: Tensor  # (B, T) column, prefix first, of the cell or word that the next token is read from; -1: none
    reads: Tensor  # (B, T) what is read there, index into READS
    twin: Tensor  # (P,) place of the same cell on the first board; -1 where there is none

    @property
    def patches(self) -> Tensor:
        """What the vision tower reads, (B * n * N, 1176): made where the pixels are, eight times their size."""
        return patchify(self.pixels)

    def to(self, device: str) -> "Batch":
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, cells={k: v.to(device) for k, v in self.cells.items()}, **moved)


def patchify(pixels: Tensor) -> Tensor:
    """(n, H, W, 3) uint8 to (n * N, 1176), as the image processor of Qwen2-VL does without resizing."""
    x = (pixels.float() / 255 - MEAN.to(pixels.device)) / STD.to(pixels.device)
    x = rearrange(x, "n (r a y) (c b x) k -> (n r c a b) k 1 (y x)", a=2, b=2, y=14, x=14)
    return x.expand(-1, -1, 2, -1).flatten(1)


def cell_targets(board: bd.Board, number: int = 0) -> dict[str, np.ndarray]:
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
        "board": np.full((board.keys.size, 1), number),
    }


# What heads are told to read: of the kind "paper" are a cell's colour and its board's number, "name" is the key itself.
READS = ("value", "right", "down", "paper", "name")


def evidence_of(question: bd.Question) -> list[tuple[bd.Cell | int, int] | None]:
    """For each token of the answer, and the end of the turn, where it is read, and an index into READS.

    It is read from a cell, or from one of the keys in the question, which are counted. None: the first key of the
    question or a word that ends the answer, which need no telling.
    """
    cells, task = question.evidence, question.task
    if task == "describe":
        read = [None, *((cell, kind) for cell in cells for kind in (3, 0, 1))]
    elif task == "lookups":
        read = [each for i, cell in enumerate(cells) for each in ((i, 4) if i else None, (cell, 0))]
    else:  # the key that was asked for, then what its cell says; in a run or a chain each cell names the next
        kind = {"right": 1, "down": 2, "colour": 3, "which": 3}.get(task, 0)
        read = [(cells[1], 4) if task == "changed" else None, *((cell, kind) for cell in cells)]
    return [*read, None]


def make_batch(rng: np.random.Generator, scene: Scene, size: int, tasks: dict[str, float], room: int) -> Batch:
    """`size` samples of one scene, each with questions until `room` tokens are filled."""
    names, weights = list(tasks), np.array(list(tasks.values()), dtype=float)
    weights /= weights.sum()
    prefix = list(BEFORE)
    for n in range(scene.n):
        prefix += encode(f"Picture {n + 1}: <|vision_start|>")
        prefix += [IMAGE] * (scene.rows * scene.cols) + encode("<|vision_end|>")
    prefix = torch.tensor(prefix)
    place = rearrange((prefix == IMAGE).nonzero()[:, 0], "(n r c) -> n r c", n=scene.n, r=scene.rows)
    twin = torch.full_like(prefix, -1)
    if scene.compare:
        twin[place[1]] = place[0]
    pixels, cells = [], []
    ids, labels = torch.full((size, room), END_OF_TURN), torch.full((size, room), -100)
    question, position = torch.full((size, room), -1), torch.zeros(size, room, dtype=torch.long)
    task, evidence, reads = torch.zeros_like(position), torch.full((size, room), -1), torch.zeros_like(position)
    for b in range(size):
        boards = bd.make_boards(rng, scene.n, scene.rows, scene.cols, scene.compare)
        pixels += [torch.from_numpy(bd.draw(rng, board)) for board in boards]
        cells += [cell_targets(board, i) for i, board in enumerate(boards)]
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
            named = [len(prefix) + at + i for i, token in enumerate(ask) if token in KEY_TOKENS]
            for i, read in enumerate(evidence_of(asked), at + len(ask) - 1):
                if read:
                    where, reads[b, i] = read
                    evidence[b, i] = named[where] if isinstance(where, int) else place[where]
            question[b, at : at + length] = number
            position[b, at : at + length] = torch.arange(length)
            task[b, at : at + length] = bd.TASKS.index(kind)
            at, number = at + length, number + 1
    return Batch(
        pixels=torch.stack(pixels),
        grids=[(1, 2 * scene.rows, 2 * scene.cols)] * (size * scene.n),
        prefix=prefix,
        cells={k: torch.from_numpy(np.concatenate([c[k] for c in cells])) for k in cells[0]},
        ids=ids,
        labels=labels,
        question=question,
        position=position,
        task=task,
        evidence=evidence,
        reads=reads,
        twin=twin,
    )
