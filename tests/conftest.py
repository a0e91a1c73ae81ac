"""Fixtures: tiny checkpoints, made once for the whole run. And what makes runs alike: threads, caches, seeds."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from demo import tiny_vlm

# Tensors here are so small that a second thread only waits for the first, and on a busy machine waits long. Compilers
# write their code for one thread, too, and the environment is for child processes.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# The same examples at every run, so that a change is judged by what it changed. To look for new ones, and for more:
# python -m pytest --hypothesis-profile=explore
settings.register_profile("repeat", derandomize=True, deadline=None, database=None)
settings.register_profile("explore", derandomize=False, deadline=None, max_examples=1000)
settings.load_profile("repeat")


def pytest_configure(config: pytest.Config) -> None:
    """Nothing that an earlier run compiled or measured is used; what one test compiles, another may take.

    (Workers share it, and child processes.)
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:
        config.caches = tempfile.mkdtemp(prefix="hybridkv-")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(config.caches) / "compiled")
        os.environ["HYBRIDKV_CACHE"] = str(Path(config.caches) / "profiles")


def pytest_unconfigure(config: pytest.Config) -> None:
    if folder := getattr(config, "caches", None):
        shutil.rmtree(folder, ignore_errors=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item):
    """Coverage's tracer makes the compiler, which is Python, half as slow again: tests marked `compiles` go without."""
    tracer = sys.gettrace()
    if item.get_closest_marker("compiles"):
        sys.settrace(None)
    try:
        return (yield)
    finally:
        sys.settrace(tracer)


# Random numbers do not depend on which tests ran before.


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup() -> None:
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint folder in the published Qwen2.5-VL layout, with an untied output."""
    folder = tmp_path_factory.mktemp("vlm")
    tiny_vlm.save(folder, tiny_vlm.config(layers=2, hidden_size=96, tie=False))
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny text-only Llama-style checkpoint, written by transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=96,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=tiny_vlm.token_id("<|im_end|>"),
    )
    model = LlamaForCausalLM(config)
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.2)
    model.save_pretrained(folder)
    tiny_vlm.save_processing(folder)
    return folder
