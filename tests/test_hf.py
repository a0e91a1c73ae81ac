"""The cache in Hugging Face models: `model.generate(..., past_key_values=HybridKVCache(...))`."""

import copy
import json
import re
import threading
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hybridkv import BudgetError, Engine, HeadProfile, HybridConfig, budgeted_plan
from hybridkv.hf import HybridKVCache, calibrate
from hybridkv.hf_inputs import layouts
from hybridkv.hf_prompt import announced
from hybridkv.model import Processor, from_pretrained
from hybridkv.planning.policies import POLICIES
from tests.hf_world import IMAGE, MODELS, NEW, TEXT, VIDEO, World, built, run, sharpen, text_ids
from tests.test_parity import picture, reference_inputs, save_vlm

world = cache(built)
DOCUMENT = Path(__file__).parent.parent / "docs" / "huggingface.md"
each = pytest.mark.parametrize("name", MODELS)


def made(world: World, inputs=None, **how) -> HybridKVCache:
    return HybridKVCache(
        world.model, world.inputs if inputs is None else inputs, **({"max_new_tokens": NEW, "budget": 0.3} | how)
    )


@each
def test_everything_kept_is_the_full_cache(name, monkeypatch):
    its, calls = world(name), []
    attend = HybridKVCache.attend

    def counting(self, index, *args):
        calls.append(index)
        return attend(self, index, *args)

    monkeypatch.setattr(HybridKVCache, "attend", counting)
    kv = made(its, budget=1.0)
    tokens, logits = run(its.model, its.inputs, kv)
    assert torch.equal(tokens, its.tokens)
    assert (logits - its.logits).abs().max() < 1e-5
    assert its.logits.std() > 0.8 and len(set(tokens[0].tolist())) >= 8
    assert calls == list(range(kv.n_layers)) * NEW  # the last token is not read
    assert kv.n_layers == 2
    stats = kv.stats()
    assert stats.attended_tokens == its.inputs["input_ids"].shape[1]
    assert (stats.static_heads, stats.dynamic_heads) == (4, 0)


@each
def test_a_smaller_budget(name):
    its = world(name)
    kv = made(its)
    _, logits = run(its.model, its.inputs, kv)
    assert (logits[0] - its.logits[0]).abs().max() < 1e-5  # the prompt is read with dense attention
    assert (logits[1:] - its.logits[1:]).abs().max() > 0.1
    stats = kv.stats()
    keys = 2 * 2 * its.inputs["input_ids"].shape[1] * 16 * 4  # layers, heads, tokens, head_dim, float32
    assert stats.bytes.full == 2 * keys
    assert stats.bytes.step <= 0.3 * stats.bytes.full
    assert stats.dynamic_heads == 1 and 0 < stats.attended_tokens < 0.35 * its.inputs["input_ids"].shape[1]


@pytest.mark.parametrize("policy", POLICIES)
def test_policies(policy):
    its = world("Llama")
    profile = HeadProfile(*torch.rand(2, 2, 2))
    kv = made(its, policy=policy, budget=0.4, head_profile=profile if policy in ("sparsemm", "hybridkv") else None)
    tokens, _ = run(its.model, its.inputs, kv)
    share = kv.stats().bytes.step / kv.stats().bytes.full
    assert torch.equal(tokens, its.tokens) if policy == "full" else share <= 0.4


def test_a_policy_of_ones_own():
    its = world("Llama")
    kv = made(
        its, policy=lambda prefill: budgeted_plan(prefill, torch.ones(prefill.shape, dtype=torch.bool)), budget=0.6
    )
    run(its.model, its.inputs, kv)
    assert kv.stats().dynamic_heads == 4
    with pytest.raises(ValueError, match="must return a Plan"):
        run(its.model, its.inputs, made(its, policy=lambda prefill: None))


