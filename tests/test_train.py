"""Training: packed questions are the questions, the evidence is where the answers come from, steps orthogonalise, runs
resume exactly, the export is the model."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from demo import boards as bd
from demo import train
from demo.batches import COMPARED, IMAGE, READS, SEVERAL, SINGLE, Scene, evidence_of, make_batch
from demo.evaluate import answer_logits, evaluate, exact, interval, table, unseen
from demo.muon import Muon, orthogonalise
from demo.trainee import BOARDS, COLOURS, RETRIEVES, Trainee, config, surprise, twin_surprise
from demo.vocabulary import KEY_TOKENS, VOCABULARY, encode
from hybridkv.model import Processor, from_pretrained
from hybridkv.model.rope import inverse_frequencies, rotate
from tests.lab import GPU

TINY = dict(layers=4, heads=4, kv_heads=4, mlp=48, vision=32)


@pytest.fixture(scope="module")
def trainee() -> Trainee:
    torch.manual_seed(0)
    trainee = Trainee(config(**TINY))
    for p in trainee.model.parameters():  # blocks start as the identity: make them do something
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.1)
    return trainee


@pytest.mark.parametrize(
    "scene, tasks", [(Scene(3, 4), SINGLE), (Scene(2, 3, 3), SEVERAL), (Scene(3, 3, 2, True), COMPARED)]
)
def test_packed_questions_get_the_logits_that_each_gets_alone(trainee, tmp_path, scene, tasks):
    """Against the checkpoint that training exports, run on one question at a time, the way inference does."""
    train.export(trainee, config(**TINY), tmp_path)
    model = from_pretrained(tmp_path, dtype=torch.float32, progress=False)
    batch = make_batch(bd.rng_for("train", 1), scene, 2, tasks, 160)
    rounded = Trainee(config(**TINY))
    rounded.load_state_dict({k: v.bfloat16().float() for k, v in trainee.state_dict().items()})
    packed = answer_logits(model, batch)
    labels, at = batch.labels[batch.labels >= 0], 0
    assert len(packed) == len(labels) > 20
    for b in range(2):
        n = scene.n
        side = batch.patches.shape[0] // (2 * n)
        patches, grids = batch.patches[b * n * side : (b + 1) * n * side], batch.grids[b * n : (b + 1) * n]
        for q in range(int(batch.question[b].max()) + 1):
            mine = batch.question[b] == q
            prompt = type("P", (), {})()
            prompt.input_ids = torch.cat([batch.prefix, batch.ids[b][mine]])
            prompt.patches, prompt.grids, prompt.seconds_per_grid = patches, grids, [0.0] * n
            x, positions = model.embed(prompt)
            alone = model.logits(model(x, positions))[0, len(batch.prefix) :][batch.labels[b][mine] >= 0]
            torch.testing.assert_close(packed[at : at + len(alone)], alone, rtol=1e-4, atol=1e-4)
            at += len(alone)
    assert at == len(packed)


def test_the_export_is_the_model_rounded_to_bf16(trainee, tmp_path):
    train.export(trainee, config(**TINY), tmp_path)
    model = from_pretrained(tmp_path, dtype=torch.float32, progress=False)
    batch = make_batch(bd.rng_for("train", 1), Scene(3, 3), 1, SINGLE, 80)
    expected, _ = trainee(batch)
    actual = answer_logits(model, batch)
    error = (actual - expected).norm() / expected.norm()
    assert error < 0.02  # a few roundings to 8 bits, 2^-9 each
    assert actual.shape[1] == len(VOCABULARY)


def test_an_exported_checkpoint_is_taken_over(trainee, tmp_path):
    """Its tables are sums again, and it goes on as the model that it came from."""
    train.export(trainee, config(**TINY), tmp_path)
    model = from_pretrained(tmp_path, dtype=torch.float32, progress=False)
    torch.manual_seed(1)
    taken = Trainee(config(**TINY))
    taken.take(model)
    for sums, weight in ((taken.embed.table(), model.embed_tokens.weight), (taken.head.table(), model.lm_head.weight)):
        # A sum rounded to bfloat16 (half a last bit, 2^-9), then the mean of 48 such rows for each of its two parts.
        assert (sums - weight).abs().max() < 2**-8 * weight.abs().max()
    batch = make_batch(bd.rng_for("train", 1), Scene(3, 3), 1, SINGLE, 80)
    (expected, told), (actual, again) = trainee(batch), taken(batch)
    assert (actual - expected).norm() < 0.02 * expected.norm()
    for name in ("key", "value"):
        written = batch.cells[name][:, 0] < len(bd.GLYPHS)  # how `end` falls into two is not known
        assert written.any() and abs(told[name] - again[name]) < 0.5 * told[name]


def test_sharpening_scales_the_logits_over_a_whole_picture_and_where_heads_retrieve(trainee):
    batch, seen = make_batch(bd.rng_for("train", 1), Scene(8, 8), 1, SINGLE, 80), []

    def logits(block: torch.nn.Module, inputs: tuple) -> None:
        q, k, _ = block.qkv(inputs[0]).unflatten(1, (3, block.num_heads, -1)).unbind(1)
        seen.append(torch.einsum("nhd,mhd->hnm", q, k))

    tower = trainee.model.visual
    windowed, whole = (tower.blocks[i].attn for i in (0, 1))
    hooks = [attn.register_forward_pre_hook(logits) for attn in (windowed, whole)]
    tower(batch.patches, batch.grids)
    q_proj, queries = [layer.self_attn.q_proj for layer in trainee.model.layers], []
    x = torch.randn(3, trainee.model.cfg.hidden_size)
    queries.append([proj(x) for proj in q_proj])
    trainee.sharpen(2.0, 4.0)
    tower(batch.patches, batch.grids)
    queries.append([proj(x) for proj in q_proj])
    trainee.sharpen(0.5, 0.25)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(seen[2], seen[0])
    torch.testing.assert_close(seen[3], 2 * seen[1])
    for i, (before, after) in enumerate(zip(*queries, strict=True)):
        torch.testing.assert_close(after, (4 if i == RETRIEVES else 1) * before)


def test_near_is_a_bonus_that_falls_with_the_distance():
    """On queries and keys that say nothing else, in the layer that sees whole pictures, and only there."""
    trainee = Trainee(config(**TINY | {"vision": 128}))
    tower = trainee.model.visual
    rows, cols = torch.tensor([[0, 0, 40, 127], [0, 3, 5, 1]])
    angles = torch.cat([t[:, None] * inverse_frequencies(16, 1e4) for t in (rows, cols)], 1)[:, None].repeat(1, 1, 2)

    def scores(layer: int) -> torch.Tensor:
        q, k, _ = tower.blocks[layer].attn.qkv.bias.view(3, 1, 4, 32).expand(-1, len(rows), -1, -1)
        q, k = (rotate(t, angles.cos(), angles.sin()) for t in (q, k))
        return torch.einsum("nhd,mhd->hnm", q, k) / 32**0.5

    for block in tower.blocks:
        torch.nn.init.zeros_(block.attn.qkv.bias)
    trainee.prefer_near(2.0)
    slow, (row, col) = 1e4 ** (-3 / 8), (t[:, None] - t for t in (rows, cols))
    expected = 2.0 * ((slow * row).cos() + (slow * col).cos())
    torch.testing.assert_close(scores(1), expected.expand(4, -1, -1), atol=1e-5, rtol=1e-5)
    assert (scores(0) == 0).all() and expected[0, 0] == 4.0 and expected[0, 3] < 1.0


def says(boards: list[bd.Board], cell: bd.Cell, kind: str) -> set[str]:
    """What can be read off a cell."""
    b, r, c = cell
    board = boards[b]
    if kind == "paper":
        return {list(bd.COLOURS)[board.colours[r, c]], str(b + 1)}
    if kind == "name":
        return {bd.name(board.keys[r, c])}
    r, c = r + (kind == "down"), c + (kind == "right")
    if kind == "value":
        return {bd.name(board.values[r, c])}
    rows, cols = board.keys.shape
    return {bd.name(board.keys[r, c]) if r < rows and c < cols else bd.END}


@pytest.mark.parametrize("task", bd.TASKS)
def test_every_word_of_an_answer_is_in_the_question_or_on_its_evidence(task):
    for seed in range(20):
        rng = bd.rng_for("train", seed)
        paired = task in ("compare", "changed")
        boards = bd.make_boards(rng, 2 if paired else 1 + seed % 3, 5, 6, compare=paired)
        question = bd.ask(rng, boards, task)
        words, read = question.answer.split(), evidence_of(question)
        assert len(read) == len(words) + 1 and read[-1] is None
        for word, source in zip(words, read, strict=False):
            asked = question.text.replace("?", "").replace(".", "").split()
            if source is None:
                assert word in asked
            elif isinstance(source[0], int):
                assert READS[source[1]] == "name"
                assert word == [key for key in asked if key in bd.KEYS][source[0]]
            else:
                assert word in says(boards, source[0], READS[source[1]])


@pytest.mark.parametrize(
    "scene, tasks",
    [(Scene(3, 4), SINGLE), (Scene(2, 3, 3), SEVERAL), (Scene(2, 3), {"lookups": 1}), (Scene(2, 3, 2, True), COMPARED)],
)
def test_evidence_is_a_cell_of_the_packed_prompt(scene, tasks):
    """The cell's own targets, found through the place in the prefix, name the labelled token; so does a read word."""
    batch = make_batch(bd.rng_for("train", 3), scene, 3, tasks, 120)
    order = torch.full((len(batch.prefix),), -1)
    order[batch.prefix == IMAGE] = torch.arange(scene.cells)
    b, t = (batch.evidence >= 0).nonzero(as_tuple=True)
    assert len(b) > 20
    for sample, token in zip(b.tolist(), t.tolist(), strict=True):
        kind, label = READS[batch.reads[sample, token]], int(batch.labels[sample, token])
        word = int(batch.evidence[sample, token]) - len(batch.prefix)
        if word >= 0:
            assert kind == "name" and label == batch.ids[sample, word] and word <= token
            assert batch.question[sample, word] == batch.question[sample, token]
            continue
        cell = sample * scene.cells + int(order[batch.evidence[sample, token]])
        if kind == "paper":
            assert label in (COLOURS[batch.cells["colour"][cell, 0]], BOARDS[batch.cells["board"][cell, 0]])
            continue
        first, second = batch.cells["key" if kind == "name" else kind][cell].tolist()
        key = bd.END if first == len(bd.GLYPHS) else bd.GLYPHS[first] + bd.GLYPHS[second]
        assert [label] == encode(f" {key}")


