"""What is said of a cache before there is one is what its tensors take."""

import json

import pytest
import torch

from demo.tiny_vlm import config as tiny_config
from demo.tiny_vlm import random_model
from hybridkv import BudgetError, Engine, HeadProfile, HybridConfig, estimate
from hybridkv.estimate import Question, largest, memory, weight_bytes
from hybridkv.model.config import load_config
from tests.lab import prompt

RAW = tiny_config(layers=4, hidden_size=96, heads=6, kv_heads=2, head_dim=16, tie=False)
DECODER_7B = dict(
    model_type="qwen2", vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
    num_attention_heads=28, num_key_value_heads=4, rms_norm_eps=1e-6, rope_theta=1e6, max_position_embeddings=131072,
    tie_word_embeddings=False, hidden_act="silu",
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return random_model(RAW)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(DECODER_7B))
    return tmp_path


@pytest.mark.parametrize("store", ["host", "device"])
@pytest.mark.parametrize("tokens, budget, keep_new, batch", [(900, 0.3, None, 1), (1500, 0.2, 20, 2), (700, 0.5, 5, 3)])
def test_it_is_what_the_engine_holds(model, store, tokens, budget, keep_new, batch):
    need = torch.arange(8.0).view(4, 2)
    config = HybridConfig(budget=budget, store=store, keep_new=keep_new, head_profile=HeadProfile(need, need))
    engine = Engine(model, config, compile=False)
    asked = [prompt(tokens, seed) for seed in range(batch)]
    engine.take_in(asked, 40)
    held = engine.cache.count_bytes()
    always = int((~asked[0].prunable).sum()) - config.sinks
    found = Question(model.cfg, config, torch.float32, tokens, batch, 40, always).ours()
    assert (found.device_bytes, found.host_bytes, found.step_bytes) == (held.allocated, held.host, held.step)
    full = Question(model.cfg, config, torch.float32, tokens, batch, 40, always).full()
    assert full.step_bytes == held.full
    assert weight_bytes(model.cfg, torch.float32) == sum(p.nbytes for p in model.parameters())


def test_the_7b_at_a_tenth(folder, capsys):
    """The figures in docs/command-line.md."""
    estimate.main([str(folder), "--tokens", "30000", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert round(found["full"]["device_bytes"] / 1e9, 2) == 1.73
    assert [round(found["ours"][name] / 1e6) for name in ("device_bytes", "host_bytes")] == [178, 438]


def test_what_fits(folder, capsys):
    """One more would not fit, nor would a longer prompt."""
    asked = [str(folder), "--tokens", "8192", "--memory", "17GB"]
    estimate.main([*asked, "--json"])
    found = json.loads(capsys.readouterr().out)
    room = 17 * 10**9 - found["weight_bytes"]
    cfg = load_config(folder)
    for kind, config in (("full", HybridConfig(store="host")), ("ours", HybridConfig(store="host"))):
        batch, tokens = found[kind]["largest_batch"], found[kind]["largest_tokens"]
        sizes = [
            getattr(Question(cfg, config, torch.bfloat16, 8192, n), kind)().device_bytes for n in (batch, batch + 1)
        ]
        assert sizes[0] <= room < sizes[1]
        if tokens + 128 < cfg.max_position_embeddings:
            assert getattr(Question(cfg, config, torch.bfloat16, tokens), kind)().device_bytes <= room
    assert found["ours"]["largest_batch"] > 5 * found["full"]["largest_batch"] > 0
    estimate.main(asked)
    out = capsys.readouterr().out
    assert "largest batch" in out and "hybridkv 0.1" in out
    assert load_config(folder) == cfg and largest(lambda n: n <= 37) == 37 and largest(lambda n: False) == 0


@pytest.mark.parametrize(
    "options, message",
    [
        (["--tokens", "120"], "can't be met"),
        (["--tokens", "30"], "leaves nothing"),
        (["--tokens", "8192", "--memory", "1GB"], "the weights alone take 15.2 GB"),
        (["--tokens", "8192", "--memory", "much"], "bytes such as 24GB"),
        (["--tokens", "8192", "--new-chunks", "2"], r"must lie in [0, 1]"),
        (["--tokens", "8192", "--budget", "2"], "budget must lie in"),
        (["--tokens", "8192", "--batch", "4097"], "--batch must be 4096 at most"),
        (["--tokens", "1000000"], "1000000 tokens and 128 new ones are more than"),
    ],
)
def test_bad_questions(folder, options, message, capsys):
    with pytest.raises(SystemExit) as stop:
        estimate.main([str(folder), *options])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_names(monkeypatch, folder, capsys):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file: str(folder / file))
    estimate.main(["someone/some-model", "--tokens", "4096"])
    assert "weights 15.2 GB" in capsys.readouterr().out

    def fail(name, file):
        raise ConnectionError("no connection\nand more")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    for name, message in (("someone/some-model", "no connection"), ("nothing here", "neither a folder")):
        with pytest.raises(SystemExit):
            estimate.main([name, "--tokens", "4096"])
        assert message in capsys.readouterr().err


def test_short_prompts_that_are_kept_whole(capsys):
    """The bundled model, by the name that other commands know it by."""
    for tokens, whole in ((90, True), (4000, False)):
        estimate.main(["demo", "--tokens", str(tokens)])
        out, err = capsys.readouterr()
        assert "hybridkv 0.1" in out
        assert (
            err.startswith("note: nothing is pruned: the 68 of 90 tokens that every head keeps") == whole == bool(err)
        )
        estimate.main(["demo", "--tokens", str(tokens), "--json"])
        out, err = capsys.readouterr()
        assert json.loads(out)["ours"]["everything_kept"] == whole and not err
    estimate.main(["demo", "--tokens", "90", "--budget", "1"])  # as asked for
    assert not capsys.readouterr().err


def test_sizes_of_memory():
    assert [memory(text) for text in ("24GB", "1.5 TB", "100", "3kB")] == [24 * 10**9, 1500 * 10**9, 100, 3000]


def test_a_budget_too_small_is_refused_as_by_the_cache(model):
    with pytest.raises(BudgetError):
        Question(model.cfg, HybridConfig(budget=0.01), torch.float32, 900).ours()
