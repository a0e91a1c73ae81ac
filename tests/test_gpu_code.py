"""The code that a GPU would run, written without one. Skipped where torch was not built for CUDA."""

import pytest
import torch

from bench import gpu_code, kernels

pytestmark = [
    pytest.mark.skipif(not gpu_code.can_write(), reason="torch was not built for CUDA"),
    pytest.mark.slow,
]


@pytest.mark.parametrize("store, retrieving", [("device", 22), ("host", 31)])
def test_the_step_compiles_for_a_gpu(store, retrieving, capsys):
    """Every kernel of it; there may be fewer."""
    small = ["--hidden-size", "256", "--intermediate-size", "256", "--vocab-size", "128", "--dtype", "bfloat16"]
    kernels.main(["--layers", "4", "--context", "2048", "--as-gpu", "--store", store, *small])
    out = capsys.readouterr().out
    counts = sorted(int(line.split()[0]) for line in out.splitlines() if "kernels in a layer" in line)
    assert len(counts) == 2 and counts[0] <= 15 and counts[1] <= retrieving
    assert "kernels compile for the NVIDIA H200" in out and "flex_attention" in out


def test_what_is_no_gpu_is_none_afterwards():
    there = torch.cuda.is_available()
    with gpu_code.as_gpu():
        assert torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    assert torch.cuda.is_available() == there
