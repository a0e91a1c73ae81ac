"""The engine: batches, stops, sampling, statistics, and use from other code bases. Uncompiled."""

import re
import runpy
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.torch_version import TorchVersion

from demo.tiny_vlm import config as tiny_config
from demo.tiny_vlm import random_model
from hybridkv import (
    BudgetError,
    Capacity,
    Engine,
    HybridCache,
    HybridConfig,
    Plan,
    Prefill,
    Sampling,
    budgeted_plan,
    engine,
    full_plan,
    hybrid_plan,
)
from hybridkv.cache import hybrid
from hybridkv.cache.attention import WIDE, check_pool
from hybridkv.cache.capacity import bucket
from hybridkv.cache.dense import dense_slots
from hybridkv.cache.pack import keep
from hybridkv.model import decoder
from hybridkv.planning.head_profile import HeadProfile
from hybridkv.planning.plan import static_score
from hybridkv.planning.policies import POLICIES
from hybridkv.sampling import sample
from tests.lab import examples, prompt, random_prefill

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


def test_a_torch_that_compiles_wrongly_for_cpus_is_not_let(model, monkeypatch):
    prompts = [prompt(300, 0)]
    expected = Engine(model, HybridConfig(budget=0.4), compile=False).generate(prompts, 3)
    monkeypatch.setattr("hybridkv.cache.attention.COMPILES_FOR_CPUS", False)
    engine = Engine(model, HybridConfig(budget=0.4))
    with pytest.warns(UserWarning, match="runs uncompiled, since torch .* use torch 2.13 or later"):
        assert engine.generate(prompts, 3) == expected
    assert not engine.compile and engine.stats.compile_s == 0


def test_nor_is_a_step_of_ones_own(monkeypatch):
    """Without `Engine`, as in examples/nanogpt.py: compiled there, it would give other tokens without a word."""
    prefill = random_prefill(HybridConfig(budget=0.5), 1, (2, 2, 100, 16), torch.arange(100) < 90, 0, torch.float32)
    cache = HybridCache(Capacity.of([full_plan(prefill)], 2), 1, prefill)
    active = torch.ones(1, dtype=torch.bool)
    step = torch.compile(lambda: cache.advance(active), backend="eager", fullgraph=True)
    step()
    monkeypatch.setattr("hybridkv.cache.attention.COMPILES_FOR_CPUS", False)
    cache.advance(active)
    with pytest.raises(RuntimeError, match=r"can't be compiled: torch .* use torch 2\.13 or later"):
        torch.compile(lambda: cache.advance(active), backend="eager", fullgraph=True)()


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
    assert (stats.static_heads, stats.dynamic_heads, stats.retrieving_layers) == (3, 1, 2)
    assert stats.bytes.step <= 0.3 * stats.bytes.full < stats.bytes.resident < stats.bytes.full
    assert stats.attended_tokens < 0.3 * 600
    assert stats.ttft_s > 0 and stats.ms_per_token > 0 and stats.bytes.new > 0
    list(engine.stream([prompt(600, 0)], 1))
    assert engine.stats.ms_per_token is None  # nothing to measure


PROFILE = HeadProfile(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.ones(2, 2))


def wants_to_see(policy):
    """The same policy, which looks at the prompt before it plans."""

    def look_first(prefill: Prefill) -> Plan:
        assert all(layer.k.isfinite().all() for layer in prefill.layers)
        return policy(prefill)

    return look_first


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("policy", [hybrid_plan, POLICIES["snapkv"], POLICIES["streaming"], POLICIES["quest"]])
def test_planned_before_or_after_reading_the_cache_is_the_same(model, tiles, policy):
    prompts = [prompt(500, 0), prompt(420, 1)]
    config = HybridConfig(budget=0.4, classifier="profile", head_profile=PROFILE, tiles=tiles, dynamic_share=0.5)
    ahead, behind = (Engine(model, config, each, compile=False) for each in (policy, wants_to_see(policy)))
    tokens = ahead.generate(prompts, 20)
    assert [r.token_ids for r in behind.generate(prompts, 20)] == [r.token_ids for r in tokens]
    assert ahead.stats.bytes == behind.stats.bytes
    for (name, a), b in zip(ahead.cache.named_buffers(), behind.cache.buffers(), strict=True):
        assert torch.equal(a, b), name


@torch.no_grad()
def test_a_record_holds_keys_and_values_and_no_more():
    """They come out of one matmul with the queries, which are many times as large."""
    model, asked = random_model(tiny_config(layers=2, heads=6, kv_heads=2, head_dim=16, hidden_size=96)), prompt(300, 0)
    model.join()
    record = Prefill(asked.prunable, HybridConfig())
    model.prefill(asked, record)
    for layer in record.layers:
        for t in (layer.k, layer.v):
            assert t.untyped_storage().nbytes() == t.nbytes


