"""Trains the demo model: a miniature Qwen2.5-VL that reads boards (`demo.boards`). Resumable; CPU or CUDA.

    python -m demo.train FOLDER

The module that is trained is the one that inference runs (`model.Model`), with additions that are gone from the
exported checkpoint:

- The embeddings of the 2,304 key tokens are sums of two glyph embeddings, expanded on export.
- What is not in a visual embedding can't be retrieved: auxiliary losses ask each for its cell's key (read with the rows
  of the input embeddings), its pointer and colour (with those of the output head) and its neighbours' keys.
- A head finds nothing before it knows what to do with it, and the other way round: in one layer, five heads are told
  where each word of an answer is read (pointer, right, down, colour and board, or the key itself, of a cell or in the
  question), and what they are to say if they look at any one cell or key. On a board that is shown a second time, a
  head of an earlier layer is told where each cell was before. Without that, kinds of questions that came late stayed
  at guessing for hundreds of steps.

Many questions share one board, hidden from each other by the attention mask. What a step sees depends on its number
alone, so boards can be drawn ahead (--workers), and a run that was cut off goes on as if it had not been.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from demo import boards as bd
from demo.batches import COMPARED, SEVERAL, SINGLE, Batch, Scene, make_batch
from demo.evaluate import evaluate, exact, unseen
from demo.muon import Muon
from demo.tiny_vlm import CHAT_TEMPLATE, save_processing
from demo.trainee import SEEN, SIZES, Trainee, config
from demo.vocabulary import VOCABULARY, WORD
from hybridkv.model import from_pretrained


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
        see: share of that for those that ask the visual embeddings alone (SEEN).
        lr: learning rate at the stage's first and last step, as a share of the full one.
        vision: share of that for the vision tower. Muon's steps have the same length however small the gradient is:
            at the full rate a tower that reads well forgets. 0 keeps it as it is, at two thirds of the time.
        text: the same for all but the vision tower.
        sharpen: what queries are multiplied by before the first step: the vision tower's to a whole picture, and those
            of the layer that retrieves: attention learned on small boards spreads too thin on the largest.
        near: before the first step, see `Trainee.prefer_near`.
        tasks, pairs: how often each kind is asked of one board, and of two to compare.
    """

    name: str
    steps: int
    low: int
    high: int
    cells: int
    room: int
    several: float = 0.15
    compared: float = 0.1
    probe: float = 0.7
    largest: int = 0
    lr: tuple[float, float] = (1.0, 1.0)
    vision: float = 1.0
    see: float = 1.0
    text: float = 1.0
    sharpen: tuple[float, float] = (1.0, 1.0)
    near: float = 0.0
    tasks: dict[str, float] = field(default_factory=lambda: dict(SINGLE))
    pairs: dict[str, float] = field(default_factory=lambda: dict(COMPARED))


