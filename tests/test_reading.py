"""Readings: a question about one is answered as if all had been read together, whatever was asked before."""

import copy
import gc
import re
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from demo.tiny_vlm import config as tiny_config
from demo.tiny_vlm import random_model
from hybridkv import Engine, HybridConfig, Prefill, Question, Reading, Sampling
from hybridkv.cache import sketch
from hybridkv.int8 import BLOCK, Int8
from hybridkv.model import Processor, from_pretrained
from hybridkv.planning.policies import POLICIES
from hybridkv.read_on import PrefillOn, Recorder, attend_on
from hybridkv.reading import FORMAT, rows_to_keep
from tests.lab import examples, head_profile, prompt, prompts
from tests.test_pictures import picture

# In float64 rounding is around 1e-14, and no two scores of random numbers are that close.
CLOSE = dict(rtol=1e-8, atol=1e-8)
FIELDS = ("k", "v", "q", "score", "mean_score", "context_mass", "focus")
POLICY_NAMES = [*POLICIES, "dense"]


@pytest.fixture(scope="module")
def model():
    raw = tiny_config(layers=2, hidden_size=96, heads=6, kv_heads=2, head_dim=16, tie=False)
    return random_model(raw).double()


@pytest.fixture(scope="module")
def chat(vlm) -> tuple[torch.nn.Module, Processor]:
    return from_pretrained(vlm, dtype=torch.float64), Processor.from_pretrained(vlm)


def config(**chosen) -> HybridConfig:
    return HybridConfig(
        **{"budget": 0.3, "strict": False, "head_profile": head_profile(2, 2), "retrieving_layers": 0.5} | chosen
    )


