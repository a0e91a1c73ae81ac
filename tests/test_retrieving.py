"""Layers that retrieve and layers that do not, compiled: two regions, of which one has no retrieval in it."""

import re

import pytest
import torch

from bench.kernels import regions
from demo.tiny_vlm import config as tiny_config
from demo.tiny_vlm import random_model
from hybridkv import Engine, HeadProfile, HybridConfig
from tests.lab import compiler_output, layer_traces, prompt, same_chunks

NEED = torch.tensor([[0.1, 0.2], [5.0, 0.0], [0.3, 3.0], [0.0, 0.2]])


@pytest.mark.compiles
def test_only_layers_that_retrieve_have_retrieval_in_their_graph():
    model = random_model(tiny_config(layers=4, hidden_size=96, heads=6, kv_heads=2, head_dim=16, tie=False))
    model.join()
    config = HybridConfig(budget=0.4, head_profile=HeadProfile(NEED, NEED), retrieving_layers=0.5)
    plain, engine = Engine(model, config, compile=False), Engine(model, config)
    expected = plain.generate([prompt(900, 0)], 40)
    before = layer_traces()
    with compiler_output() as code:
        found = engine.generate([prompt(900, 0)], 40)
    assert [r.token_ids for r in found] == [r.token_ids for r in expected] and len(set(expected[0].token_ids)) > 5
    same_chunks(engine.cache, plain.cache)
    code = "\n".join(code)
    assert code.count("std::vector<int> kv_indice_list(") == 2  # FlexAttention's loop, once in each region
    assert code.count("while should_loop:") == 1  # the loop over dynamic lanes
    # q, k and v in one matmul, gate and up in another, one behind each of attention and MLP; last that of the logits
    if torch.__version__ >= "2.13":  # older compilers call the layers' kernels otherwise
        # The model takes eight: those matmuls, two norms, silu, and the last sum. So two are attention's own, and five.
        assert [len(kernels) for kernels, _ in sorted(regions(code), key=lambda each: len(each[0]))] == [10, 13]
    assert len(re.findall(r"extern_kernels\.(?:mm|addmm)\(", code)) == 2 * 4 + 1
    if torch.__version__ >= "2.13":  # older compilers trace every layer
        assert layer_traces() - before == 2
    with torch.compiler.set_stance("fail_on_recompile"):
        engine.generate([prompt(890, 1)], 20)