def test_a_dense_cache_that_has_to_grow_gets_room_to_spare(model):
    engine = Engine(model, policy="dense", compile=False)
    engine.generate([prompt(400, 0)], 4)
    assert engine.cache.slots == dense_slots(404)
    engine.generate([prompt(500, 0)], 13)
    grown = engine.cache
    assert grown.slots == bucket(513) > dense_slots(513)
    engine.generate([prompt(540, 0)], 4)
    assert engine.cache is grown


@torch.no_grad()
def test_long_prompts_go_through_feed_forward_layers_in_slices(model, monkeypatch):
    """What they need there for a moment is several times what a layer's keys and values take."""
    asked, seen = prompt(150, 0), []
    whole, position = model.prefill(asked, Prefill(asked.prunable, HybridConfig()))
    monkeypatch.setattr(decoder, "SLICE", 64)
    for block in model.layers:
        monkeypatch.setattr(block.mlp, "forward", lambda x, of=block.mlp.forward: seen.append(x.shape[1]) or of(x))
    logits, other = model.prefill(asked, Prefill(asked.prunable, HybridConfig()))
    assert seen == [64, 64, 22] * len(model.layers)
    torch.testing.assert_close(logits, whole)
    assert position == other


@pytest.mark.parametrize(
    "policy, layers, prompts_held",
    [("hybridkv", 1, 0), ("dense", 1, 0), ("full", 1, 0), ("snapkv", 1, 0), ("adakv", 2, 1)],
)
def test_no_more_is_held_in_full_than_one_layer_or_one_prompt(model, policy, layers, prompts_held, monkeypatch):
    """Each prompt of a batch is packed before the next is read; where the policy need not see it, each layer."""
    records, held = [], []

    class Watched(Prefill):
        def __init__(self, *args):
            super().__init__(*args)
            records.append(self)

        def attend(self, layer, q, k, v):
            for other in records:
                if other is not self:
                    assert not any(each is not None for each in other.layers)
            out = super().attend(layer, q, k, v)
            return out

    def watch(plan, prefill, layer):
        held.append(sum(each is not None for each in prefill.layers))
        return keep(plan, prefill, layer)

    monkeypatch.setattr(engine, "Prefill", Watched)
    monkeypatch.setattr(engine, "keep", watch)
    config = HybridConfig(budget=0.4, classifier="profile", head_profile=PROFILE)
    read = []
    list(
        Engine(model, config, policy, compile=False).stream(
            [prompt(500, 0), prompt(420, 1), prompt(300, 2)], 2, on_layer=lambda: read.append(1)
        )
    )
    assert held == ([1] * 6 if layers == 1 else [2, 1] * 3) and len(read) == 6


