"""Options of the compiler, to be timed beside its defaults.

    --inductor coordinate_descent_tuning=1 max_autotune_gemm=1+max_autotune_gemm_backends=ATEN,TRITON

What they could do for a decoding step, whose matmuls have a row for each sequence: with `coordinate_descent_tuning`,
matmuls of one row are written as reductions on a GPU, and kernels' sizes are searched for; with `max_autotune_gemm`
templates are timed against the library; `b2b_gemm_pass` joins two matmuls; `combo_kernels` launches kernels that need
not wait for each other together. (Names of `torch._inductor.config`, the same in torch 2.11 and 2.13.)
"""

import argparse

import torch
from torch._inductor import config

Options = dict[str, bool | int | float | str]


def inductor_options(text: str) -> Options:
    """`NAME=VALUE`, several joined by `+`, as the compiler takes them."""
    known, options = config.get_config_copy(), {}
    for pair in text.split("+"):
        name, _, value = pair.partition("=")
        if name not in known:
            raise argparse.ArgumentTypeError(f"the compiler of torch {torch.__version__} has no option {name!r}")
        kind = type(known[name])
        if kind not in (bool, int, float, str):
            raise argparse.ArgumentTypeError(f"{name} takes more than a number or a word")
        try:
            options[name] = {"0": False, "1": True}[value] if kind is bool else kind(value)
        except (KeyError, ValueError):
            takes = "0 or 1" if kind is bool else f"a value of type {kind.__name__}"
            raise argparse.ArgumentTypeError(f"{name} takes {takes}, got {value!r}") from None
    return options


def named(options: Options) -> str:
    """As they are written on the command line, behind a contender's name; nothing for the defaults."""
    pairs = [f"{name}={int(value) if isinstance(value, bool) else value}" for name, value in options.items()]
    return f" {'+'.join(pairs)}" if pairs else ""
