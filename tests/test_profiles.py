"""The built-in calibration: its samples, what it measures, and where that is kept."""

import json
import os
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from demo.tiny_vlm import config as tiny_config
from demo.tiny_vlm import random_model
from hybridkv import HeadProfile, HybridConfig, builtin_profile, demos, generate, options, profiles
from hybridkv.fingerprint import fingerprint
from hybridkv.model import Processor, from_pretrained
from hybridkv.planning import need, samples
from tests.lab import prompt


@pytest.fixture(scope="module")
def tiny():
    return random_model(tiny_config(layers=2, hidden_size=96, heads=6, kv_heads=2, head_dim=16, tie=False))


@pytest.fixture(scope="module")
def processor(vlm) -> Processor:
    return Processor.from_pretrained(vlm)


@pytest.fixture(scope="module")
def model(vlm):
    return from_pretrained(vlm, progress=False)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Contexts and pictures of a quarter of the size; fewer tokens."""
    monkeypatch.setattr(samples, "TOKENS", 300)
    monkeypatch.setattr(profiles, "NEW_TOKENS", 3)


# Samples


@pytest.mark.parametrize("sample", [*samples.TEXTS, *samples.PICTURES], ids=lambda sample: sample.name)
def test_samples_are_the_same_at_every_run_and_their_answers_lie_in_the_context(sample, processor):
    prompt, answer = samples.make(sample, processor)
    again, same = samples.make(sample, processor)
    assert torch.equal(prompt.input_ids, again.input_ids) and answer == same and len(answer) > 12
    text = processor.decode(answer)
    if sample.line:
        assert all(line in processor.decode(prompt.input_ids.tolist()) for line in text.splitlines())
        assert 150 < int(prompt.prunable.sum()) < 1500
    else:
        _, entries = samples.draw_page(random.Random(sample.name))
        assert set(text.splitlines()) <= set(entries) and prompt.visual_tokens == 1024


def test_the_bundled_model_brings_a_profile_of_its_shape():
    cfg = Processor.from_pretrained(demos.MODEL).cfg
    profile = profiles.brought_profile(demos.MODEL)
    assert profile.need.shape == (cfg.num_hidden_layers, cfg.num_key_value_heads)


# Need


def test_need_does_not_depend_on_how_many_heads_share_a_batch(tiny):
    config = HybridConfig(budget=0.3, strict=False)
    whole = need.measure_heads(tiny, prompt(300, 0), config, 5)
    by_one = need.measure_heads(tiny, prompt(300, 0), config, 5, at_once=1)
    torch.testing.assert_close(whole.need, by_one.need, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(whole.visual, by_one.visual, rtol=1e-3, atol=1e-6)
    assert (whole.need > 1e-6).all()


def test_an_answer_is_followed_token_by_token(tiny):
    config, read = HybridConfig(budget=0.3, strict=False), prompt(300, 0)
    own = need.measure_heads(tiny, read, config, 4)
    other = need.measure_heads(tiny, read, config, 4, answer=[7, 7, 7, 7, 7, 7])
    shorter = need.measure_heads(tiny, read, config, 4, answer=[7, 7, 7, 7])
    assert torch.equal(other.need, shorter.need) and not torch.allclose(own.need, other.need, rtol=0.01)
    assert need.measure_heads(tiny, read, config, 4, answer=[]) is None
    assert need.measure_heads(tiny, read, config, 4, eos=range(1000)) is None  # ends before it begins


def test_profiles_join_prompt_by_prompt():
    one = HeadProfile(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.5]]), prompts=1)
    three = HeadProfile(torch.tensor([[0.0, 2.0]]), torch.tensor([[0.1, 0.5]]), prompts=3)
    both = HeadProfile.join([one, three], "name")
    torch.testing.assert_close(both.need, torch.tensor([[0.25, 1.5]]))
    torch.testing.assert_close(both.visual, torch.tensor([[0.2, 0.5]]))
    assert (both.prompts, both.model) == (4, "name")


# Fingerprints


def test_a_fingerprint_is_that_of_the_weights(tiny):
    a = random_model(tiny_config(layers=2), seed=3).to(torch.bfloat16)
    assert fingerprint(a) == fingerprint(a.float())
    assert fingerprint(a) == fingerprint(random_model(tiny_config(layers=2), seed=3))
    assert fingerprint(a) != fingerprint(random_model(tiny_config(layers=2), seed=4))
    assert fingerprint(a) != fingerprint(tiny)
    trained = random_model(tiny_config(layers=2), seed=3)
    trained.layers[1].mlp.down_proj.weight.mul_(1.05)
    assert fingerprint(a) != fingerprint(trained)
    stretched = random_model(tiny_config(layers=2), seed=3)
    stretched.cfg = replace(stretched.cfg, rope_theta=5e5)
    assert fingerprint(a) != fingerprint(stretched)


# The cache folder


def count_measured(monkeypatch, stop_at: int | None = None) -> list[str]:
    """What is measured from now on; the `stop_at`-th is interrupted."""
    measured, measure = [], profiles._measure

    def counted(model, processor, sample):
        measured.append(sample.name)
        if len(measured) == stop_at:
            raise KeyboardInterrupt
        return measure(model, processor, sample)

    monkeypatch.setattr(profiles, "_measure", counted)
    return measured


def test_a_profile_is_measured_once_and_a_run_that_was_cut_off_goes_on(model, processor, tmp_path, monkeypatch):
    names = [sample.name for sample in samples.TEXTS + samples.PICTURES]
    measured = count_measured(monkeypatch, stop_at=3)
    with pytest.raises(KeyboardInterrupt):
        builtin_profile(model, processor, tmp_path, progress=False)
    first = builtin_profile(model, processor, tmp_path, progress=False)
    assert measured == [*names[:3], *names[2:]]
    assert first.prompts == len(names) and first.need.shape == (2, 2)
    assert [file.suffix for file in tmp_path.iterdir()] == [".json"]  # the parts are gone, and nothing half written
    again = builtin_profile(model, processor, tmp_path, before=lambda: pytest.fail("measured again"))
    assert torch.equal(first.need, again.need) and len(measured) == len(names) + 1
    (file,) = tmp_path.iterdir()
    file.write_text(file.read_text()[:50])  # a full disk of somebody else's program, say
    assert torch.equal(builtin_profile(model, processor, tmp_path, progress=False).need, first.need)
    assert HeadProfile.load(file).prompts == len(names)


def test_a_folder_that_can_not_be_written_to_is_no_error(model, processor, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(samples, "TEXTS", samples.TEXTS[:1])
    monkeypatch.setattr(samples, "PICTURES", [])
    assert builtin_profile(model, processor, tmp_path / "file" / "below", progress=False).prompts == 1
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_samples_that_a_model_can_not_be_asked_are_left_out(model, processor, tmp_path, monkeypatch):
    def no_pictures(text, images=(), context=""):
        if images:
            raise ValueError("no place for pictures")
        return processor(text, context=context)

    class Partly(SimpleNamespace):
        def __call__(self, *args, **options):
            return no_pictures(*args, **options)

    partly = Partly(tokenizer=processor.tokenizer, cfg=processor.cfg)
    monkeypatch.setattr(samples, "TEXTS", samples.TEXTS[:1])
    assert builtin_profile(model, partly, tmp_path, progress=False).prompts == 1
    short = Partly(tokenizer=processor.tokenizer, cfg=replace(processor.cfg, max_position_embeddings=64))
    assert builtin_profile(model, short, tmp_path / "other", progress=False) is None


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("x"), MemoryError(), ValueError("not finite")])
def test_a_model_that_can_not_be_measured_retrieves_in_all_layers_and_a_note_says_so(
    error, vlm, tmp_path, monkeypatch, capsys
):
    def fail(*args, **options):
        raise error

    monkeypatch.setenv("HYBRIDKV_CACHE", str(tmp_path))
    monkeypatch.setattr(profiles, "measure_heads", fail)
    generate.main(
        ["--model", str(vlm), "--prompt", "?" * 200, "--no-compile", "--max-new-tokens", "2", "--budget=0.99"]
    )
    assert "can't be asked any of the samples: all layers retrieve" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_where_the_cache_folder_is(monkeypatch):
    assert profiles.cache_folder() == Path(os.environ["HYBRIDKV_CACHE"])  # conftest.py
    monkeypatch.delenv("HYBRIDKV_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert profiles.cache_folder() == Path("/somewhere/hybridkv")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/nobody")
    assert profiles.cache_folder() == Path("/home/nobody/.cache/hybridkv")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])  # a container's user, say
    assert not profiles.cache_folder().exists()


# The command


def test_the_command_measures_once_and_says_so(vlm, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HYBRIDKV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(samples, "PICTURES", [])
    (tmp_path / "context.txt").write_text("The cache grew and grew. " * 20)
    given = []
    engine = generate.Engine

    def kept(model, config, *more, **named):
        given.append(config)
        return engine(model, config, *more, **named)

    monkeypatch.setattr(generate, "Engine", kept)
    command = ["--model", str(vlm), "--context", str(tmp_path / "context.txt"), "--prompt", "?", "--no-compile"]
    command += ["--json", "--max-new-tokens", "2", "--budget", "0.5"]
    layers = []
    for more, notes in (["--no-calibration"], 0), (["--policy", "snapkv"], 0), (["--budget=1"], 0), ([], 1), ([], 0):
        generate.main([*command, *more])
        out, err = capsys.readouterr()
        assert err.count("note: measuring which layers") == err.count("\n") == notes
        layers.append(json.loads(out)["retrieving_layers"])
    assert layers == [2, 0, 0, 2, 2]
    assert [config.head_profile is not None for config in given] == [False, False, False, True, True]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_profile_that_a_checkpoint_brings_is_used_or_refused(vlm, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in vlm.iterdir():
        (folder / file.name).symlink_to(file)
    command = ["--model", str(folder), "--prompt", "?" * 200, "--no-compile", "--max-new-tokens", "2", "--budget=0.99"]
    HeadProfile(torch.ones(2, 2), torch.ones(2, 2)).save(folder / profiles.BROUGHT)
    monkeypatch.setattr(options, "builtin_profile", lambda *args, **options: pytest.fail("measured"))
    generate.main(command)
    assert "note: measuring" not in capsys.readouterr().err
    (folder / profiles.BROUGHT).write_text("{}")
    with pytest.raises(SystemExit) as stop:
        generate.main(command)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "is not a head profile" in err and err.count("\n") == 1
