"""The boards: every answer against a slow reader of the same boards, pictures against the image processor, words
against the tokenizer."""

import hashlib
import json
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from demo import boards as bd
from demo.batches import patchify
from demo.trainee import SIZES, config
from demo.vocabulary import KEY_TOKENS, VOCABULARY, WORD, encode
from hybridkv.model.config import parse_config
from hybridkv.model.processing import Processor
from tests.lab import examples


def make(seed: int, task: str, rows: int, cols: int, n: int) -> tuple[list[bd.Board], bd.Question]:
    rng = bd.rng_for("train", seed)
    paired = task in ("compare", "changed")
    boards = bd.make_boards(rng, 2 if paired else n, rows, cols, compare=paired)
    return boards, bd.ask(rng, boards, task, hard=bool(seed % 2))


def read(boards: list[bd.Board]) -> dict[str, list[tuple[int, int, int]]]:
    """Where each key stands."""
    where = {}
    for b, board in enumerate(boards):
        for r, c in np.ndindex(board.keys.shape):
            if board.keys[r, c] >= 0:
                where.setdefault(bd.KEYS[board.keys[r, c]], []).append((b, r, c))
    return where


def solve(boards: list[bd.Board], question: str) -> str:
    """Reads the question as a person would."""
    where = read(boards)
    words = question.replace("?", "").replace(".", "").split()

    def points(cell) -> str:
        value = boards[cell[0]].values[cell[1:]]
        return "end" if value < 0 else bd.KEYS[value]

    def colour(cell) -> str:
        return list(bd.COLOURS)[boards[cell[0]].colours[cell[1:]]]

    if question == "What changed?":
        (cell,) = [cells for cells in where.values() if points(cells[0]) != points(cells[1])]
        key = bd.KEYS[boards[0].keys[cell[0][1:]]]
        return f"{key} {points(cell[0])} {points(cell[1])}"
    keys = [w for w in words if w in where]
    first = where[keys[0]][0]
    match words[0]:
        case "Where":
            return " ".join(f"{k} {points(where[k][0])}" for k in keys)
        case "What":
            return f"{keys[0]} {colour(first)}"
        case "Which":
            return f"{keys[0]} {first[0] + 1}"
        case "Compare":
            return f"{keys[0]} {points(first)} {points(where[keys[0]][1])}"
        case "Follow":
            seen = [keys[0]]
            while seen[-1] != "end":
                seen.append(points(where[seen[-1]][0]))
            return " ".join(seen)
    answer, (b, r, c) = [], first
    while True:
        inside = r < boards[b].keys.shape[0] and c < boards[b].keys.shape[1]
        if not inside or boards[b].keys[r, c] < 0:
            return " ".join([*answer, "end"])
        answer.append(bd.KEYS[boards[b].keys[r, c]])
        if words[0] == "Describe":
            answer += [colour((b, r, c)), points((b, r, c))]
        r, c = (r + 1, c) if words[1] == "down" else (r, c + 1)


sides = st.integers(2, 12)


@examples(150)
@given(st.integers(0, 10**6), st.sampled_from(bd.TASKS), sides, sides, st.integers(1, 4))
def test_answers_are_what_a_reader_of_the_boards_finds(seed, task, rows, cols, n):
    boards, question = make(seed, task, rows, cols, n)
    assert question.answer == solve(boards, question.text)
    for b, r, c in question.evidence:
        assert boards[b].keys[r, c] >= 0
    copies = 2 if task in ("compare", "changed") else 1
    assert all(len(cells) == copies for cells in read(boards).values())


def test_a_large_board_has_no_key_twice():
    (board,) = bd.make_boards(bd.rng_for("train", 0), 1, 64, 64)
    keys = Counter(board.keys[board.keys >= 0].tolist())
    assert max(keys.values()) == 1 and 0.4 * 4096 < len(keys) <= len(bd.KEYS)


def test_splits_share_nothing_and_the_version_stands_for_the_content():
    """If this digest changes, the same seed gives another sample: raise boards.VERSION, and train again."""
    samples = [make_text(split, i) for split in bd.SPLITS for i in range(20)]
    assert len(set(samples)) == len(samples)
    digest = hashlib.sha256("\n".join(samples).encode()).hexdigest()[:16]
    assert (bd.VERSION, digest) == (1, "92d84e6d4476bb2e")