HARDER = {"lookup": 1, "lookups": 2, "colour": 1, "right": 2, "down": 2, "chain": 2, "describe": 3}
NAMES = HARDER | {"lookups": 6}
SETTLE = {"lookup": 1, "lookups": 3, "colour": 1, "right": 3, "down": 3, "chain": 3, "describe": 3}
LAST = {"tasks": SETTLE, "pairs": {"compare": 1}}
RUNS = {"lookup": 1, "lookups": 2, "colour": 1, "right": 3, "down": 5, "chain": 3, "describe": 6}
FAR = LAST | {"largest": 4096, "see": 0.0}
STAGES = [
    Stage("glyphs", 250, 6, 10, cells=2400, room=0, several=0.0, compared=0.0, probe=1.0),
    Stage("neighbours", 250, 6, 12, cells=2400, room=0, several=0.0, compared=0.0, probe=1.0, lr=(1.0, 0.3)),
    Stage("both", 170, 6, 12, cells=2400, room=0, several=0.0, compared=0.0, probe=1.0, lr=(1.0, 0.1)),
    Stage("first", 300, 2, 4, cells=240, room=112, vision=0.1),
    Stage("tasks", 300, 3, 8, cells=480, room=128, vision=0.1, lr=(1.0, 0.7)),
    Stage("small", 300, 4, 14, 900, 176, several=0.2, compared=0.2, vision=0.1, lr=(0.7, 0.5), tasks=HARDER),
    Stage("middle", 300, 8, 28, 1800, 224, several=0.2, compared=0.2, vision=0.1, lr=(0.5, 0.3), tasks=HARDER),
    Stage("large", 280, 10, 64, 2600, 256, largest=4096, vision=0.1, lr=(0.3, 0.01), tasks=HARDER),
    Stage("longer", 120, 12, 48, 2400, 256, several=0.2, compared=0.1, vision=0.1, lr=(0.2, 0.01), tasks=HARDER),
    Stage("names", 240, 3, 12, 600, 160, several=0.15, compared=0.35, vision=0.1, lr=(0.5, 0.4), tasks=NAMES),
    Stage("again", 240, 6, 28, 1500, 224, several=0.2, compared=0.2, vision=0.1, lr=(0.4, 0.25), tasks=HARDER),
    Stage("last", 420, 8, 64, 2400, 256, 0.2, 0.15, largest=4096, vision=0.1, lr=(0.25, 0.005), tasks=HARDER),
    Stage("settle", 230, 10, 64, 2400, 288, 0.1, 0.05, largest=4096, vision=0.1, lr=(0.15, 0.002), tasks=SETTLE),
    Stage("sharpen", 760, 12, 64, 2400, 288, 0.15, 0.1, largest=4096, vision=0.1, lr=(0.25, 0.001), **LAST),
    Stage("far", 400, 20, 64, 2400, 768, 0.25, 0.15, largest=4096, vision=0.0, lr=(0.25, 0.1), **LAST),
    Stage("end", 250, 20, 64, 2400, 768, 0.25, 0.15, largest=4096, vision=0.1, lr=(0.1, 0.001), **LAST),
    Stage("all", 160, 8, 64, 2400, 768, 0.2, 0.25, largest=4096, vision=0.0, lr=(0.12, 0.001), **LAST),
    Stage("sight", 300, 12, 64, 2400, 768, 0.2, 0.2, lr=(0.06, 0.001), sharpen=(1.5, 1.0), **FAR),
    Stage("eyes", 160, 28, 64, 2400, 384, 0.2, 0.1, lr=(0.03, 0.0005), text=0.0, sharpen=(1.3, 1.3), **FAR),
    Stage("round", 130, 4, 64, 2400, 384, 0.15, 0.3, lr=(0.03, 0.0005), vision=0.5, **FAR),
    Stage("runs", 110, 16, 64, 2400, 640, 0.1, 0.1, lr=(0.03, 0.0003), vision=0.5, **FAR | {"tasks": RUNS}),
    Stage("near", 60, 12, 64, 2400, 640, 0.15, 0.15, lr=(0.03, 0.0003), vision=0.5, near=2.0, **FAR),
]

MUON_LR, ADAM_LR, WARMUP = 0.02, 2e-3, 20
SAVE_EVERY, VALIDATE_EVERY = 60, 100  # seconds, steps
LARGEST_BATCH = 32  # samples: prompts of tiny boards are mostly template


def draw_scene(rng: np.random.Generator, stage: Stage) -> tuple[Scene, dict[str, float]]:
    kind = rng.random()
    while True:
        rows, cols = (round(2 ** rng.uniform(math.log2(stage.low), math.log2(stage.high))) for _ in range(2))
        if kind < stage.compared:
            scene, tasks = Scene(rows, cols, 2, True), stage.pairs
        elif kind < stage.compared + stage.several:
            scene, tasks = Scene(rows, cols, int(rng.integers(2, 5))), SEVERAL
        else:
            scene, tasks = Scene(rows, cols), stage.tasks
        if scene.cells <= max(stage.cells, stage.largest):
            return scene, tasks


def place(stages: list[Stage], at: int) -> tuple[Stage, int]:
    """The stage of step `at`, counted from 0 over the whole schedule, and how many of its steps are done then."""
    for stage in stages:
        if at < stage.steps:
            return stage, at
        at -= stage.steps
    raise IndexError("the schedule is over")