def test_models_that_do_not_say_how_deep_they_are_are_planned_after_reading(model):
    class Nameless(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def prefill(self, prompt, kv):
            return self.inner.prefill(prompt, kv)

        def step(self, token, position, kv):
            return self.inner.step(token, position, kv)

    for policy in ("dense", "full", "snapkv", "hybridkv"):
        expected = Engine(model, HybridConfig(budget=0.4), policy, compile=False).generate([prompt(400, 0)], 8)
        found = Engine(Nameless(), HybridConfig(budget=0.4), policy, compile=False).generate([prompt(400, 0)], 8)
        assert [r.token_ids for r in found] == [r.token_ids for r in expected]


def test_prompts_without_a_mask_are_pruned_but_for_their_end(model):
    """Also in a batch, and planned before they are read."""
    bare = [Bare(prompt(n, n).input_ids) for n in (400, 300)]
    masked = [Masked(p.input_ids, torch.arange(len(p.input_ids)) < len(p.input_ids) - 32) for p in bare]
    for config in (HybridConfig(budget=0.4), HybridConfig(budget=0.4, classifier="profile", head_profile=PROFILE)):
        engines = [Engine(model, config, compile=False) for _ in range(2)]
        without, with_mask = (e.generate(p, 10) for e, p in zip(engines, (bare, masked), strict=True))
        assert [r.token_ids for r in without] == [r.token_ids for r in with_mask]
        assert engines[0].stats.bytes == engines[1].stats.bytes


@dataclass
class Bare:
    """The least that a prompt is."""

    input_ids: torch.Tensor
    grids: tuple = ()
    seconds_per_grid: tuple = ()


@dataclass
class Masked(Bare):
    prunable: torch.Tensor = None

    def __init__(self, input_ids, prunable):
        self.input_ids, self.prunable = input_ids, prunable


def test_a_head_profile_of_another_model_is_refused(model):
    for need in ([[0.1, 0.9]], [[0.1, 0.9]] * 3, [[0.1, 0.9, 0.3]] * 2):
        config = HybridConfig(classifier="profile", head_profile=HeadProfile(torch.tensor(need), torch.tensor(need)))
        with pytest.raises(ValueError, match="this model has"):
            Engine(model, config, compile=False).generate([prompt(500, 0)], 2)
    with pytest.raises(ValueError, match=r"hybridkv\.calibrate"):
        Engine(model, HybridConfig(classifier="profile"), compile=False).generate([prompt(500, 0)], 2)
    with pytest.raises(TypeError, match=r"HeadProfile\.load\('heads\.json'\)"):
        HybridConfig(head_profile="heads.json")


def spendthrift(prefill: Prefill) -> Plan:
    """Half of what there is, whatever the budget."""
    plan = full_plan(prefill)
    return replace(plan, n_read=plan.n_read // 2, score=static_score)


def test_every_plan_is_held_to_the_budget(model):
    strict = Engine(model, HybridConfig(budget=0.2), spendthrift, compile=False)
    with pytest.raises(BudgetError, match=r"takes 0\.5\d+ of the full cache, the budget is 0\.2"):
        strict.generate([prompt(600, 0)], 2)
    lax = Engine(model, HybridConfig(budget=0.2, strict=False), spendthrift, compile=False)
    lax.generate([prompt(600, 0)], 2)
    assert lax.stats.bytes.step > 0.5 * lax.stats.bytes.full  # it shows
    with pytest.raises(BudgetError, match="takes 1"):  # keeping everything is no way around it
        Engine(model, HybridConfig(budget=0.2), lambda p: full_plan(p), compile=False).generate([prompt(600, 0)], 2)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda plan: None, "must return a Plan, got NoneType"),
        (lambda plan: replace(plan, page_size=32), "page_size is 32"),
        (lambda plan: replace(plan, prunable=~plan.prunable), "prunable is not the prompt's"),
        (lambda plan: replace(plan, dynamic=plan.dynamic.long()), "dynamic must be torch.bool"),
        (lambda plan: replace(plan, n_read=plan.n_read[:1]), "n_read must be torch.int64"),
        (lambda plan: replace(plan, n_read=plan.n_read.float()), "n_read must be torch.int64"),
        (lambda plan: replace(plan, n_read=plan.n_read * 0), "too few pages"),
        (lambda plan: replace(plan, n_read=plan.n_read + 1000), "more pages than the prompt"),
        (
            lambda plan: replace(plan, dynamic=~plan.dynamic, n_read=plan.n_read + 2),
            "more dynamic heads than may retrieve",
        ),
        (lambda plan: replace(plan, retrieving=torch.tensor([2])), "a number for each layer"),
        (
            lambda plan: replace(
                plan,
                dynamic=~plan.dynamic,
                retrieving=plan.retrieving + 2,
                n_read=plan.n_read * 0 + plan.whole_pages,
            ),
            "no retrieval",
        ),
        (lambda plan: replace(plan, score=None), "need a score"),
        (lambda plan: replace(plan, score=lambda p, i: static_score(p, i) * float("nan")), "got NaN"),
    ],
)
def test_plans_that_break_the_rules_are_refused(model, spoil, message):
    policy = lambda prefill: spoil(budgeted_plan(prefill, torch.zeros(prefill.shape).bool(), static_score))  # noqa: E731
    with pytest.raises(ValueError, match=message):
        Engine(model, HybridConfig(budget=0.3), policy, compile=False).generate([prompt(600, 0)], 2)


def test_a_stream_that_is_no_longer_the_engines_raises(model):
    engine = Engine(model, HybridConfig(budget=0.4), compile=False)
    expected = [r.token_ids for r in engine.generate([prompt(400, 0)], 6)]
    first, second = engine.stream([prompt(400, 0)], 6), engine.stream([prompt(300, 1)], 6)
    kept = [next(first)[0] for _ in range(3)]
    assert kept == expected[0][:3]
    next(second)
    with pytest.raises(RuntimeError, match="has begun another generation"):
        next(first)
    assert [next(second) for _ in range(5)]  # which is not disturbed
    assert [r.token_ids for r in engine.generate([prompt(400, 0)], 6)] == expected