def test_a_twin_is_the_same_cell_on_the_first_board():
    batch = make_batch(bd.rng_for("train", 5), Scene(3, 4, 2, True), 2, COMPARED, 60)
    cells = (batch.prefix == IMAGE).nonzero()[:, 0]
    assert batch.twin[cells[12:]].tolist() == cells[:12].tolist()
    assert (batch.twin >= 0).sum() == 12
    q, k = torch.randn(2, 2, len(batch.prefix), 8)
    wanted = [
        -(q[b, row] @ k[b, : row + 1].T / 8**0.5).log_softmax(0)[batch.twin[row]]
        for b in range(2)
        for row in cells[12:]
    ]
    torch.testing.assert_close(twin_surprise(q, k, batch.twin), torch.stack(wanted).mean())
    assert (make_batch(bd.rng_for("train", 5), Scene(3, 4, 2), 1, SEVERAL, 60).twin < 0).all()


def test_surprise_is_the_negative_log_attention_on_the_evidence():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 6, 4, 8, generator=generator), torch.randn(2, 3, 9, 8, generator=generator)
    mask = torch.rand(2, 1, 4, 9, generator=generator) < 0.8
    # KV heads 0, 1 and 2 are read by query heads 0, 2 and 4, and the last by the last query head, too
    evidence, reads = torch.tensor([[-1, 2, 0, -1], [5, -1, 3, 1]]), torch.tensor([[0, 1, 2, 0], [2, 0, 3, 1]])
    wanted = []
    for b, t in (evidence >= 0).nonzero().tolist():
        mask[b, 0, t, evidence[b, t]] = True
        head, group = ((0, 0), (2, 1), (4, 2), (5, 2))[reads[b, t]]
        logits = q[b, head, t] @ k[b, group].T / 8**0.5
        wanted.append(-logits[mask[b, 0, t]].log_softmax(0)[mask[b, 0, t, : evidence[b, t]].sum()])
    torch.testing.assert_close(surprise(q, k, mask, evidence, reads), torch.stack(wanted).mean())