def make_text(split: str, index: int) -> str:
    task = bd.TASKS[index % len(bd.TASKS)]
    sample = bd.make_sample(split, index, task, 6, 6)
    assert sample.seed == (bd.VERSION, bd.SPLITS.index(split), index)
    assert all(image.size == (6 * bd.CELL, 6 * bd.CELL) for image in sample.images)
    return f"{sample.question.text} {sample.question.answer}"


def test_tasks_that_do_not_fit_the_boards_are_refused():
    boards = bd.make_boards(bd.rng_for("train", 0), 1, 4, 4)
    with pytest.raises(ValueError, match="can't be asked"):
        bd.ask(bd.rng_for("train", 0), boards, "changed")
    with pytest.raises(ValueError, match="unknown task"):
        bd.ask(bd.rng_for("train", 0), boards, "count")


@pytest.fixture(scope="module")
def processor(tmp_path_factory) -> Processor:
    from demo.tiny_vlm import save_processing

    folder = tmp_path_factory.mktemp("boards")
    (folder / "config.json").write_text(json.dumps(config(2, 4, 2, 64, 64)))
    save_processing(folder, VOCABULARY, WORD)
    return Processor.from_pretrained(folder)


@pytest.mark.parametrize("plain", [False, True])
def test_training_sees_what_the_image_processor_makes(processor, plain):
    rng = bd.rng_for("train", 3)
    (board,) = bd.make_boards(rng, 1, 5, 7)
    pixels = bd.draw(rng, board, plain)
    prompt = processor("Follow it.", images=[Image.fromarray(pixels)])
    assert prompt.grids == [(1, 10, 14)]
    torch.testing.assert_close(patchify(torch.from_numpy(pixels)[None]), prompt.patches, rtol=0, atol=1e-6)


def test_no_board_is_drawn_in_fewer_fonts_than_others_have(monkeypatch):
    """Other fonts draw other random numbers: without matplotlib, training would see other boards, and say nothing."""
    bd.fonts.cache_clear()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    rng = bd.rng_for("train", 0)
    (board,) = bd.make_boards(rng, 1, 3, 3)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        bd.draw(rng, board)


def test_every_glyph_of_every_font_is_drawn_inside_its_patch():
    """A glyph that leaves its 14 x 14 pixels would be cut: the ink of the unshifted ones stays off the rim."""
    for font in bd.fonts():
        for size in (10, 11, 12):
            ink = bd.atlas(font, size)
            assert ink[-1].max() == 0
            assert (ink[:-1, 1, 1].sum((1, 2)) > 5).all()
            flat = ink[:-1, 1, 1].reshape(len(bd.GLYPHS), -1)
            distance = ((flat[:, None] - flat[None]) ** 2).sum(-1) + 99 * np.eye(len(flat))
            assert distance.min() > 0.5  # no two look the same


@examples(60)
@given(st.integers(0, 10**6), st.sampled_from(bd.TASKS))
def test_fast_encoding_is_the_tokenizers(processor, seed, task):
    _, question = make(seed, task, 4, 4, 2)
    for text in (question.text, f" {question.answer}"):
        ids = encode(text)
        assert processor.tokenizer(text)["input_ids"] == ids
        assert processor.decode(ids) == text
        assert min(ids) >= 256 or text == question.text  # whole words; the question's last mark is a byte


def test_words_nobody_trained_fall_back_to_bytes(processor):
    text = "Größe of the Xylophone?\n"
    assert processor.decode(processor.tokenizer(text)["input_ids"]) == text
    assert [VOCABULARY[i][1:] for i in KEY_TOKENS][:2] == ["AA", "AB"]


def test_both_sizes_are_valid_configurations():
    groups = {}
    for name, size in SIZES.items():
        cfg = parse_config(config(**size))
        assert cfg.hidden_size == cfg.num_attention_heads * cfg.head_dim  # what transformers insists on
        groups[name] = cfg.num_attention_heads // cfg.num_key_value_heads
    assert any(g & (g - 1) for g in groups.values())