@pytest.mark.parametrize("name", ["Llama", "InternVL"])
def test_the_store_in_host_memory(name):
    """The same answer from the same chunks, and the device holds less."""
    its, tokens, stats = world(name), {}, {}
    for store in ("device", "host"):
        kv = made(its, store=store, budget=0.7, dynamic_share=0.5)
        tokens[store], stats[store] = run(its.model, its.inputs, kv)[0], kv.stats()
    assert stats["device"].dynamic_heads == stats["host"].dynamic_heads == 2
    assert stats["device"].bytes.host == 0 < stats["host"].bytes.host
    assert stats["host"].bytes.resident <= 0.7 * stats["host"].bytes.full < stats["device"].bytes.resident
    kv.reset()
    assert torch.equal(run(its.model, its.inputs, kv)[0], tokens["host"])


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A Qwen2.5-VL of transformers, ours with the same weights, and the processor."""
    folder = tmp_path_factory.mktemp("pair")
    theirs = save_vlm(folder, 4, 2, False)
    theirs.set_attn_implementation("hybridkv")
    return theirs, from_pretrained(folder, progress=False), Processor.from_pretrained(folder)


@pytest.mark.parametrize(
    "what, store",
    [("picture", "device"), ("picture", "host"), ("clip", "device"), ("batch", "device"), ("batch", "host")],
)
def test_it_equals_our_engine(pair, what, store):
    theirs, model, processor = pair
    clip = [picture(112, 84, i) for i in range(4)]
    asked = {
        "picture": [processor("What is it?", images=[picture(500, 400)])],
        "clip": [processor("What happens?", images=[picture(300, 300)], videos=[clip])],
        "batch": [processor("?", images=[picture(500, 300)]), processor("And what?", images=[picture(400, 420)])],
    }[what]
    budget = dict(budget=0.3, strict=False, store=store)
    engine = Engine(model, HybridConfig(**budget), compile=False)
    results = engine.generate(asked, NEW)

    longest = max(len(prompt.input_ids) for prompt in asked)
    rows = [reference_inputs(model, prompt) for prompt in asked]
    per_token = ("input_ids", "attention_mask", "mm_token_type_ids")
    pad = lambda t: torch.nn.functional.pad(t, (longest - t.shape[1], 0))  # noqa: E731
    inputs = {k: torch.cat([pad(r[k]) if k in per_token else r[k] for r in rows]) for k in rows[0]}
    kv = HybridKVCache(theirs, inputs, max_new_tokens=NEW, **budget)
    tokens, _ = run(theirs, inputs, kv, eos_token_id=None, pad_token_id=0)
    assert [r.token_ids for r in results] == tokens.tolist()
    stats = kv.stats()
    assert (stats.static_heads, stats.dynamic_heads) == (engine.stats.static_heads, engine.stats.dynamic_heads)
    assert stats.attended_tokens == engine.stats.attended_tokens
    assert stats.bytes == engine.stats.bytes
    assert stats.bytes.step < 0.5 * stats.bytes.full


def test_a_batch_padded_on_the_left():
    """Each sequence gets what it gets alone."""
    its, lengths = world("Llama"), (260, 300, 290)
    ids = text_ids(300, batch=3, seed=5)
    mask = torch.stack([torch.arange(300) >= 300 - n for n in lengths]).long()
    batch = {"input_ids": ids * mask, "attention_mask": mask}
    kv = made(its, batch)
    _, logits = run(its.model, batch, kv, pad_token_id=0)
    attended = []
    for b, n in enumerate(lengths):
        alone = {"input_ids": ids[b : b + 1, 300 - n :]}
        other = made(its, alone)
        _, expected = run(its.model, alone, other)
        assert (logits[:, b] - expected[:, 0]).abs().max() < 1e-4
        attended.append(other.stats().attended_tokens)
    assert kv.stats().attended_tokens == pytest.approx(sum(attended) / 3)


def test_sampling_streaming_and_stopping():
    its = world("Llama")

    class Streamer(hf.generation.BaseStreamer):
        def __init__(self):
            self.got: list[Tensor] = []

        def put(self, value):
            self.got.append(value.clone().flatten())

        def end(self):
            self.got.append(torch.tensor([-1]))

    def answers(kv, **more):
        torch.manual_seed(3)
        how = dict(max_new_tokens=NEW, do_sample=True, temperature=1.5, num_return_sequences=3) | more
        return its.model.generate(**its.inputs, past_key_values=kv, **how)[:, 300:]

    kept = made(its, budget=1.0, num_return_sequences=3)
    expected = answers(hf.DynamicCache(config=its.model.config))
    assert torch.equal(answers(kept), expected) and len({tuple(row) for row in expected.tolist()}) == 3
    kept.reset()
    stop = hf.StoppingCriteriaList([lambda ids, scores: torch.full((3,), ids.shape[1] >= 306)])
    assert torch.equal(answers(kept, stopping_criteria=stop), expected[:, :6])
    streamer = Streamer()
    kept = made(its, budget=1.0)
    got = its.model.generate(**its.inputs, past_key_values=kept, max_new_tokens=5, do_sample=False, streamer=streamer)
    assert torch.cat(streamer.got[1:]).tolist() == [*got[0, 300:].tolist(), -1]


def test_sequences_that_end_early():
    its = world("Llama")
    ids = {"input_ids": text_ids(300, batch=2, seed=8)}
    first, _ = run(its.model, ids, made(its, ids))
    end = int(first[0, 3])
    tokens, _ = run(its.model, ids, made(its, ids), eos_token_id=end, pad_token_id=0)
    for b in range(2):
        row = first[b].tolist()
        upto = row.index(end) + 1 if end in row else len(row)
        assert tokens[b, :upto].tolist() == row[:upto]


def test_embeddings_for_ids():
    its = world("Llama")
    inputs = {"inputs_embeds": its.model.get_input_embeddings()(its.inputs["input_ids"])}
    tokens, _ = run(its.model, inputs, made(its, inputs))
    expected, _ = run(its.model, its.inputs, made(its))
    assert torch.equal(tokens, expected)
    vlm = world("InternVL")
    inputs = {"inputs_embeds": vlm.model.get_input_embeddings()(vlm.inputs["input_ids"])}
    with pytest.raises(ValueError, match="do not say where pictures are"):
        made(vlm, inputs)
    made(vlm, inputs, prunable=vlm.inputs["input_ids"] == IMAGE)


@pytest.mark.parametrize("name, chunk", [("Llama", 64), ("Llama", 299), ("Llama", 23), ("Gemma 3 text", 64)])
def test_a_prompt_in_chunks(name, chunk):
    """A last chunk of one token is no decoding step."""
    its = world(name)
    ids = torch.cat((its.inputs["input_ids"], text_ids(300, seed=9)))
    mask = torch.ones_like(ids)
    mask[0, :40] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    whole, expected = run(its.model, inputs, made(its, inputs), pad_token_id=0)
    kv = made(its, inputs)
    tokens, logits = run(its.model, inputs, kv, prefill_chunk_size=chunk, pad_token_id=0)
    assert torch.equal(tokens, whole)
    assert (logits - expected).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["InternVL", "Qwen2.5-VL"])
def test_pictures_in_chunks(name):
    """transformers reads them in chunks where it knows how, and says so where it does not."""
    its = world(name)
    try:
        tokens, _ = run(its.model, its.inputs, made(its), prefill_chunk_size=64)
    except (ValueError, NotImplementedError) as refusal:
        assert "prefill" in str(refusal).lower()
    else:
        assert torch.equal(tokens, run(its.model, its.inputs, made(its))[0])


@pytest.mark.parametrize("name", ["Llama", "Gemma 3", "Qwen2.5-VL"])
def test_another_prompt_in_the_same_memory(name):
    its = world(name)
    kv = made(its)
    first, _ = run(its.model, its.inputs, kv)
    store = kv._store
    with pytest.raises(RuntimeError, match=r"cache\.reset"):
        run(its.model, its.inputs, kv)
    kv.reset()
    assert torch.equal(run(its.model, its.inputs, kv)[0], first)
    other = its.inputs | {"input_ids": its.inputs["input_ids"].clone()}
    other["input_ids"][0, -3:] = torch.tensor([7, 8, 9])
    kv.reset(other)
    tokens, _ = run(its.model, other, kv)
    assert kv._store is store
    assert torch.equal(tokens, run(its.model, other, made(its, other))[0])


def test_inference_mode():
    its = world("Llama")
    kv = made(its)
    with torch.inference_mode():
        first, _ = run(its.model, its.inputs, kv)
    kv.reset()
    assert torch.equal(run(its.model, its.inputs, kv)[0], first)


@pytest.mark.skipif(not DOCUMENT.exists(), reason="needs a checkout")
def test_what_the_document_says_runs():
    """The code in docs/huggingface.md, on a prompt that is long enough for a tenth."""
    code = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(encoding="utf-8"), re.S | re.M)[0]
    space = {"model": copy.deepcopy(world("Llama").model), "inputs": {"input_ids": text_ids(1500)}}
    space["model"].set_attn_implementation("sdpa")
    printed: list = []
    exec(code, space | {"print": printed.append})
    assert printed[0].bytes.step <= 0.1 * printed[0].bytes.full


def test_a_larger_batch_after_a_small_one():
    its = world("Gemma 3 text")
    kv = made(its)
    run(its.model, its.inputs, kv)
    both = {"input_ids": text_ids(420, batch=2, seed=4)}
    with pytest.raises(ValueError, match="prunable goes with inputs"):
        kv.reset(prunable=torch.ones(300, dtype=torch.bool))
    kv.reset(both, max_new_tokens=8)
    tokens, _ = run(its.model, both, kv, new=8)
    assert torch.equal(tokens, run(its.model, both, made(its, both), new=8)[0])


def test_after_a_failure_the_cache_can_be_used():
    its = world("Llama")
    short = {"input_ids": text_ids(60)}
    kv = made(its, short, budget=0.05)
    with pytest.raises(BudgetError):
        run(its.model, short, kv)
    with pytest.raises(BudgetError):
        run(its.model, short, kv)
    kv.reset(its.inputs, max_new_tokens=4)
    assert run(its.model, its.inputs, made(its, strict=False, budget=0.05), new=4)[0].shape == (1, 4)


def test_caches_and_threads_do_not_meet():
    its, seeds = world("Llama"), range(4)
    prompts = [{"input_ids": text_ids(200 + 20 * seed, seed=seed)} for seed in seeds]
    expected = [run(its.model, prompt, made(its, prompt, budget=0.3, strict=False))[0] for prompt in prompts]
    answers: dict[int, Tensor] = {}

    def work(n):
        kv = made(its, prompts[n], budget=0.3, strict=False)
        other = {"input_ids": prompts[n]["input_ids"] % 100 + 1}
        with torch.no_grad(), pytest.raises(ValueError, match="another prompt"):
            run(its.model, other, kv)
        with torch.no_grad():
            answers[n] = run(its.model, prompts[n], kv)[0]

    threads = [threading.Thread(target=work, args=(n,)) for n in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(answers[n], expected[n]) for n in seeds)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    its = world("Llama")
    model = copy.deepcopy(its.model).to(dtype)
    _, expected = run(model, its.inputs, hf.DynamicCache(config=model.config), new=2)
    kv = HybridKVCache(model, its.inputs, budget=1.0, max_new_tokens=2)
    _, logits = run(model, its.inputs, kv, new=2)
    assert kv._store.pools[0].keys.dtype == dtype
    assert (logits - expected).abs().max() < 32 * torch.finfo(dtype).eps * expected.abs().max()


def test_what_may_be_pruned():
    its = world("Llama")
    kv = made(its, prunable=torch.arange(300) < 200, budget=0.5)
    assert int(kv._announced.layouts[0].prunable.sum()) == 200
    run(its.model, its.inputs, kv)
    assert kv.stats().attended_tokens > 100
    assert int(made(its)._announced.layouts[0].prunable.sum()) == 300 - HybridConfig().window


def test_head_profiles():
    its = world("Qwen3")
    samples = [{"input_ids": text_ids(150, seed=n)} for n in range(2)]
    profile = calibrate(its.model, samples, max_new_tokens=4, budget=0.3)
    assert profile.need.shape == profile.visual.shape == (2, 2) and profile.prompts == 2
    assert profile.need.max() > 0 and (profile.visual > 0).all() and (profile.visual < 1).all()
    kv = made(its, head_profile=profile)
    run(its.model, its.inputs, kv)
    dynamic = kv._plans[0].dynamic
    assert int(dynamic.sum()) == 1 and bool(dynamic.view(-1)[profile.need.argmax()])
    assert not kv._prefill and kv._ahead  # planned before the prompt was read


def test_calibrate_measures_as_ours(pair):
    from hybridkv.calibrate import calibrate as ours

    theirs, model, processor = pair
    prompt = processor("What is it?", images=[picture(300, 200)])
    expected = ours(model, [prompt], HybridConfig(budget=0.3, strict=False), (), 5)
    eos, theirs.generation_config.eos_token_id = theirs.generation_config.eos_token_id, None
    profile = calibrate(theirs, [reference_inputs(model, prompt)], max_new_tokens=5)
    theirs.generation_config.eos_token_id = eos
    assert torch.allclose(profile.need, expected.need, atol=1e-4)
    assert torch.allclose(profile.visual, expected.visual, atol=1e-5)


def test_calibrate_with_sliding_layers():
    its = world("Gemma 3 text")
    profile = calibrate(its.model, [its.inputs["input_ids"]], max_new_tokens=3)
    assert profile.need.shape == (2, 2)
    with pytest.raises(ValueError, match="sample 0 must be one prompt"):
        calibrate(its.model, [text_ids(40, batch=2)])
    with pytest.raises(ValueError, match="not str"):
        calibrate(its.model, ["a text"])
    with pytest.raises(ValueError, match="prunes nothing"):
        calibrate(its.model, [text_ids(40)], budget=1.0)


# What is refused


def test_attention_left_as_it_was():
    its = world("Llama")
    model = copy.deepcopy(its.model)
    kv = HybridKVCache(model, its.inputs, max_new_tokens=NEW)
    for other in ("sdpa", "eager"):
        model.set_attn_implementation(other)
        with pytest.raises(RuntimeError, match="set_attn_implementation"):
            HybridKVCache(model, its.inputs, max_new_tokens=NEW)
        with pytest.raises(TypeError, match="set_attn_implementation"):
            run(model, its.inputs, kv)


def test_stock_caches_work_as_before():
    its = world("Llama")
    tokens, logits = run(its.model, its.inputs, hf.DynamicCache(config=its.model.config))
    assert torch.equal(tokens, its.tokens) and torch.equal(logits, its.logits)
    static = hf.StaticCache(config=its.model.config, max_cache_len=330)
    assert torch.equal(run(its.model, its.inputs, static)[0], its.tokens)


@pytest.mark.parametrize(
    "how, message",
    [
        (dict(num_beams=2), "Beam search"),
        (dict(num_return_sequences=2, do_sample=True), "num_return_sequences"),
        (dict(prompt_lookup_num_tokens=3, eos_token_id=199), "assisted decoding"),
        (dict(max_new_tokens=NEW + 2), f"room for {NEW} new tokens"),
        (dict(use_cache=False), "use_cache=False"),
        (dict(output_attentions=True), "output_attentions"),
    ],
)
def test_ways_to_generate(how, message):
    its = world("Llama")
    with pytest.raises((NotImplementedError, ValueError, RuntimeError), match=message):
        its.model.generate(**its.inputs, past_key_values=made(its), **({"max_new_tokens": NEW} | how))


def test_beams_as_return_sequences_and_an_assistant():
    its = world("Llama")
    with pytest.raises(NotImplementedError, match="beam search"):
        kv = made(its, num_return_sequences=2)
        its.model.generate(**its.inputs, past_key_values=kv, max_new_tokens=NEW, num_beams=2)
    with pytest.raises((NotImplementedError, ValueError), match="assisted decoding"):
        its.model.generate(**its.inputs, past_key_values=made(its), max_new_tokens=NEW, assistant_model=its.model)


def test_a_prompt_that_the_cache_was_not_made_for():
    its = world("Llama")
    for tokens in (310, 200):
        with pytest.raises(ValueError, match="was made for prompts of 300 tokens"):
            run(its.model, {"input_ids": text_ids(tokens)}, made(its))
    mask = torch.ones(1, 300, dtype=torch.long)
    mask[0, :5] = 0
    with pytest.raises(ValueError, match="hides other tokens"):
        run(its.model, its.inputs | {"attention_mask": mask}, made(its), pad_token_id=0)
    with pytest.raises(ValueError, match="hides other tokens"):
        run(its.model, its.inputs, made(its, its.inputs | {"attention_mask": mask}), pad_token_id=0)
    with pytest.raises(ValueError, match="for 1 sequences, the model reads 2"):
        run(its.model, {"input_ids": text_ids(300, batch=2)}, made(its))


def computed(model: hf.PreTrainedModel) -> list:
    """What its decoder is asked from now on; the test's own hook stays in a copy."""
    calls: list = []
    model.get_decoder().register_forward_pre_hook(lambda *_: calls.append(0))
    return calls


