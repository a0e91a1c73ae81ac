"""The engine: batches, stops, sampling, statistics, and use from other code bases. Uncompiled."""

import runpy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.torch_version import TorchVersion

from demo.tiny_vlm import config as tiny_config
from demo.tiny_vlm import random_model
from hybridkv import Engine, HybridCache, HybridConfig, Sampling
from hybridkv import engine as decode
from hybridkv.cache.attention import WIDE, check_pool
from hybridkv.planning.head_profile import HeadProfile
from hybridkv.sampling import sample
from tests.lab import prompt

NANOGPT = Path(__file__).parent.parent / "examples" / "nanogpt.py"


@pytest.fixture(scope="module")
def model():
    return random_model(tiny_config(layers=2, hidden_size=96, heads=6, kv_heads=2, head_dim=16, tie=False))


@pytest.mark.parametrize("policy", ["hybridkv", "full", "dense"])
def test_a_batch_answers_like_each_prompt_alone(model, policy):
    """Different lengths, limits and ends; each its own plan."""
    config, prompts, limits = HybridConfig(budget=0.4), [prompt(n, n) for n in (400, 150, 260)], [30, 12, 21]
    alone = [
        Engine(model, config, policy, compile=False).generate([p], n)[0] for p, n in zip(prompts, limits, strict=True)
    ]
    ends = [alone[0].token_ids[10]]  # some token that ends the first early
    together = Engine(model, config, policy, eos=ends, compile=False).generate(prompts, limits)
    for one, many in zip(alone, together, strict=True):
        expected = one.token_ids
        if ends[0] in expected:
            expected = expected[: expected.index(ends[0])]
        assert many.token_ids == expected
        assert many.finished == (ends[0] in one.token_ids)
    assert together[0].finished


def test_budget_one_is_the_full_cache(model):
    prompts = [prompt(300, 0)]
    full = Engine(model, policy="full", compile=False).generate(prompts, 40)
    hybrid = Engine(model, HybridConfig(budget=1.0), compile=False).generate(prompts, 40)
    assert hybrid[0].token_ids == full[0].token_ids


def test_a_compressed_cache_is_not_the_full_cache(model):
    """The budget does something: a random model, whose attention is spread, answers otherwise."""
    prompts = [prompt(900, 0)]
    full = Engine(model, policy="full", compile=False).generate(prompts, 20)
    hybrid = Engine(model, HybridConfig(budget=0.2), compile=False).generate(prompts, 20)
    assert hybrid[0].token_ids != full[0].token_ids


def test_stream_yields_none_for_ended_sequences(model):
    engine = Engine(model, policy="full", compile=False)
    steps = list(engine.stream([prompt(60, 0), prompt(70, 1)], [2, 5]))
    assert [a is None for a, _ in steps] == [False, False, True, True, True]
    assert all(b is not None for _, b in steps) and len(steps) == 5


def test_statistics(model):
    engine = Engine(model, HybridConfig(budget=0.3), compile=False)
    layers = []
    list(engine.stream([prompt(600, 0)], 8, on_layer=lambda: layers.append(1)))
    stats = engine.stats
    assert len(layers) == 2
    assert (stats.static_heads, stats.dynamic_heads) == (3, 1)
    assert stats.bytes.step <= 0.3 * stats.bytes.full < stats.bytes.resident < stats.bytes.full
    assert stats.attended_tokens < 0.3 * 600
    assert stats.ttft_s > 0 and stats.ms_per_token > 0 and stats.bytes.new > 0
    list(engine.stream([prompt(600, 0)], 1))
    assert engine.stats.ms_per_token is None  # nothing to measure


@pytest.fixture
def profiled(tmp_path):
    """Heads of `model`, classified offline: a configuration whose prompts can be planned before they are read."""

    def config(need, **chosen) -> HybridConfig:
        file = tmp_path / "heads.json"
        HeadProfile(torch.tensor(need), torch.tensor(need), 1, "test").save(file)
        return HybridConfig(budget=0.3, dynamic_share=0.5, classifier="profile", head_profile=str(file), **chosen)

    return config


@pytest.mark.parametrize("tiles", [False, True])
def test_layers_packed_as_they_are_read_give_the_same_cache(model, profiled, tiles, monkeypatch):
    prompts = [prompt(500, 0), prompt(420, 1)]
    config = profiled([[0.1, 0.9], [0.8, 0.2]], tiles=tiles)
    ahead = Engine(model, config, compile=False)
    assert ahead.plans_ahead and not Engine(model, HybridConfig(), compile=False).plans_ahead
    tokens = ahead.generate(prompts, 20)
    monkeypatch.setattr(Engine, "plans_ahead", False)
    behind = Engine(model, config, compile=False)
    assert [r.token_ids for r in behind.generate(prompts, 20)] == [r.token_ids for r in tokens]
    assert ahead.stats.bytes == behind.stats.bytes and ahead.stats.dynamic_heads == 4
    for (name, a), b in zip(ahead.cache.named_buffers(), behind.cache.buffers(), strict=True):
        assert torch.equal(a, b), name