@dataclass(frozen=True)
class Steps(Dataset):
    """What each step of a schedule sees: the scene and the batch."""

    stages: list[Stage]

    def __getitem__(self, at: int) -> tuple[Scene, Batch]:
        stage, rng = place(self.stages, at)[0], bd.rng_for("train", at)
        scene, tasks = draw_scene(rng, stage)
        samples = min(max(1, stage.cells // scene.cells), LARGEST_BATCH if stage.room else stage.cells)
        return scene, make_batch(rng, scene, samples, tasks, max(stage.room, 24))


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


def step(trainee: Trainee, opts: list, batch: Batch, stage: Stage, done: int) -> tuple[float, dict, Tensor | None]:
    """One update, `done` steps into the stage. Returns the answers' loss, the auxiliary losses and the logits."""
    trainee.requires_grad_(stage.text > 0)
    trainee.model.visual.requires_grad_(stage.vision > 0)
    first, last = stage.lr
    share = last + (first - last) * (1 + math.cos(math.pi * done / stage.steps)) / 2
    for opt, lr in zip(opts, (MUON_LR, ADAM_LR), strict=True):
        for group in opt.param_groups:
            kind = stage.vision if group["vision"] else stage.text
            group["lr"] = lr * share * kind * min(1, (done + 1) / WARMUP)
    if stage.room:
        logits, probes = trainee(batch)
        answers = F.cross_entropy(logits, batch.labels[batch.labels >= 0])
    else:
        logits, answers, probes = None, torch.zeros((), device=batch.ids.device), trainee.see(batch)[1]
    told = sum((stage.see if name in SEEN else 1.0) * loss for name, loss in probes.items())
    (answers + stage.probe * told).backward()
    for opt in opts:
        opt.step()
        opt.zero_grad()
    loss, *values = torch.stack([answers, *probes.values()]).tolist()  # one wait for the device, not one for each
    return loss, dict(zip(probes, values, strict=True)), logits


def train(
    folder: Path, size: str, device: str, start: Path | None = None, first: str | None = None, workers: int = 0
) -> Trainee:
    """Runs what is left of the schedule. State and log are in `folder`, the state at most SAVE_EVERY seconds old.

    Args:
        start: an exported checkpoint to begin with, if there is no state to go on from. The log of earlier stages goes
            on, if it is there.
        first: name of the stage that it begins; the last, if not said.
        workers: processes that draw boards ahead; 0: the step waits for them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    trainee = Trainee(config(**SIZES[size])).to(device)
    opts, at, seconds = optimizers(trainee), 0, 0.0
    end = sum(stage.steps for stage in STAGES)
    if (folder / "state.pt").is_file():
        state = torch.load(folder / "state.pt", map_location=device, weights_only=True)
        if state["size"] != size:
            raise SystemExit(f"{folder} holds a run of --size {state['size']}: choose another folder")
        trainee.load_state_dict(state["trainee"])
        for opt, saved in zip(opts, state["opts"], strict=True):
            opt.load_state_dict(saved)
        at = state["at"]
    elif start:
        trainee.take(from_pretrained(start, dtype=torch.float32, device=device))
        names = [each.name for each in STAGES]
        at = sum(each.steps for each in STAGES[: names.index(first) if first else -1])
    if (folder / "log.jsonl").is_file():
        rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        rows = [row for row in rows if row["step"] <= at]  # later steps run again
        (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        seconds = rows[-1]["seconds"] if rows else 0.0
    bar = tqdm(total=end, initial=at, desc="training", smoothing=0.05)
    batches = DataLoader(Steps(STAGES), batch_size=None, sampler=range(at, end), num_workers=workers)
    validation: dict[int, list[Batch]] = {}
    began = saved = time.perf_counter()
    for scene, batch in batches:
        stage, done = place(STAGES, at)
        if done == 0:
            trainee.sharpen(*stage.sharpen)
            trainee.prefer_near(stage.near)
        batch = batch.to(device)
        loss, probes, logits = step(trainee, opts, batch, stage, done)
        now = time.perf_counter()
        at, seconds, began = at + 1, seconds + now - began, now
        row = {"step": at, "stage": stage.name, "seconds": round(seconds, 1), **asdict(scene), "loss": round(loss, 4)}
        row |= {"probes": {k: round(v, 4) for k, v in probes.items()}}
        if logits is not None:
            row["right"] = exact(logits, batch)
        if stage.room and at % VALIDATE_EVERY == 0:
            tokens = 256 if stage.high < 24 else 1024
            if tokens not in validation:
                validation[tokens] = list(unseen(tokens, 4, "validation"))
            found = evaluate(lambda batch: trainee(batch)[0], validation[tokens], tokens, device)
            row["validation"] = {"visual_tokens": tokens} | {r["task"]: r["accuracy"] for r in found}
        with open(folder / "log.jsonl", "a") as log:
            log.write(json.dumps(row) + "\n")
        bar.set_postfix_str(f"{stage.name} loss {loss:.3f}")
        bar.update()
        if now > saved + SAVE_EVERY or done == stage.steps - 1:
            saved = now
            state = {"trainee": trainee.state_dict(), "opts": [o.state_dict() for o in opts]}
            torch.save(state | {"at": at, "size": size}, folder / "state.tmp")
            (folder / "state.tmp").replace(folder / "state.pt")
    bar.close()
    return trainee


def curve(log: Path, file: Path) -> None:
    """Draws the answers' loss and the share of right answers against the minutes of training."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in log.read_text().splitlines()]
    rows = [row for row in rows if "right" in row]
    minutes = np.array([row["seconds"] for row in rows]) / 60
    figure, (above, below) = plt.subplots(2, 1, figsize=(9, 7), sharex=True)
    above.plot(minutes, [row["loss"] for row in rows], lw=0.6)
    above.set(ylabel="loss, nats per answer token", title=f"{log.parent.name}: training batches")
    window = min(25, len(rows))
    for task in bd.TASKS:
        counts = np.array([row["right"].get(task, (0, 0)) for row in rows], dtype=float)
        summed = np.apply_along_axis(np.convolve, 0, counts, np.ones(window), "valid")
        share = np.divide(summed[:, 0], summed[:, 1], out=np.full(len(summed), np.nan), where=summed[:, 1] > 0)
        below.plot(minutes[window - 1 :], share, label=task, lw=1)
    stages = {row["stage"]: minutes[i] for i, row in reversed(list(enumerate(rows)))}
    for axis in (above, below):
        axis.grid(alpha=0.3)
        for name, start in stages.items():
            axis.axvline(start, color="grey", lw=0.6, ls=":")
            axis.text(start, axis.get_ylim()[1], f" {name}", fontsize=7, va="top")
    below.set(xlabel="minutes", ylabel=f"answers right, {window} steps")
    below.legend(fontsize=7, ncols=5, loc="lower right")
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def export(trainee: Trainee, raw: dict, folder: Path) -> None:
    """Writes the checkpoint folder: config, weights in bf16, tokenizer and image processor."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    save_file(trainee.export(), folder / "model.safetensors", metadata={"format": "pt"})
    save_processing(folder, VOCABULARY, WORD, "{%- set add_vision_id = true %}" + CHAT_TEMPLATE)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="state, log, curve and finally the checkpoint; resumes what it finds")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--start", type=Path, help="an exported checkpoint to begin a stage with")
    parser.add_argument("--stage", choices=[stage.name for stage in STAGES], help="which (default: the last)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--workers", type=int, help="processes that draw boards ahead (default: none on a CPU, else all cores but one)"
    )
    args = parser.parse_args(argv)
    if args.stage and not args.start:
        parser.error("--stage says where a checkpoint begins: name it with --start")
    if args.workers is None:
        args.workers = 0 if args.device == "cpu" else max(1, (os.cpu_count() or 2) - 1)
    trainee = train(args.folder, args.size, args.device, args.start, args.stage, args.workers)
    export(trainee, config(**SIZES[args.size]), args.folder / "checkpoint")
    curve(args.folder / "log.jsonl", args.folder / "curve.png")
    print(f"{args.folder}/checkpoint: now python -m demo.evaluate {args.folder}/checkpoint")


if __name__ == "__main__":
    main()