@pytest.mark.parametrize("name", ["Llama", "Qwen2.5-VL", "Gemma 3"])
def test_another_prompt_of_the_same_length(name):
    """Refused before the decoder computes anything; the cache then still serves its own."""
    its = world(name)
    ids, model = its.inputs["input_ids"], copy.deepcopy(its.model)
    kv = HybridKVCache(model, its.inputs, budget=0.3, max_new_tokens=NEW)
    calls = computed(model)
    others = [ids.clone() for _ in range(3)]
    others[0][0, 0], others[1][0, -1] = ids[0, 0] + 1, ids[0, -1] - 1
    others[2][0] = ids[0].roll(1)  # pictures elsewhere
    for other in others:
        with pytest.raises(ValueError, match=r"another prompt than the cache was made for.*cache\.reset"):
            run(model, its.inputs | {"input_ids": other}, kv)
    assert not calls
    tokens, _ = run(model, its.inputs, kv)
    assert torch.equal(tokens, run(its.model, its.inputs, made(its))[0])
    kv.reset(its.inputs | {"input_ids": others[0]})
    with pytest.raises(ValueError, match="another prompt"):
        run(model, its.inputs, kv)
    run(model, its.inputs | {"input_ids": others[0]}, kv)


def test_another_prompt_by_other_ways():
    its = world("Llama")
    ids, other = its.inputs["input_ids"], text_ids(300, seed=1)
    embed = its.model.get_input_embeddings()
    both = made(its, {"input_ids": ids, "inputs_embeds": embed(ids)})
    for kv in (made(its, {"inputs_embeds": embed(ids)}), both):
        with pytest.raises(ValueError, match="another prompt"):
            run(its.model, {"inputs_embeds": embed(other)}, kv)
    with pytest.raises(ValueError, match="reads input_ids, the cache was made with inputs_embeds"):
        run(its.model, its.inputs, made(its, {"inputs_embeds": embed(ids)}))
    with pytest.raises(ValueError, match="reads inputs_embeds, the cache was made with input_ids"):
        run(its.model, {"inputs_embeds": embed(ids)}, made(its))
    late = torch.cat((ids[:, :200], other[:, 200:]), 1)
    for tokens in (other, late):  # in the first chunk, in a later one
        with pytest.raises(ValueError, match="another prompt"):
            run(its.model, {"input_ids": tokens}, made(its), prefill_chunk_size=64)
    with pytest.raises(ValueError, match="another prompt"):
        its.model(other, past_key_values=made(its))
    its.model(ids, past_key_values=made(its))
    written = ids.clone()
    kv = made(its, {"input_ids": written})
    written.copy_(other)
    with pytest.raises(ValueError, match="another prompt"):
        run(its.model, {"input_ids": written}, kv)
    two = made(its, num_return_sequences=2)
    run(its.model, its.inputs, two, num_return_sequences=2, do_sample=True)