def test_readings_are_what_a_head_writes_that_looks_at_one_cell():
    """Against the layer's own output projection, with the values of one token in one head and zeros in the others."""
    batch = make_batch(bd.rng_for("train", 2), Scene(2, 2), 1, {"lookup": 1}, 40)
    student = Trainee(config(layers=4, heads=8, kv_heads=4, mlp=48, vision=32))
    o_proj = student.model.layers[RETRIEVES].self_attn.o_proj
    torch.nn.init.normal_(o_proj.weight, std=0.1)
    v = torch.randn(1, 4, len(batch.prefix) + 40, 32)  # (B, H, T, D)
    losses = student.readings(v, batch)

    def said(head: int, values: torch.Tensor) -> torch.Tensor:
        heads = torch.zeros(len(values), 8, 32)
        heads[:, head] = values
        return o_proj(heads.flatten(1))

    cells = v[0][:, : len(batch.prefix)][:, batch.prefix == IMAGE]
    for kind, group, head, target in (
        ("value", 0, 0, "value"),
        ("right", 1, 2, "right"),
        ("down", 2, 4, "down"),
        ("name", 3, 7, "key"),
    ):
        logits = student.head.glyph_logits(said(head, cells[group])).flatten(0, 1)
        torch.testing.assert_close(losses[f"say {kind}"], F.cross_entropy(logits, batch.cells[target].flatten()))
    colour = said(6, cells[3]) @ student.head.table()[COLOURS].T
    torch.testing.assert_close(losses["say colour"], F.cross_entropy(colour, batch.cells["colour"][:, 0]))
    words = (batch.question[0] >= 0) & torch.tensor([int(i) in KEY_TOKENS for i in batch.ids[0]])
    glyphs = torch.tensor([divmod(int(i) - KEY_TOKENS.start, len(bd.GLYPHS)) for i in batch.ids[0, words]])
    logits = student.head.glyph_logits(said(7, v[0, 3, len(batch.prefix) :][words])).flatten(0, 1)
    torch.testing.assert_close(losses["say word"], F.cross_entropy(logits, glyphs.flatten()))