def test_only_one_layer_is_held_while_prompts_are_packed(model, profiled, monkeypatch):
    held = []
    pack = HybridCache.pack

    def watched(cache, placement, b, prefill, layer, order):
        held.append(sum(each is not None for each in prefill.layers))
        pack(cache, placement, b, prefill, layer, order)
        held.append(sum(each is not None for each in prefill.layers))

    monkeypatch.setattr(HybridCache, "pack", watched)
    layers = []
    engine = Engine(model, profiled([[0.1, 0.9], [0.8, 0.2]]), compile=False)
    list(engine.stream([prompt(500, 0), prompt(420, 1)], 2, on_layer=lambda: layers.append(1)))
    assert held == [1, 0] * 4 and len(layers) == 4


def test_a_head_profile_of_another_model_is_refused(model, profiled):
    for need, message in (
        ([[0.1, 0.9]], "has more"),
        ([[0.1, 0.9]] * 3, "has fewer"),
        ([[0.1, 0.9, 0.3]] * 2, "this model has"),
    ):
        with pytest.raises(ValueError, match=message):
            Engine(model, profiled(need), compile=False).generate([prompt(500, 0)], 2)


def test_bad_calls(model):
    with pytest.raises(ValueError, match="policy must be one of"):
        Engine(model, policy="magic")
    engine = Engine(model, compile=False)
    for prompts, limits in (([], 4), ([prompt(60, 0)], 0), ([prompt(60, 0)], [4, 4])):
        with pytest.raises(ValueError, match="at least one"):
            engine.generate(prompts, limits)
    with pytest.raises(ValueError, match="temperature"):
        Sampling(temperature=-1)
    with pytest.raises(ValueError, match="top_p"):
        Sampling(top_p=0)


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 40), st.floats(0.2, 3), st.floats(0.05, 1), st.integers(0, 999))
def test_samples_come_from_the_smallest_set_that_reaches_top_p(vocab, temperature, top_p, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, vocab, generator=generator) * 3
    p = (logits[0] / temperature).softmax(-1)
    order = p.argsort(descending=True).tolist()
    nucleus, reached = [], 0.0
    while reached < top_p - 1e-5 and len(nucleus) < vocab:
        nucleus.append(order[len(nucleus)])
        reached += float(p[nucleus[-1]])
    noise = torch.rand(200, generator=generator)
    drawn = sample(logits.expand(200, -1), torch.tensor(temperature), torch.tensor(top_p), noise)
    # A token whose inclusion hangs on the last bits may be in or out.
    assert set(drawn.tolist()) <= set(order[: len(nucleus) + 1])
    assert sample(logits, torch.tensor(temperature), torch.tensor(top_p), torch.zeros(1)).tolist() == order[:1]


def test_samples_follow_their_probabilities():
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    noise = (torch.arange(1000) + 0.5) / 1000  # every quantile once
    drawn = sample(logits.expand(1000, -1), torch.tensor(1.0), torch.tensor(1.0), noise)
    assert drawn.bincount().tolist() == pytest.approx([500, 300, 200], abs=1)
    drawn = sample(logits.expand(1000, -1), torch.tensor(1.0), torch.tensor(0.6), noise)
    assert drawn.bincount().tolist() == pytest.approx([625, 375], abs=1)


def test_seeds(model):
    engine = Engine(model, policy="dense", compile=False)

    def answer(seed: int) -> list[int]:
        return engine.generate([prompt(60, 0)], 12, Sampling(1.0, 1.0, seed))[0].token_ids

    assert answer(1) == answer(1) != answer(2)


def hybrid_share(out: str) -> float:
    return float(out.split("hybridkv reads ")[1].split("%")[0])


def test_nanogpt_example(capsys, monkeypatch):
    """The file in examples/ runs, and both policies print their tokens."""
    import hybridkv

    class Uncompiled(Engine):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs, compile=False)

    monkeypatch.setattr(hybridkv, "Engine", Uncompiled)
    runpy.run_path(str(NANOGPT), run_name="__main__")
    out = capsys.readouterr().out
    assert "full     reads 100" in out and hybrid_share(out) < 25.1


def test_a_pool_too_large_for_an_older_kernel_is_refused(monkeypatch):
    """On a GPU, from 2**31 numbers on, before torch 2.13; what torch 2.13 does there is in test_cuda.py."""
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.11.0+cu130"))
    check_pool(WIDE - 1, cuda)
    check_pool(WIDE, cpu)
    with pytest.raises(ValueError, match="fewer or shorter prompts"):
        check_pool(WIDE, cuda)
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.13.0+cu130"))
    check_pool(WIDE, cuda)


def test_it_is_refused_before_memory_is_taken(model, monkeypatch):
    """The engine asks for the pool that it is about to make, if it compiles."""
    asked = []
    monkeypatch.setattr(decode, "check_pool", lambda numbers, device: asked.append(numbers))
    for compile in (False, True):
        engine = Engine(model, HybridConfig(budget=0.4), compile=compile)
        engine.load(engine.prefill([prompt(150, 0)])[0], 8)
        assert asked == ([engine.cache.keys.numel()] if compile else [])

    def refuse(numbers, device):
        raise ValueError("too large")

    monkeypatch.setattr(decode, "check_pool", refuse)
    cache, prefills = engine.cache, engine.prefill([prompt(900, 0)])[0]
    with pytest.raises(ValueError, match="too large"):
        engine.load(prefills, 8)
    assert engine.cache is cache