def test_a_cache_in_another_model():
    its = world("Llama")
    with pytest.raises(ValueError, match="another model"):
        run(copy.deepcopy(its.model), its.inputs, made(its))
    with pytest.raises(ValueError, match="another model"):
        run(world("Mistral").model, its.inputs, made(its))


def test_several_tokens_after_the_prompt():
    its = world("Llama")
    kv = made(its)
    run(its.model, its.inputs, kv, new=3)
    with pytest.raises(RuntimeError, match="one token at a time, not 4"):
        its.model(input_ids=text_ids(4), past_key_values=kv)
    its.model(input_ids=text_ids(1), past_key_values=kv)  # which generating on would do


@pytest.mark.parametrize(
    "inputs, message",
    [
        ("a text", "not str"),
        ({}, "must hold input_ids"),
        ({"input_ids": [[1, 2]]}, "must hold input_ids"),
        ({"input_ids": text_ids(0)}, "a token at least"),
        ({"input_ids": text_ids(4), "attention_mask": torch.tensor([[1, 1, 1, 0]])}, "padded on the left"),
        ({"input_ids": text_ids(4), "attention_mask": torch.tensor([[1, 0, 1, 1]])}, "padded on the left"),
        ({"input_ids": text_ids(4), "attention_mask": torch.ones(1, 5)}, "attention_mask must be"),
        ({"input_ids": text_ids(4), "attention_mask": [[1] * 4]}, "attention_mask must be a tensor"),
        ({"input_ids": text_ids(4)[None]}, "must hold input_ids"),
        ({"input_ids": text_ids(4).to("meta")}, "must hold input_ids"),
        ({"input_ids": text_ids(4), "pixel_values": torch.ones(1)}, "no token of theirs"),
    ],
)
def test_inputs(inputs, message):
    with pytest.raises(ValueError, match=message):
        made(world("Llama"), inputs)


