"""A Hugging Face model's compiled decoding step: one graph, the uncompiled tokens, no recompilation."""

import copy

import pytest
import torch
import transformers as hf
from torch import Tensor
from torch._dynamo.utils import counters

from hybridkv.hf import HybridKVCache, compile
from tests.hf_world import built, run, text_ids
from tests.lab import GPU, layer_traces

pytestmark = pytest.mark.compiles


def answers(model: hf.PreTrainedModel, prompts: list[dict]) -> list[Tensor]:
    caches = [HybridKVCache(model, inputs, budget=0.3, max_new_tokens=24) for inputs in prompts]
    return [run(model, inputs, kv)[0] for inputs, kv in zip(prompts, caches, strict=True)]


def test_one_graph_for_every_step_and_prompt():
    model = copy.deepcopy(built("Llama").model)
    prompts = [{"input_ids": text_ids(tokens, seed=tokens)} for tokens in (300, 301, 299)]
    expected = answers(model, prompts)
    compile(model)
    counters.clear()
    traces = layer_traces()
    kv = HybridKVCache(model, prompts[0], budget=0.3, max_new_tokens=24)
    assert torch.equal(run(model, prompts[0], kv)[0], expected[0])
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    if torch.__version__ >= "2.13":  # older compilers trace every layer
        assert layer_traces() - traces == 1
    with torch.compiler.set_stance("fail_on_recompile"):
        for inputs, tokens in zip(prompts[1:], expected[1:], strict=True):
            kv.reset(inputs)
            assert torch.equal(run(model, inputs, kv)[0], tokens)
        another = HybridKVCache(model, prompts[0], budget=0.3, max_new_tokens=24)
        assert torch.equal(run(model, prompts[0], another)[0], expected[0])
    kv.reset()
    with pytest.raises(RuntimeError, match="leave out prefill_chunk_size"):  # which transformers would compile
        run(model, prompts[2], kv, prefill_chunk_size=64)


@pytest.mark.slow
@pytest.mark.parametrize("name, graphs", [("Qwen2.5-VL", 1), ("Gemma 3 text", 2)])
def test_other_models(name, graphs):
    """Sliding layers count their tokens in Python: the first step's count, then any."""
    its = built(name)
    expected = answers(its.model, [its.inputs])
    model = its.model
    compile(model)
    counters.clear()
    kv = HybridKVCache(model, its.inputs, budget=0.3, max_new_tokens=24)
    assert torch.equal(run(model, its.inputs, kv)[0], expected[0])
    assert counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"]
    kv.reset()
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(run(model, its.inputs, kv)[0], expected[0])


@pytest.mark.parametrize("name", [pytest.param(name, marks=GPU) for name in ("Llama", "Qwen2.5-VL", "Gemma 3 text")])
def test_generate_on_a_gpu_compiles_by_itself(name):
    its = built(name)
    model = copy.deepcopy(its.model).cuda()
    inputs = {key: value.cuda() for key, value in its.inputs.items()}
    model.set_attn_implementation("sdpa")
    expected, _ = run(model, inputs, hf.DynamicCache(config=model.config))
    model.set_attn_implementation("hybridkv")
    counters.clear()
    for store in ("device", "host"):
        kv = HybridKVCache(model, inputs, budget=1.0, max_new_tokens=24, store=store)
        assert torch.equal(run(model, inputs, kv)[0], expected)
        assert counters["stats"]["unique_graphs"] > 0
        kv = HybridKVCache(model, inputs, budget=0.6, max_new_tokens=24, store=store)
        compiled, _ = run(model, inputs, kv)
        kv.reset()
        assert torch.equal(compiled, run(model, inputs, kv, disable_compile=True)[0])