class Watched(Engine):
    """Keeps the plans it makes and the logits it chooses from."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs, compile=False)
        self.plans, self.logits = [], []

    def plan(self, prefill):
        plan = super().plan(prefill)
        self.plans.append(plan)
        return plan

    def take_in(self, *args):
        self.plans.clear()
        logits, positions = super().take_in(*args)
        self.logits = logits
        return logits, positions


def same_plans(one: list, other: list) -> None:
    for a, b in zip(one, other, strict=True):
        for name in ("prunable", "dynamic", "n_read", "retrieving"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name


def answers(engine: Watched, given: list, new_tokens: int = 24) -> tuple[list, list, Tensor]:
    results = engine.generate(given, new_tokens)
    return [result.token_ids for result in results], list(engine.plans), engine.logits


def asked(tokens: int, seed: int, question: int, cut: int) -> SimpleNamespace:
    """A prompt whose first `cut` tokens do not depend on the question."""
    ids = prompt(tokens, seed).input_ids.clone()
    ids[cut:] = prompt(tokens - cut, 100 + question).input_ids
    return replace(prompt(tokens, seed), input_ids=ids)


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_a_question_is_answered_as_if_all_had_been_read_at_once(model, policy):
    engine = Watched(model, config(), policy)
    reading = engine.read(prompt(300, 0), tokens=280)
    for question in range(2):
        whole = asked(300, 0, question, 280)
        tokens, plans, logits = answers(engine, [whole])
        again, same, close = answers(engine, [Question(whole, reading)])
        assert again == tokens
        same_plans(same, plans)
        torch.testing.assert_close(close, logits, **CLOSE)


@pytest.mark.parametrize("policy", ["hybridkv", "snapkv"])
def test_order_does_not_matter_and_a_batch_is_each_alone(model, policy):
    engine = Watched(model, config(), policy)
    reading = engine.read(prompt(300, 0), tokens=270)
    questions = [asked(280 + 10 * n, 0, n, 270) for n in range(3)]
    alone = [engine.ask(reading, question, 16).token_ids for question in questions]
    assert [engine.ask(reading, q, 16).token_ids for q in reversed(questions)] == alone[::-1]
    assert [result.token_ids for result in engine.ask(reading, questions, 16)] == alone
    mixed = engine.generate([Question(questions[1], reading), prompt(150, 7)], 16)  # beside a prompt without a reading
    assert mixed[0].token_ids == alone[1]
    assert mixed[1].token_ids == engine.generate([prompt(150, 7)], 16)[0].token_ids
    drawn = Sampling(temperature=1.0, seed=3)
    assert engine.ask(reading, questions[0], 8, drawn) == engine.generate([questions[0]], 8, drawn)[0]


def test_a_reading_survives_other_budgets_policies_and_windows(model):
    reading = Watched(model, config(window=8)).read(prompt(300, 0), tokens=250)
    whole = asked(300, 0, 0, 250)
    for policy, chosen in [
        ("hybridkv", dict(budget=0.15)),
        ("adakv", dict(budget=0.5, window=40)),
        ("hybridkv", dict(classifier="threshold", window=64)),
        ("quest", {}),
        ("hybridkv", dict(sinks=0, recent=60, tiles=True)),
        ("hybridkv", dict(store="host", budget=0.6)),
    ]:
        engine = Watched(model, config(**chosen), policy)
        tokens, plans, _ = answers(engine, [whole])
        again, same, _ = answers(engine, [Question(whole, reading)])
        assert again == tokens
        same_plans(same, plans)
    with pytest.raises(ValueError, match="does not hold all text queries"):
        Watched(model, config(window=150)).ask(reading, whole, 4)


def test_only_what_is_new_goes_through_the_layers(model):
    engine, passed = Watched(model, config()), []
    reading = engine.read(prompt(300, 0), tokens=280)
    hooks = [layer.mlp.register_forward_hook(lambda m, x, y: passed.append(x[0].shape[1])) for layer in model.layers]
    try:
        engine.ask(reading, asked(300, 0, 1, 280), 1)
    finally:
        for hook in hooks:
            hook.remove()
    assert passed == [20] * len(model.layers)


def test_dropped_readings_free_their_memory(model):
    engine = Watched(model, config())
    reading = engine.read(prompt(300, 0), tokens=280)
    kept = [weakref.ref(t) for t in (*reading.k, *reading.v, *reading.q)]
    assert reading.bytes > sum(r().nbytes for r in kept)
    engine.ask(reading, asked(300, 0, 1, 280), 4)
    del reading
    gc.collect()
    assert not any(r() is not None for r in kept)


def test_sketches_are_fitted_once(model, monkeypatch):
    fitted, fit = [], sketch.fit_sketch
    monkeypatch.setattr(sketch, "fit_sketch", lambda k, rank: fitted.append(len(k)) or fit(k, rank))
    engine = Watched(model, config(), "hybridkv")
    reading = engine.read(prompt(300, 0), tokens=280)
    bare = reading.bytes
    questions = [asked(300 + n, 0, n, 280) for n in range(3)]
    questions = [replace(q, prunable=q.prunable & (torch.arange(len(q.input_ids)) < 270)) for q in questions]
    first = engine.ask(reading, questions[0])
    seen, taken = sum(fitted), reading.bytes
    assert seen == int(engine.plans[0].dynamic.sum()) > 0 and taken > bare
    later = [engine.ask(reading, question) for question in questions[1:]]
    assert sum(fitted) == seen and reading.bytes == taken  # the head profile makes the same heads dynamic
    assert engine.ask(reading, questions[0]) == first
    reading.fits.clear()
    assert [engine.ask(reading, question) for question in questions[1:]] == later
    engine.config = config(sketch_rank=4)
    engine.ask(reading, questions[0])
    assert sum(fitted) == 3 * seen
    # Where chunks hold tokens that the reading has not, they are another question's business.
    before = len(reading.fits)
    engine.ask(reading, replace(asked(400, 0, 0, 280), prunable=torch.arange(400) < 380))
    assert sum(fitted) == 4 * seen and len(reading.fits) == before


def test_a_byte_a_number(model, tmp_path):
    """Smaller, close to what it was, the same from a file, and gone on from."""
    engine = Watched(model, config(), "hybridkv")
    whole = asked(400, 0, 0, 380)
    exact, reading = engine.read(whole, tokens=350), engine.read(whole, tokens=350, int8=True)
    assert reading.int8 and not exact.int8 and reading.bytes < exact.bytes / 2
    for ours, theirs in zip((*reading.k, *reading.v), (*exact.k, *exact.v), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        torch.testing.assert_close(ours.to("cpu"), theirs, rtol=0, atol=float(theirs.abs().max()) / 253)
    _, _, logits = answers(engine, [Question(whole, exact)], 1)
    longer = engine.read(whole, reading, 380)
    for rounded in (reading, longer):
        tokens, _, close = answers(engine, [Question(whole, rounded)], 8)
        assert rounded.int8 and 0 < float((close - logits).abs().max()) < 0.05 * float(logits.abs().max())
    reading = longer
    reading.save(tmp_path / "a")
    loaded = Reading.load(tmp_path / "a", engine.fingerprint)
    assert loaded.int8 and loaded.bytes <= reading.bytes  # without fitted sketches
    assert answers(engine, [Question(whole, loaded)], 8)[0] == tokens
    tensors, about = load_file(tmp_path / "a"), {"format": FORMAT, "fingerprint": engine.fingerprint, "messages": "[]"}
    for name in ("k.0", "k.1.scale"):
        save_file(tensors | {name: tensors[name][:, 1:].clone()}, tmp_path / "b", about)
        with pytest.raises(ValueError, match="do not fit together"):
            Reading.load(tmp_path / "b", engine.fingerprint)


@examples(30)
@given(st.integers(1, 200), st.integers(0, 99), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_rounding_to_a_byte(tokens, seed, dtype):
    """Off by half a step of the scale at most, and by the dtype's own rounding; zeros stay."""
    generator = torch.Generator().manual_seed(seed)
    t = (torch.randn(2, tokens, 8, generator=generator) * torch.logspace(-3, 2, 8)).to(dtype)
    t[:, :, 0] = 0
    small = Int8.of(t)
    assert small.fits_together() and small.to("cpu").dtype == dtype and small.to("cpu").shape == t.shape
    largest = F.pad(t.float(), (0, 0, 0, -tokens % BLOCK)).unflatten(1, (-1, BLOCK)).abs().amax(2)
    step = (largest / 127).repeat_interleave(BLOCK, 1)[:, :tokens]
    eps = torch.finfo(dtype).eps * 127  # of the scale and of the numbers, in steps
    tiny = 2 * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps * 127
    assert ((small.to("cpu").float() - t.float()).abs() <= step * (0.5 + 2 * eps) + tiny).all()