def test_settings():
    its = world("Llama")
    with pytest.raises(TypeError, match="bugdet"):
        made(its, bugdet=0.1)
    for how, message in (
        (dict(budget=2.0), "budget"),
        (dict(policy="dense"), "policy must be one of"),
        (dict(policy=["snapkv"]), "policy must be one of"),
        (dict(max_new_tokens=0), "max_new_tokens"),
        (dict(num_return_sequences=0), "num_return_sequences"),
        (dict(prunable=torch.ones(300)), "bool tensor"),
        (dict(prunable=torch.ones(299, dtype=torch.bool)), "prunable must be"),
    ):
        with pytest.raises(ValueError, match=message):
            made(its, **how)
    with pytest.raises(ValueError, match="inputs must be what generate gets"):
        HybridKVCache(its.model, None, max_new_tokens=4)
    with pytest.raises(ValueError, match="must be a model of transformers"):
        HybridKVCache(torch.nn.Linear(2, 2), its.inputs, max_new_tokens=4)
    with pytest.raises(RuntimeError, match="empty"):
        made(its).stats()


def test_copies_and_training():
    its = world("Llama")
    kv = made(its)
    run(its.model, its.inputs, kv)
    with pytest.raises(TypeError, match="can't be copied"):
        copy.deepcopy(kv)
    with pytest.raises(TypeError, match="can't be copied"):
        copy.copy(kv)
    for change in (kv.crop, kv.reorder_cache, kv.batch_repeat_interleave, kv.batch_select_indices):
        with pytest.raises(NotImplementedError, match="a hybridkv cache has no"):
            change(torch.tensor(1))
    model = copy.deepcopy(its.model)
    kv = HybridKVCache(model, its.inputs, max_new_tokens=NEW)
    model.train()
    with pytest.raises(RuntimeError, match="eval"):
        HybridKVCache(model, its.inputs, max_new_tokens=NEW)
    with pytest.raises(RuntimeError, match="eval"):
        model(**its.inputs, past_key_values=kv)
    model.eval()
    with torch.enable_grad(), pytest.raises(RuntimeError, match="no_grad"):
        model(**its.inputs, past_key_values=kv)


