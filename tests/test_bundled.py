"""The bundled, trained model: transformers agrees with it, the demos come out right, and compression keeps answers."""

import functools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.tasks import board_case
from demo import boards as bd
from demo import neighbours
from demo.batches import Scene, make_batch
from hybridkv import Engine, HybridConfig, demos
from hybridkv.model import Processor, from_pretrained
from hybridkv.planning.variants import reversed_focus
from tests.test_parity import TOLERANCE, ours, reference_inputs

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def bundled():
    return from_pretrained(demos.MODEL, dtype=torch.float32, progress=False), Processor.from_pretrained(demos.MODEL)


def answers(bundled, prompts: list, policy: str, **config) -> list[str]:
    model, processor = bundled
    engine = Engine(model, HybridConfig(**config), policy, eos=model.cfg.eos_token_id, compile=False)
    return [processor.decode(result.token_ids).strip() for result in engine.generate(prompts, 40)]


def test_transformers_opens_the_folder_and_gives_the_same_logits(bundled):
    from transformers import Qwen2_5_VLForConditionalGeneration

    model, processor = bundled
    reference = Qwen2_5_VLForConditionalGeneration.from_pretrained(demos.MODEL, dtype=torch.float32).eval()
    for name in ("lookup", "chain"):
        demo = demos.by_name()[name]
        prompt = processor(demo.prompt, images=demo.images)
        expected = reference(**reference_inputs(model, prompt)).logits
        scale = expected.std()
        torch.testing.assert_close(ours(model, prompt) / scale, expected / scale, rtol=0, atol=TOLERANCE)


def test_weights_fit_and_the_head_mix_is_what_the_card_says(bundled):
    model, _ = bundled
    assert (demos.MODEL / "model.safetensors").stat().st_size <= 16_000_000
    assert model.cfg.num_hidden_layers >= 8 and model.cfg.num_key_value_heads >= 4


@pytest.mark.parametrize("name", sorted(demos.by_name()))
def test_every_demo_is_answered_right_with_the_full_cache(bundled, name):
    demo = demos.by_name()[name]
    prompt = bundled[1](demo.prompt, images=demo.images)
    assert answers(bundled, [prompt], "dense") == [demo.answer]


def cases(bundled, task: str, tokens: int, n: int) -> list:
    return [board_case(bundled[1], task, tokens, i, "validation") for i in range(n)]


def test_a_budget_of_one_is_the_full_cache(bundled):
    prompts = [case.prompt for task in ("chain", "lookup") for case in cases(bundled, task, 256, 3)]
    assert answers(bundled, prompts, "hybridkv", budget=1.0) == answers(bundled, prompts, "dense")


@pytest.fixture(scope="module")
def known(bundled):
    """A function from a task to those of 10 questions over 1,024 cells that the full cache answers right."""

    @functools.cache
    def of(task: str) -> list:
        wanted = cases(bundled, task, 1024, 10)
        texts = answers(bundled, [case.prompt for case in wanted], "dense")
        right = [case for case, text in zip(wanted, texts, strict=True) if case.right(text)]
        assert len(right) >= 5
        return right

    return of


def share_kept(bundled, asked: list, policy="hybridkv", **config) -> float:
    """How many of these a policy answers right, too."""
    texts = answers(bundled, [case.prompt for case in asked], policy, **config)
    return sum(case.right(text) for case, text in zip(asked, texts, strict=True)) / len(asked)


def test_pruning_keeps_what_the_question_names_and_loses_what_the_answer_leads_to(bundled, known):
    assert share_kept(bundled, known("lookup"), budget=0.1, dynamic_share=0.0) >= 0.8
    assert share_kept(bundled, known("chain"), budget=0.2, dynamic_share=0.0) <= 0.2


def test_a_tenth_of_the_cache_keeps_chains_where_the_right_heads_retrieve(bundled, known):
    """The default finds the heads that follow pointers; taking the others instead loses every chain."""
    assert share_kept(bundled, known("chain"), budget=0.1) >= 0.7
    assert share_kept(bundled, known("chain"), reversed_focus, budget=0.1) <= 0.2


def test_the_pictures_are_those_that_the_seeds_draw():
    """The bundled files stand for what `python -m demo.pictures` makes, as far as questions and answers go."""
    from demo.pictures import DEMOS

    for name, (_, task, rows, cols, n, seed) in DEMOS.items():
        rng = bd.rng_for("demo", seed)
        boards = bd.make_boards(rng, n, rows, cols, compare=task in ("compare", "changed"))
        question = bd.ask(rng, boards, task)
        demo = demos.by_name()[name]
        assert (demo.prompt, demo.answer, len(demo.images)) == (question.text, question.answer, n)


def run(*args: str) -> subprocess.CompletedProcess:
    """The command in a process of its own, with two threads, as nothing else here has."""
    command = [sys.executable, "-m", "hybridkv.generate", *args]
    threads = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}  # a thread that waits takes no time from others
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | threads)


def test_without_arguments_both_caches_answer_a_bundled_question():
    done = run()
    assert done.returncode == 0, done.stderr
    demo = demos.by_name()[demos.DEFAULT]
    assert f"question: {demo.prompt}" in done.stdout
    assert done.stdout.count(demo.answer) == 3  # the right answer, and each cache's
    for part in ("compiling the decoding step", "hybridkv 0.1", "full", "read/step", "ms/token"):
        assert part in done.stderr


def test_demos_by_name_and_as_json():
    done = run("--list-demos")
    assert done.returncode == 0 and [line.split()[0] for line in done.stdout.splitlines()] == list(demos.by_name())
    done = run("--demo", "lookup", "--no-compile", "--json")
    hybrid, full = (json.loads(line) for line in done.stdout.splitlines())
    assert hybrid["text"] == full["text"] and hybrid["text"].strip() == demos.by_name()["lookup"].answer
    assert hybrid["step_bytes"] < 0.12 * full["full_bytes"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--demo", "nothing"], "there is no demo 'nothing'; there are lookup"),
        (["--demo", "chain", "--prompt", "?"], "brings its own"),
        (["--prompt", "?"], "--model is missing"),
        (["--model", "demo"], "--prompt is missing"),
    ],
)
def test_bad_demo_arguments_get_one_line(arguments, message, capsys):
    from hybridkv import generate

    with pytest.raises(SystemExit) as exit:
        generate.main(arguments)
    err = capsys.readouterr().err
    assert exit.value.code == 2 and message in err and err.count("\n") == 1


def test_neighbours_are_read_and_those_of_another_board_are_not(bundled, capsys):
    model, scene = bundled[0], Scene(12, 12)
    one, other = (make_batch(bd.rng_for("validation", i), scene, 1, {"lookup": 1.0}, 24) for i in (0, 1))
    for kind, wrong in neighbours.misread(model, one, scene).items():
        keys = one.cells["key"].view(12, 12, 2)[..., 0] < len(bd.GLYPHS)
        both = keys[:, :-1] & keys[:, 1:] if kind == "right" else keys[:-1] & keys[1:]
        assert (~wrong.isnan()).sum() == both.sum() > 20 and wrong.nanmean() < 0.05
    for wrong in neighbours.misread(model, replace(one, pixels=other.pixels), scene).values():
        assert wrong.nanmean() > 0.9
    neighbours.main([str(demos.MODEL), "--sides", "8", "--boards", "1"])
    assert "| 8 x 8 | down |" in capsys.readouterr().out