def test_reading_goes_on_from_a_reading(model):
    engine, whole = Watched(model, config()), prompt(400, 0)
    once = engine.read(whole, tokens=350)
    past = None
    for tokens in (90, 91, 200, 350):
        past = engine.read(whole, past, tokens)
    assert torch.equal(past.rows, once.rows)
    for name in "kvq":
        for a, b in zip(getattr(past, name), getattr(once, name), strict=True):
            torch.testing.assert_close(a, b, **CLOSE)
    assert engine.ask(past, whole, 16) == engine.ask(once, whole, 16) == engine.generate([whole], 16)[0]


@pytest.mark.slow
@pytest.mark.compiles
def test_one_compiled_step_serves_all_questions(model):
    """And gives the tokens of the uncompiled one; in float32, since attention is not compiled in float64."""
    single = copy.deepcopy(model).float()
    plain = Watched(single, config())
    reading = plain.read(prompt(300, 0), tokens=280)
    questions = [asked(300, 0, n, 280) for n in range(3)]
    expected = [plain.ask(reading, question, 24) for question in questions]
    engine = Engine(single, config())
    assert engine.ask(reading, questions[0], 24) == expected[0]
    with torch.compiler.set_stance("fail_on_recompile"):
        assert [engine.ask(reading, question, 24) for question in questions[1:]] == expected[1:]


def test_what_can_not_be_read_or_asked(model):
    engine, whole = Watched(model, config()), prompt(300, 0)
    reading = engine.read(whole, tokens=280)
    for tokens in (0, -1, 301):
        with pytest.raises(ValueError, match="there is nothing to read"):
            engine.read(whole, tokens=tokens)
    with pytest.raises(ValueError, match="280 of which are read already"):
        engine.read(whole, reading, 280)
    with pytest.raises(ValueError, match="does not begin as this reading does"):
        engine.ask(reading, prompt(300, 1))
    with pytest.raises(ValueError, match="does not begin as this reading does"):
        engine.ask(reading, prompt(280, 0))
    with pytest.raises(ValueError, match="does not begin as this reading does"):
        engine.read(prompt(300, 1), reading, 290)
    with pytest.raises(TypeError, match="a Reading, got NoneType"):
        engine.ask(None, whole)
    raw = tiny_config(layers=2, hidden_size=96, heads=6, kv_heads=2, head_dim=16, tie=False)
    for other in (random_model(raw, seed=1).double(), random_model(raw)):
        with pytest.raises(ValueError, match="made by another model, or in another dtype"):
            Watched(other, config()).ask(reading, whole)