SINKS = dict(num_local_experts=2, num_experts_per_tok=1, head_dim=16, layer_types=["full_attention"] * 2)
MLA = dict(
    kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=12, n_routed_experts=4, n_group=1,
    topk_group=1, num_experts_per_tok=1, first_k_dense_replace=2, num_key_value_heads=4,
)  # fmt: skip


@pytest.mark.parametrize(
    "kind, more, message",
    [
        ("Gemma2", dict(head_dim=16), "soft-capped"),
        ("GptOss", SINKS, "sinks"),
        ("Mistral", dict(sliding_window=64), "all layers of this model are sliding"),
        ("DeepseekV3", MLA, "this model's own code touches the keys|keys and values of one shape"),
    ],
)
def test_models_that_can_not_be_served(kind, more, message):
    model = sharpen(getattr(hf, f"{kind}ForCausalLM")(getattr(hf, f"{kind}Config")(**(TEXT | more))))
    model.set_attn_implementation("hybridkv")
    inputs = {"input_ids": text_ids(80)}
    with pytest.raises((NotImplementedError, TypeError), match=message):
        run(model, inputs, HybridKVCache(model, inputs, max_new_tokens=4), new=4)


def test_encoder_decoders_and_other_layers():
    its = world("Llama")
    model = copy.deepcopy(its.model)
    model.config.is_encoder_decoder = True
    with pytest.raises(NotImplementedError, match="encoder"):
        HybridKVCache(model, its.inputs, max_new_tokens=4)
    model.config.is_encoder_decoder = False
    model.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(NotImplementedError, match="linear_attention"):
        HybridKVCache(model, its.inputs, max_new_tokens=4)
    model.config.layer_types = None
    model.lm_head.to("meta")  # as what is offloaded, or on another device
    with pytest.raises(NotImplementedError, match="weights are on cpu, meta"):
        HybridKVCache(model, its.inputs, max_new_tokens=4)