def test_the_exported_processor_makes_the_prompts_of_training(trainee, tmp_path):
    from PIL import Image

    train.export(trainee, config(**TINY), tmp_path)
    processor = Processor.from_pretrained(tmp_path)
    batch = make_batch(bd.rng_for("train", 4), Scene(2, 3, 3), 1, {"which": 1}, 40)
    first = batch.question[0] == 0
    question = bd.Question("", "Which board has AB?", "", [])
    prompt = processor(question.text, images=[Image.new("RGB", (3 * 28, 2 * 28))] * 3)
    assert prompt.input_ids[: len(batch.prefix)].tolist() == batch.prefix.tolist()
    asked = int((batch.labels[0] >= 0).nonzero()[0]) + 1  # the first label stands at the end of the question
    assert len(prompt.input_ids) == len(batch.prefix) + asked and first[:asked].all()


def test_an_answer_counts_only_if_every_token_is_right():
    batch = make_batch(bd.rng_for("train", 0), Scene(3, 3), 2, SINGLE, 120)
    labels = batch.labels[batch.labels >= 0]
    logits = F.one_hot(labels, len(VOCABULARY)).float()
    assert all(right == total for right, total in exact(logits, batch).values())
    questions = int((batch.question.amax(1) + 1).sum())
    assert sum(total for _, total in exact(logits, batch).values()) == questions
    logits[3] = 0  # one token of one answer
    assert sum(right for right, _ in exact(logits, batch).values()) == questions - 1


