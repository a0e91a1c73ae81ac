"""The code that a GPU would run, written without one. Skipped where torch was not built for CUDA."""

import pytest
import torch

from bench import gpu_code
from tests.lab import KERNELS, kernels_of_layers

pytestmark = [
    pytest.mark.skipif(not gpu_code.can_write(), reason="torch was not built for CUDA"),
    pytest.mark.slow,
]


@pytest.mark.parametrize("store", KERNELS)
def test_the_step_compiles_for_a_gpu(store, capsys):
    """Every kernel of it; there may be fewer."""
    (other, retrieving), out = kernels_of_layers(capsys, store, "--as-gpu")
    assert other <= KERNELS[store][0] and retrieving <= KERNELS[store][1]
    assert "kernels compile for the NVIDIA H200" in out and "flex_attention" in out


def test_what_is_no_gpu_is_none_afterwards():
    there = torch.cuda.is_available()
    with gpu_code.as_gpu():
        assert torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    assert torch.cuda.is_available() == there