def test_keys_and_heads_that_differ():
    its = world("Llama")
    kv = made(its)
    with pytest.raises(NotImplementedError, match="keys and values of one shape"):
        kv.update(torch.ones(1, 2, 300, 16), torch.ones(1, 2, 300, 8), 0)
    with pytest.raises(NotImplementedError, match=r"one pool for both"), torch.autocast("cpu", torch.bfloat16):
        run(its.model, its.inputs, kv)
    q, k = torch.randn(1, 4, 300, 16), torch.randn(1, 2, 300, 16)
    module = its.model.model.layers[0].self_attn
    kv.attend(0, module, q, k, k, None, None)
    with pytest.raises(ValueError, match="layer 1 has keys"):
        kv.attend(1, module, q, q, q, None, None)


def test_a_model_that_touches_the_keys(monkeypatch):
    its = world("Llama")
    update = HybridKVCache.update

    def touching(self, k, v, *args, **kwargs):
        k, v = update(self, k, v, *args, **kwargs)
        return k * 2, v

    def looking(self, k, v, *args, **kwargs):
        k, v = update(self, k, v, *args, **kwargs)
        return torch.cat((k, k)), v

    for wrong in (touching, looking):
        monkeypatch.setattr(HybridKVCache, "update", wrong)
        with pytest.raises(TypeError):
            run(its.model, its.inputs, made(its))


def test_the_bench_measures_every_cache(tmp_path, capsys):
    from bench import huggingface

    config = hf.LlamaConfig(**TEXT)
    sharpen(hf.LlamaForCausalLM(config)).save_pretrained(tmp_path / "model")
    command = ["--model", str(tmp_path / "model"), "--contexts", "300", "--steps", "3", "--budget", "0.4"]
    with torch.compiler.set_stance("force_eager"):
        huggingface.main([*command, "--device", "cpu", "--out", str(tmp_path / "rows.jsonl")])
    rows = {row["contender"]: row for row in map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())}
    assert tuple(rows) == huggingface.CONTENDERS
    full = 2 * 2 * 2 * 300 * 16 * 4
    assert all(row["full_bytes"] == full and row["ms_per_token"] > 0 for row in rows.values())
    assert rows["dynamic"]["step_bytes"] == full < rows["static"]["step_bytes"]
    assert rows["eager"]["step_bytes"] == rows["hybridkv"]["step_bytes"] <= 0.4 * full
    assert "ms a token" in capsys.readouterr().out


# What is read off the inputs

CONFIG = hf.PretrainedConfig(image_token_id=IMAGE, video_token_id=VIDEO, vision_config=None)


def spans_of(ids: list[list[int]], config=CONFIG, **inputs) -> list[tuple]:
    found = layouts(config, {"input_ids": torch.tensor(ids), **inputs}, HybridConfig())
    for row, layout in zip(ids, found, strict=True):
        visual = torch.tensor([token in (IMAGE, VIDEO) for token in row])[layout.pad :]
        inside = torch.zeros(len(visual), dtype=torch.bool)
        for start, t, h, w in layout.spans:
            assert not inside[start : start + t * h * w].any()
            inside[start : start + t * h * w] = True
        assert torch.equal(inside, visual)  # no text in a span, no picture outside
    return [layout.spans for layout in found]


def test_spans_by_grids():
    """Grids of all sequences come one after the other; a row of a grid is in patches, two a token's side."""
    config = hf.PretrainedConfig(image_token_id=IMAGE, video_token_id=VIDEO)
    config.vision_config = hf.PretrainedConfig(spatial_merge_size=2)
    image, video = [IMAGE] * 6, [VIDEO] * 8
    rows = [[1, 2, *image, 3, *video, 4, 5], [1, *image, *image, *video[:4], 9, *video[4:], 4]]
    rows = [[0] * (23 - len(row)) + row for row in rows]
    mask = torch.tensor([[token > 0 for token in row] for row in rows]).long()
    grids = dict(
        image_grid_thw=torch.tensor([[1, 4, 6], [1, 6, 4], [1, 2, 12]]),
        video_grid_thw=torch.tensor([[2, 4, 4], [2, 4, 4]]),
    )
    first, second = spans_of(rows, config, attention_mask=mask, **grids)
    assert first == ((2, 1, 2, 3), (9, 2, 2, 2))
    assert second == ((1, 1, 3, 2), (7, 1, 1, 6), (13, 1, 2, 2), (18, 1, 2, 2))  # frames that lie apart
    for grids["image_grid_thw"] in (torch.tensor([[1, 4, 6]] * 4), torch.tensor([[1, 4, 6]] * 2)):
        with pytest.raises(ValueError, match="grid_thw"):
            spans_of(rows, config, attention_mask=mask, **grids)