@pytest.fixture
def ahead(model):
    """An engine that launches the next step before it reads a token, as on GPUs, and the steps that it took."""
    engine, taken = Engine(model, HybridConfig(budget=0.4), compile=False), []
    engine.ahead, step = True, engine.step

    def counted() -> torch.Tensor:
        taken.append(1)
        return step()

    engine.step = counted
    return engine, taken


@pytest.mark.parametrize("sampling", [None, Sampling(temperature=1.2, top_p=0.9, seed=3)], ids=["greedy", "sampled"])
def test_steps_that_are_launched_ahead_give_the_same_tokens(model, ahead, sampling):
    engine, taken = ahead
    prompts, limits = [prompt(400, 0), prompt(300, 1)], [9, 24]
    plain = Engine(model, HybridConfig(budget=0.4), compile=False)
    expected = plain.generate(prompts, limits, sampling)
    found = engine.generate(prompts, limits, sampling)
    assert [r.token_ids for r in found] == [r.token_ids for r in expected]
    assert len(taken) == 23  # none too many: the last one is known beforehand
    # Ended by a token: one step too many at most, and the next generation does not see it.
    end = next(token for i, token in enumerate(expected[0].token_ids[3:], 3) if token not in expected[0].token_ids[:i])
    for each in (plain, engine):
        each.eos, each.state = (end,), None
    del taken[:]
    (ended,), (plainly,) = engine.generate(prompts[:1], 24, sampling), plain.generate(prompts[:1], 24, sampling)
    assert ended.finished and ended == plainly
    assert len(taken) == len(ended.token_ids) + 1
    assert engine.stats.bytes == plain.stats.bytes
    assert engine.generate(prompts, limits, sampling) == plain.generate(prompts, limits, sampling)


def test_the_first_tokens_do_not_wait_for_steps_that_are_launched_ahead(ahead):
    engine, taken = ahead
    stream = engine.stream([prompt(400, 0)], 6)
    seen = []
    for _ in stream:
        seen.append(len(taken))
    assert seen == [0, 1, 3, 4, 5, 5]  # the first step compiles; then one more than was read, up to the last


def test_two_threads_can_not_use_one_engine_at_once(model):
    """While one is in the middle of reading, the other is refused; afterwards it may."""
    engine = Engine(model, HybridConfig(budget=0.4), compile=False)
    reading, go_on, caught = threading.Event(), threading.Event(), []

    def pause() -> None:
        reading.set()
        go_on.wait(60)

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(lambda: list(engine.stream([prompt(400, 0)], 6, on_layer=pause)))
        assert reading.wait(60)
        try:
            engine.generate([prompt(300, 1)], 2)
        except RuntimeError as error:
            caught.append(str(error))
        go_on.set()
        tokens = [token for (token,) in other.result()]
    assert caught and "another thread" in caught[0]
    assert tokens == Engine(model, HybridConfig(budget=0.4), compile=False).generate([prompt(400, 0)], 6)[0].token_ids


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


@examples(100)
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


def test_nanogpt_example(capsys, monkeypatch):
    """The file in examples/ runs; a step of its own takes the greedy tokens of the engine's."""
    monkeypatch.setattr(torch, "compile", lambda step, **how: step)
    monkeypatch.setattr(sys, "argv", [str(NANOGPT), "--seconds", "0"])
    space = runpy.run_path(str(NANOGPT), run_name="__main__")
    out = capsys.readouterr().out
    shares = [float(share) for share in re.findall(r"reads (\S+)% of the cache", out)]
    assert len(shares) == 3 and 99 < shares[0] < 104 and max(shares[1:]) < 25
    model = space["GPT"](space["GPTConfig"]())
    asked, config = space["Prompt"](torch.randint(256, (300,))), HybridConfig(budget=0.3)
    (result,) = Engine(model, config).generate([asked], 40)
    assert space["with_a_step_of_its_own"](model, asked, config, 40) == result.token_ids