# With pictures, and from messages


def test_a_picture_is_looked_at_once(chat):
    model, processor = chat
    engine = Watched(model, config())
    first = processor("What is it?", images=[picture(224, 168)])
    reading = engine.read(first)
    assert reading.tokens == first.heavy and reading.messages == first.subject
    for question in ("What is it?", "And now, at some length, what else?"):
        whole = processor(question, images=[picture(224, 168)])
        asked = processor(question, after=reading.messages)
        assert asked.patches is None and torch.equal(asked.input_ids, whole.input_ids)
        assert engine.ask(reading, asked, 12) == engine.generate([whole], 12)[0]
    with pytest.raises(ValueError, match="a picture's size alone is not enough"):
        engine.generate([asked], 1)


def test_a_conversation_is_read_on(chat):
    """Another picture, and earlier turns, join a reading; the result is that of reading all at once."""
    model, processor = chat
    engine = Watched(model, config())
    said = [{"role": "assistant", "content": "It is noise. " * 4}]
    one = processor("What is it?", images=[picture(112, 84)], context="A note about it. " * 12)
    reading = engine.read(one)
    two = processor("Is this another?", images=[picture(84, 112, 1)], after=[*one.messages, *said])
    assert len(two.patches) == 48 and len(two.grids) == 2
    reading = engine.read(two, reading)
    three = processor("Which is which?", after=[*two.messages, *said])
    assert three.settled > reading.tokens == two.heavy
    reading = engine.read(three, reading, three.settled)
    assert reading.messages == three.messages[:-1]
    images = [picture(112, 84), picture(84, 112, 1)]
    bare = [
        message | {"content": [part if part["type"] == "text" else {"type": "image"} for part in message["content"]]}
        for message in three.messages
    ]
    whole = processor(bare, images=images)
    tokens, plans, logits = answers(engine, [whole])
    again, same, close = answers(engine, [Question(three, reading)])
    assert again == tokens
    same_plans(same, plans)
    torch.testing.assert_close(close, logits, **CLOSE)


def test_text_alone_is_nothing_to_read(chat):
    model, processor = chat
    with pytest.raises(ValueError, match="Only a prompt with a picture, a video or a context"):
        Watched(model).read(processor("Hi"))
    with pytest.raises(ValueError, match="ends before the prompt's last picture or context"):
        Watched(model).read(processor("Hi", images=[picture()]), tokens=5)


# On disk


def test_saved_and_loaded(chat, tmp_path):
    model, processor = chat
    engine = Watched(model, config())
    first = processor("What is it?", images=[picture(112, 84)])
    reading = engine.read(first)
    reading.save(tmp_path / "a.reading")
    assert [file.name for file in tmp_path.iterdir()] == ["a.reading"]
    loaded = Reading.load(tmp_path / "a.reading", engine.fingerprint)
    assert loaded.messages == reading.messages and torch.equal(loaded.rows, reading.rows)
    for name in "kvq":
        assert all(map(torch.equal, getattr(loaded, name), getattr(reading, name)))
    question = processor("And?", after=loaded.messages)
    assert engine.ask(loaded, question, 8) == engine.ask(reading, question, 8)
    other = Engine(from_pretrained(processor_folder(chat), dtype=torch.float32), compile=False)
    with pytest.raises(ValueError, match="was read by another model, or in another dtype"):
        Reading.load(tmp_path / "a.reading", other.fingerprint)


def processor_folder(chat) -> str:
    return chat[1].tokenizer.name_or_path


def test_files_that_are_no_readings(chat, vlm, tmp_path):
    model, processor = chat
    engine, file = Watched(model, config()), tmp_path / "a.reading"
    with pytest.raises(FileNotFoundError):
        Reading.load(file, engine.fingerprint)
    with pytest.raises(ValueError, match="no reading of this version"):
        Reading.load(vlm / "model.safetensors", engine.fingerprint)
    engine.read(processor("What?", images=[picture()])).save(file)
    whole = file.read_bytes()
    for damaged in (b"", whole[:20], whole[:-1000], b"text" * 100):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged or no reading"):
            Reading.load(file, engine.fingerprint)
    good = engine.read(processor("What?", images=[picture()]))
    assert good.fits_together()
    for wrong in (
        dict(input_ids=good.input_ids[:-1]),
        dict(input_ids=good.input_ids.int()),
        dict(rows=good.rows.flip(0)),
        dict(rows=good.rows + good.tokens),
        dict(k=[t[:, 1:] for t in good.k]),
        dict(v=[t.float() for t in good.v]),
        dict(q=[t[:, 1:] for t in good.q]),
        dict(k=[t[0] for t in good.k]),
        dict(messages="text"),
    ):
        replace(good, **wrong).save(file)
        with pytest.raises(ValueError, match="do not fit together"):
            Reading.load(file, engine.fingerprint)
    with pytest.raises(OSError):
        engine.read(processor("What?", images=[picture()])).save(tmp_path / "no such folder" / "a")