def test_spans_by_runs():
    """Whole square tiles are pictures, other runs are lines."""
    assert spans_of([[IMAGE, IMAGE, 1, IMAGE, 2, 3]]) == [((0, 1, 1, 2), (3, 1, 1, 1))]
    config = hf.PretrainedConfig(image_token_id=IMAGE, image_seq_length=4)
    config.vision_config = None
    row = [5, *[IMAGE] * 8, 6, *[IMAGE] * 4, 7, *[IMAGE] * 5, 8]
    assert spans_of([row], config) == [((1, 2, 2, 2), (10, 1, 2, 2), (15, 1, 1, 5))]


@settings(max_examples=30)
@given(st.lists(st.lists(st.sampled_from([1, 2, IMAGE, VIDEO]), min_size=12, max_size=12), min_size=1, max_size=3))
def test_spans_hold_pictures_and_no_text(rows):
    spans_of(rows)


@settings(max_examples=30)
@given(st.data())
def test_one_other_token_is_noticed_in_the_chunk_that_holds_it(data):
    """By its id, or by its embedding, in whatever chunks a prompt comes."""
    batch, copies, tokens = (data.draw(st.integers(1, most)) for most in (3, 3, 40))
    chunk, row, place = (data.draw(st.integers(0, most - 1)) for most in (tokens, batch * copies, tokens))
    ids, table = text_ids(tokens, batch), torch.arange(200.0)[:, None].expand(200, data.draw(st.integers(1, 40)))
    other = ids.repeat_interleave(copies, 0)
    other[row, place] += 1
    inputs = {"input_ids": ids} if data.draw(st.booleans()) else {"inputs_embeds": table[ids]}
    known = announced(hf.PretrainedConfig(), inputs, HybridConfig(), None, copies)
    for prompt, differs in ((ids.repeat_interleave(copies, 0), False), (other, True)):
        for start in range(0, tokens, chunk + 1):
            part = prompt[:, start : start + chunk + 1]
            given = (part, None) if known.embeddings is None else (None, table[part])
            if differs and start <= place < start + chunk + 1:
                with pytest.raises(ValueError, match="another prompt"):
                    known.check(*given, start)
            else:
                known.check(*given, start)


def test_text_in_a_batch_with_pictures():
    """A prompt without pictures is text, whatever its neighbours are."""
    rows = [[3] * 40, [3] * 10 + [IMAGE] * 20 + [4] * 10]
    text, visual = layouts(CONFIG, {"input_ids": torch.tensor(rows)}, HybridConfig())
    assert text.prunable.tolist() == [True] * 8 + [False] * 32
    assert visual.prunable.tolist() == [False] * 10 + [True] * 20 + [False] * 10


# A real model


@pytest.fixture(scope="module")
def smollm2():
    """SmolLM2-135M and a document of 4,000 tokens with a question; what it answers with a `DynamicCache`."""
    root = Path(__file__).parent.parent
    if not (root / ".cache" / "smollm2" / "done").exists():
        pytest.skip("needs a model: python -m bench.real_models smollm2")
    folder = root / ".cache" / "smollm2"
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokenizer((root / "docs" / "quality.md").read_text(encoding="utf-8")).input_ids[:3970]
    ids += tokenizer("\n\nIn one sentence, the text above is about").input_ids
    inputs = {"input_ids": torch.tensor([ids])}
    tokens, logits = run(model, inputs, hf.DynamicCache(config=model.config), new=12)
    model.set_attn_implementation("hybridkv")
    return World(model, inputs, tokens, logits)


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_smollm2_on_a_long_document(smollm2, policy):
    config = smollm2.model.config
    profile = HeadProfile(*torch.rand(2, config.num_hidden_layers, config.num_key_value_heads))
    kv = made(smollm2, policy=policy, budget=0.1, head_profile=profile if policy in ("sparsemm", "madakv") else None)
    tokens, logits = run(smollm2.model, smollm2.inputs, kv, new=12)
    stats = kv.stats()
    assert torch.isfinite(logits).all()
    if policy == "full":
        assert torch.equal(tokens, smollm2.tokens) and (logits - smollm2.logits).abs().max() < 1e-3
    else:
        assert stats.bytes.step <= 0.1 * stats.bytes.full
        assert (logits[1] - smollm2.logits[1]).abs().max() > 1e-3