@pytest.mark.parametrize("seconds", ["-1", "nan", "inf", "long"])
def test_nanogpt_trains_for_a_time_that_ends(capsys, monkeypatch, seconds):
    monkeypatch.setattr(sys, "argv", [str(NANOGPT), f"--seconds={seconds}"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(NANOGPT), run_name="__main__")
    assert ended.value.code == 2 and "--seconds" in capsys.readouterr().err


def test_a_model_of_ones_own_that_returns_something_else(monkeypatch):
    """Its shapes are checked where it hands them over."""
    monkeypatch.setattr(sys, "argv", [str(NANOGPT), "--seconds", "0"])
    space = runpy.run_path(str(NANOGPT))
    whole, asked = space["GPT"], space["Prompt"](torch.randint(256, (100,)))

    class Prefills(whole):
        def prefill(self, prompt, kv):
            idx = prompt.input_ids[None]
            return self(idx, torch.arange(idx.shape[1])[None], kv), idx.shape[1]

    class Steps(whole):
        def step(self, token, position, kv):
            return self(token[:, None], position[:, None], kv)

    class Forgets(whole):
        def prefill(self, prompt, kv):
            return super().prefill(prompt, None)

    class Transposes(whole):
        def prefill(self, prompt, kv):
            turned = [
                lambda q, k, v, layer=layer: layer(q, k.transpose(1, 2), v) for layer in map(kv.__getitem__, range(3))
            ]
            return super().prefill(prompt, turned)

    for kind, message in (
        (Prefills, r"prefill must return logits \(1, V\).*got \(1, 100, 256\)"),
        (Steps, r"step must return logits \(1, V\).*got \(1, 1, 256\)"),
        (Forgets, "in no layer"),
        (Transposes, r"wants one sequence, q \(1, Hq, T, D\)"),
    ):
        with pytest.raises(ValueError, match=message):
            Engine(kind(space["GPTConfig"]()), HybridConfig(budget=1.0), compile=False).generate([asked], 4)


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
    monkeypatch.setattr(engine, "check_pool", lambda numbers, device: asked.append(numbers))
    for compile in (False, True):
        ours = Engine(model, HybridConfig(budget=0.4), compile=compile)
        ours.take_in([prompt(150, 0)], 8)
        assert asked == ([ours.cache.pools[0].keys.numel()] if compile else [])

    def refuse(numbers, device):
        raise ValueError("too large")

    monkeypatch.setattr(engine, "check_pool", refuse)
    cache = ours.cache
    with pytest.raises(ValueError, match="too large"):
        ours.take_in([prompt(900, 0)], 8)
    assert ours.cache is cache


NEEDS = HeadProfile(torch.tensor([[0.1, 0.2], [5.0, 0.0], [0.3, 3.0], [0.0, 0.2]]), torch.ones(4, 2))


@pytest.fixture(scope="module")
def deep():
    return random_model(tiny_config(layers=4, hidden_size=96, heads=6, kv_heads=2, head_dim=16, tie=False))


@pytest.mark.parametrize(
    "chosen, retrieving, rows",
    [
        (dict(retrieving_layers=0.5), (False, True, True, False), 2),
        (dict(retrieving_layers=0.25), (False, True, False, False), 2),
        (dict(retrieving_layers=0.01), (False, True, False, False), 2),  # one at least
        (dict(retrieving_layers=0.5, classifier="profile"), (False, True, True, False), 1),  # heads are known, too
        (dict(classifier="profile"), (False, True, True, False), 1),
        (dict(classifier="profile", dynamic_share=1), (True, True, True, True), 2),
        (dict(), (True, True, True, False), 2),  # three quarters of them
        (dict(retrieving_layers=1), (True, True, True, True), 2),
        (dict(retrieving_layers=0.5, head_profile=None), (True, True, True, True), 2),
        (dict(retrieving_layers=0.5, dynamic_share=0), (False, False, False, False), 0),
    ],
)
def test_dynamic_heads_stay_in_the_layers_that_retrieve(deep, chosen, retrieving, rows):
    """The neediest by the sum over their heads; all, where nobody knows or asks. Every prompt finds the same."""
    config = HybridConfig(**dict(budget=0.4, head_profile=NEEDS) | chosen)
    engine = Engine(deep, config, compile=False)
    for seed in range(3):
        engine.generate([prompt(500, seed), prompt(450, 10 + seed)], 20)
        capacity = engine.cache.capacity
        assert (capacity.retrieving, capacity.rows) == (retrieving, 2 * rows)
        assert engine.cache.first.shape == (sum(retrieving), 2 * rows)
        dynamic = engine.cache.row.view(4, -1) > 0
        assert not dynamic[~torch.tensor(retrieving)].any()
        share = min(round(config.dynamic_share * 8) if config.dynamic_share else 0, 2 * sum(retrieving))
        assert int(dynamic.sum()) == 2 * share  # as many as anywhere, or all there are


def test_layers_that_do_not_retrieve_call_nothing_that_does(deep, monkeypatch):
    calls = []
    best = hybrid.best_chunks
    monkeypatch.setattr(hybrid, "best_chunks", lambda *args: (calls.append(1), best(*args))[1])
    config = HybridConfig(budget=0.4, head_profile=NEEDS, retrieving_layers=0.25)
    Engine(deep, config, compile=False).generate([prompt(500, 0)], 4)
    assert len(calls) == 3  # steps, one layer
