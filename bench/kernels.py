"""How many kernels a layer takes, and which: read from the code that the compiler writes, so without a GPU, too.

    python -m bench.kernels --layers 4 --retrieving-layers 0.5
    python -m bench.kernels --layers 4 --retrieving-layers 0.5 --dtype bfloat16 --as-gpu --store host

A kernel of a large model takes microseconds, and is launched in every layer: on a GPU their number counts for as much
as their bytes. On a CPU scoring is a loop over lanes, which a GPU does not have: its kernels are counted apart, once.
Wants two layers of each kind: code that is used once is written into the step. With --as-gpu the code is a GPU's, and
every kernel is compiled for it: for that torch must be built for CUDA, but there need not be a GPU (`bench.gpu_code`).
"""

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor.graph import GraphLowering
from torch.profiler import ProfilerActivity, profile

from bench import gpu_code
from bench.common import add_model_arguments, make_model, random_prefill, spread_profile
from hybridkv.config import HybridConfig
from hybridkv.engine import Engine
from hybridkv.sampling import Sampling

FUNCTION = re.compile(r"^ *def (\w+)\(", re.M)
KERNEL = r"(?:cpp|triton)_(?!helpers)\w+|extern_kernels\.\w+|(?:torch\.ops\.)?aten\.\w+"
CALL = re.compile(rf"^ +(?:\w+ = )?({KERNEL})[\w.]*\(", re.M)
LAYER = re.compile(r"subgraph_\d+$")


@contextmanager
def compiler_output() -> Iterator[list[str]]:
    """What the compiler writes meanwhile, module by module. From a cache would come no code, so there is none."""
    code: list[str] = []
    with (
        inductor_config.patch(fx_graph_cache=False),
        functorch_config.patch(enable_autograd_cache=False),
        patch.object(GraphLowering, "save_output_code", code.append),
    ):
        yield code


def calls(code: str) -> dict[str, list[str]]:
    """The kernels that each function of a compiled module calls, in order."""
    starts = [*FUNCTION.finditer(code)]
    ends = [start.start() for start in starts[1:]] + [len(code)]
    found = {start[1]: CALL.findall(code, start.end(), end) for start, end in zip(starts, ends, strict=True)}
    return {name: kernels for name, kernels in found.items() if kernels}


def regions(code: str) -> list[tuple[list[str], list[str]]]:
    """For each kind of layer that was compiled, its kernels, and those of its loop over lanes."""
    each = calls(code)
    return [
        (kernels, [k for other, inner in each.items() if other.startswith(f"{name}_while_loop") for k in inner])
        for name, kernels in each.items()
        if LAYER.search(name)
    ]


def launched(run: Callable[[], object]) -> int:
    """CUDA kernels that a call runs; copies and fills of memory are none."""
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        run()
        torch.cuda.synchronize()
    spent = [e for e in record.key_averages() if e.self_device_time_total > 0]
    return sum(e.count for e in spent if not e.key.startswith(("Memcpy", "Memset")))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--budget", type=float, default=0.1)
    parser.add_argument("--retrieving-layers", type=float, default=0.5)
    parser.add_argument("--store", choices=("device", "host"), default="device")
    parser.add_argument("--as-gpu", action="store_true", help="the code of a GPU, see above")
    add_model_arguments(parser)
    args = parser.parse_args(argv)
    if args.as_gpu and not gpu_code.can_write():
        parser.error("--as-gpu wants a torch that was built for CUDA")
    args.device = "cpu" if args.as_gpu else args.device
    model = make_model(args)
    profile = spread_profile(model.cfg, args.retrieving_layers)
    settings = dict(budget=args.budget, head_profile=profile, retrieving_layers=args.retrieving_layers)
    engine = Engine(model, HybridConfig(store=args.store, **settings), compile=not args.as_gpu)
    with torch.no_grad():
        engine.load([random_prefill(model, args.context, engine.config, b) for b in range(args.batch)], 8)
        engine.begin([args.context] * args.batch, 8, Sampling(), model.device)
        if args.as_gpu:
            with gpu_code.as_gpu():
                code = gpu_code.step_code(engine)
                shared = gpu_code.build(code)
        else:
            with compiler_output() as written:
                engine.step()
            code, shared = "\n".join(written), {}
    for kernels, loop in regions(code):
        print(f"{len(kernels)} kernels in a layer" + f", and {len(loop)} in each turn of its loop" * bool(loop))
        print("\n".join([f"    {name[:110]}" for name in kernels] + [f"        {name[:106]}" for name in loop]))
    if shared:
        most = max(shared.values())
        print(f"{len(shared)} kernels compile for the {gpu_code.H200.name}, with up to {most:,} bytes of shared memory")


if __name__ == "__main__":
    main()