def test_the_documents_code_runs(chat, vlm, tmp_path, monkeypatch, capsys):
    file = Path(__file__).parent.parent / "docs" / "readings.md"
    if not file.is_file():
        pytest.skip("needs a checkout")
    reading, messages = re.findall(r"^```python\n(.*?)^```", file.read_text(encoding="utf-8"), re.S | re.M)
    monkeypatch.chdir(tmp_path)
    for name in ("street.jpg", "a.jpg"):
        picture(448, 448).save(name)
    space = {}
    reading = reading.replace("Qwen/Qwen2.5-VL-3B-Instruct", str(vlm)).replace("budget=0.1", "strict=False")
    exec(reading.replace("model.cfg.eos_token_id)", "[], compile=False)"), space)
    assert len(space["both"]) == 2 and space["both"][0].token_ids and capsys.readouterr().out.count("\n") >= 2
    exec(messages, space)
    assert space["prompt"].prunable.any()


# The parts


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 1200), st.integers(0, 400))
@examples(40)
def test_attention_of_the_last_tokens(heads, group, new, past):
    """`attend_on` is causal attention, of which only the last rows are wanted."""
    dim, tokens = 8, new + past
    q = torch.randn(1, heads * group, tokens, dim).double()
    k, v = torch.randn(2, 1, heads, tokens, dim).double()
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(attend_on(q[:, :, past:], k, v), expected[:, :, past:], **CLOSE)


@given(prompts(160), st.data())
@examples(60)
def test_a_question_is_profiled_as_the_whole_prompt(prunable, data):
    """Whatever the mask, the cut, and the configuration: and whichever text the next question makes prunable."""
    tokens = len(prunable)
    cut = data.draw(st.integers(1, tokens - 1), "cut")
    turn = data.draw(st.integers(0, tokens), "what is said from there on is prunable once another turn follows")
    later = prunable | ((torch.arange(tokens) >= turn) & (torch.arange(tokens) % 7 > 2))
    chosen = HybridConfig(
        window=data.draw(st.integers(1, 40)), sinks=data.draw(st.integers(0, 6)), recent=data.draw(st.integers(0, 24))
    )
    q, k, v = (torch.randn(2, 1, n, tokens, 8, dtype=torch.float64) for n in (4, 2, 2))
    spans = [(int(prunable.int().argmax()), 1, 2, 2)]
    given = SimpleNamespace(prunable=prunable, later=later, spans=spans)
    record = Recorder(rows_to_keep(given, cut, 64))
    for i in range(2):
        record[i](q[i][:, :, :cut], k[i][:, :, :cut], v[i][:, :, :cut])
    reading = Reading(torch.arange(cut), record.k, record.v, record.q, record.rows, "x")
    for mask in (prunable, later):
        whole, on = Prefill(mask, chosen, spans=spans), PrefillOn(reading, mask, chosen, spans=spans)
        for i in range(2):
            expected = whole[i](q[i], k[i], v[i])
            out = on[i](q[i][:, :, cut:], k[i][:, :, cut:], v[i][:, :, cut:])
            torch.testing.assert_close(out, expected[:, :, cut:], **CLOSE)
        for a, b in zip(whole.layers, on.layers, strict=True):
            for name in FIELDS:
                torch.testing.assert_close(getattr(b, name), getattr(a, name), rtol=1e-4, atol=1e-6)
        assert torch.equal(whole.prunable, on.prunable) and whole.shape == on.shape


def test_layers_come_in_order(model):
    reading = Watched(model, config()).read(prompt(100, 0), tokens=80)
    record = PrefillOn(reading, prompt(100, 0).prunable, config())
    with pytest.raises(ValueError, match="layer 1 called after 0 layers"):
        record[1](*[torch.zeros(1, 2, 20, 16)] * 3)