def test_evaluation_reads_every_task_on_boards_of_its_own(trainee):
    rows = evaluate(lambda batch: trainee(batch)[0], unseen(64, 3, "test"), 64, "cpu")
    assert [row["task"] for row in rows] == list(bd.TASKS)
    assert all(row["boards"] <= 3 and row["accuracy"] < 0.5 for row in rows)
    assert table(rows).count("\n") == len(bd.TASKS) + 1
    assert interval([5, 5], [5, 5]) == (1.0, 1.0) and interval([0, 4], [4, 4])[0] < 0.5 < interval([0, 4], [4, 4])[1]


def test_singular_values_come_close_to_one():
    for shape in ((3, 24, 40), (40, 24), (16, 16)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        values = torch.linalg.svdvals(orthogonalise(x))
        assert values.max() < 1.3 and values.median() > 0.6


def test_muon_is_torchs_muon_without_the_rounding():
    torch.manual_seed(0)
    shapes = [(24, 40), (24, 40), (40, 24)]
    ours = [torch.nn.Parameter(torch.randn(s)) for s in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    start = [p.detach().clone() for p in ours]
    optimizers = Muon(ours, lr=0.05), torch.optim.Muon(theirs, lr=0.05, adjust_lr_fn="original")
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, s in zip(ours, theirs, start, strict=True):
        # bfloat16 keeps 8 bits; five quintic steps amplify its rounding by a small factor.
        assert (a - b).norm() < 0.05 * (b - s).norm()


STAGES = [
    train.Stage("glyphs", 2, 2, 3, cells=18, room=0, probe=1.0),
    train.Stage("first", 3, 2, 3, cells=18, room=64, several=0.3, compared=0.3, vision=0.1, lr=(1.0, 0.5)),
]


@pytest.fixture
def tiny_run(monkeypatch):
    monkeypatch.setattr(train, "STAGES", STAGES)
    monkeypatch.setattr(train, "SIZES", {"tiny": TINY, "other": TINY})
    with torch.enable_grad():
        yield


def test_a_run_that_was_cut_off_ends_like_one_that_was_not(tiny_run, tmp_path, monkeypatch):
    whole = train.train(tmp_path / "whole", "tiny", "cpu")
    calls = iter(range(99))
    make = train.make_batch

    def cut(*args):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return make(*args)

    monkeypatch.setattr(train, "make_batch", cut)
    with pytest.raises(KeyboardInterrupt):
        train.train(tmp_path / "cut", "tiny", "cpu")
    monkeypatch.setattr(train, "make_batch", make)
    resumed = train.train(tmp_path / "cut", "tiny", "cpu")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    ahead = train.train(tmp_path / "ahead", "tiny", "cpu", workers=2)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, ahead.state_dict()[name]), name
    rows = [json.loads(line) for line in (tmp_path / "cut/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    with pytest.raises(SystemExit, match="another folder"):
        train.train(tmp_path / "cut", "other", "cpu")


def test_the_command_leaves_a_checkpoint_and_a_curve(tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "VALIDATE_EVERY", 4)
    monkeypatch.setattr(train, "evaluate", lambda *args: [{"task": "chain", "accuracy": 0.5}])
    train.main([str(tmp_path), "--size", "tiny", "--device", "cpu"])
    model = from_pretrained(tmp_path / "checkpoint", progress=False)
    assert model.dtype == torch.bfloat16 and (tmp_path / "curve.png").stat().st_size > 5000
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "validation" in row] == [4]
    assert "python -m demo.evaluate" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        train.main([str(tmp_path), "--stage", train.STAGES[0].name])
    assert "--start" in capsys.readouterr().err


def test_a_stage_may_begin_with_a_checkpoint(tiny_run, tmp_path, monkeypatch):
    """The last, or the one that is named. The log of the stages before goes on; what the embeddings alone are asked may
    be left out."""
    train.export(train.train(tmp_path / "whole", "tiny", "cpu"), config(**TINY), tmp_path / "checkpoint")
    last = replace(STAGES[1], see=0.0, sharpen=(1.5, 1.2), near=2.0)
    monkeypatch.setattr(train, "STAGES", [STAGES[0], last])
    sharpened = []
    monkeypatch.setattr(Trainee, "sharpen", lambda self, *factors: sharpened.append(factors))
    monkeypatch.setattr(Trainee, "prefer_near", lambda self, nats: sharpened.append(nats))
    folder = tmp_path / "again"
    folder.mkdir()
    (folder / "log.jsonl").write_text("".join(f'{{"step": {n}, "seconds": {100 * n}}}\n' for n in (1, 2, 3)))
    student = train.train(folder, "tiny", "cpu", tmp_path / "checkpoint")
    torch.manual_seed(0)
    assert torch.equal(student.right.weight, Trainee(config(**TINY)).right.weight)  # it was not asked
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5] and sharpened == [(1.5, 1.2), 2.0]
    assert 200 <= rows[2]["seconds"] <= rows[4]["seconds"] < 300
    train.train(tmp_path / "early", "tiny", "cpu", tmp_path / "checkpoint", "glyphs")
    assert json.loads((tmp_path / "early/log.jsonl").read_text().splitlines()[0])["step"] == 1


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_a_batch_is_learned(device):
    """Sixty steps on one batch: the loss of its answers falls below a tenth, with every piece in place."""
    torch.manual_seed(0)
    student = Trainee(config(**TINY)).to(device)
    optimizers = train.optimizers(student)
    stage = train.Stage("one", 60, 2, 2, 8, 64)
    batch = make_batch(np.random.default_rng(0), Scene(2, 2), 2, {"lookup": 1}, 64).to(device)
    with torch.enable_grad():
        losses = [train.step(student, optimizers, batch, stage, i)[0] for i in range(60)]
    assert losses[-1] < 0.1 * losses[0]


def test_a_stage_may_keep_the_vision_tower_or_the_rest_as_it_is():
    torch.manual_seed(0)
    student = Trainee(config(**TINY))
    optimizers = train.optimizers(student)
    batch = make_batch(np.random.default_rng(0), Scene(2, 2), 2, {"lookup": 1}, 64)

    def changed(vision: float, text: float) -> dict[str, bool]:
        before = {name: p.clone() for name, p in student.named_parameters()}
        with torch.enable_grad():
            train.step(student, optimizers, batch, train.Stage("one", 60, 2, 2, 8, 64, vision=vision, text=text), 20)
        return {name: not torch.equal(p, before[name]) for name, p in student.named_parameters()}

    for vision, text in ((1.0, 1.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0)):
        moved = changed(vision, text)
        tower = {name for name in moved if name.startswith("model.visual.")}
        assert any(moved[name] for name in moved.keys() - tower) == (text > 0)
        assert any(moved[name] for name in tower) == (vision > 0)
