"""The code that a GPU would run, written and compiled without one, by any torch that was built for CUDA.

The compiler is given tensors without contents, on a device that is said to be an H200, and is stopped once its code is
written. Triton then compiles that code for the device. What is not seen is what the compiler would time on the device
before it chooses: whether matmuls are padded, and tiles.

    with as_gpu():
        code = step_code(engine)
        built = build(code)

`python -m bench.kernels --as-gpu` prints both.
"""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor.codecache import PyCodeCache
from torch._inductor.fx_passes import joint_graph
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hybridkv.decode import compiled_step
from hybridkv.engine import Engine

# An H200, as torch.cuda.get_device_properties describes it.
H200 = SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    total_memory=141 << 30,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block_optin=232448,
    L2_cache_size=60 << 20,
)
KERNEL = re.compile(r"^(\w+) = async_compile\.triton\('\w+', '''(.*?)''', device_str='cuda'\)", re.M | re.S)


def can_write() -> bool:
    """Whether this torch was built for CUDA."""
    return torch.version.cuda is not None


class Written(Exception):
    """The compiler has written its code: `args[0]`, and `args[1]` is why CUDA graphs could not run it, or None."""


class OnCPU(TorchDispatchMode):
    """Constants that the compiler works out while it compiles."""

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return f(*args, **kwargs | {"device": torch.device("cpu")} if "device" in kwargs else kwargs)


@contextmanager
def as_gpu() -> Iterator[None]:
    """Torch's compiler and Triton believe that there is an H200. Nothing can run on it."""
    from torch._inductor.runtime import triton_helpers
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    torch._C._ensureCUDADeviceGuardSet()  # as FakeTensorMode does where there is no device
    patterns, deduce = joint_graph.lazy_init, joint_graph.UniformValueConstantFolder._deduce_value

    def on_cpu(self, node):
        with OnCPU():
            return deduce(self, node)

    def stop(graph: GraphLowering, code) -> None:
        raise Written(code.value, graph.disable_cudagraphs_reason)

    target = GPUTarget("cuda", 10 * H200.major + H200.minor, H200.warp_size)
    driver_says = SimpleNamespace(get_current_target=lambda: target, get_current_device=lambda: 0)
    cuda_says = {
        "_lazy_init": None,
        "device_count": 1,
        "is_initialized": True,
        "_get_device_properties": H200,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
    }
    runtime_says = {"_cuda_getDeviceCount": 1, "_cuda_getDevice": 0, "_cuda_setDevice": None}
    with ExitStack() as patches:

        def put(where: object, name: str, value: object) -> None:
            patches.enter_context(patch.object(where, name, value, create=True))

        for where, says in ((torch.cuda, cuda_says), (torch._C, runtime_says)):
            for name, value in says.items():
                put(where, name, lambda *_, value=value, **__: value)
        put(torch.accelerator, "is_available", lambda: False)  # of its streams there are none
        put(torch._subclasses.fake_tensor, "init_gpu_context", lambda device: None)
        put(joint_graph, "lazy_init", lambda device: patterns(torch.device("cpu")))
        put(joint_graph.UniformValueConstantFolder, "_deduce_value", on_cpu)
        put(triton_helpers, "set_driver_to_gpu", lambda: None)
        put(driver, "_active", driver_says)
        put(GraphLowering, "_compile_to_module_lines", stop)
        # Nothing comes from a cache, and nothing is timed on the device.
        patches.enter_context(inductor_config.patch(fx_graph_cache=False, shape_padding=False))
        patches.enter_context(functorch_config.patch(enable_autograd_cache=False))
        yield


def without_contents(modules: list[nn.Module], mode: FakeTensorMode, device: torch.device) -> None:
    """Moves the modules' parameters and buffers to the device. Those that several modules share stay shared."""
    moved: dict[int, Tensor] = {}

    def move(t: Tensor) -> Tensor:
        if id(t) not in moved:
            there = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)
            moved[id(t)] = nn.Parameter(there, requires_grad=False) if isinstance(t, nn.Parameter) else there
        return moved[id(t)]

    with mode:
        for module in (each for m in modules for each in m.modules()):
            for tensors in (module._parameters, module._buffers):
                tensors |= {name: move(t) for name, t in tensors.items() if t is not None}


def step_code(engine: Engine) -> str:
    """The decoding step of an engine with prompts in its cache, on the CPU, which is of no use any more afterwards.

    Raises:
        RuntimeError: CUDA graphs could not run it.
    """
    mode, device = FakeTensorMode(), torch.device("cuda:0")
    without_contents([engine.model, engine.cache, engine.state], mode, device)
    step = compiled_step(device)
    try:
        with torch.no_grad(), mode:
            step(engine.model, engine.cache, engine.state, engine.greedy)
    except Exception as e:
        written = next((each for each in causes(e) if isinstance(each, Written)), None)
        if written is None:
            raise
    code, reason = written.args
    if reason:
        raise RuntimeError(f"no CUDA graphs: {reason}")
    return code


def causes(e: BaseException | None) -> Iterator[BaseException]:
    while e is not None:
        yield e
        e = getattr(e, "inner_exception", None) or e.__cause__ or e.__context__


def build(code: str) -> dict[str, int]:
    """Compiles every Triton kernel of a module for the device: the most shared memory that any of its tiles takes.

    Raises:
        Exception: Triton's own, where a kernel does not compile.
    """
    shared = {}
    with inductor_config.patch(use_static_cuda_launcher=False):
        for name, source in KERNEL.findall(code):
            kernel = getattr(PyCodeCache.load(source), name)
            kernel.precompile(warm_cache_only=True)
            shared[name] = max(tile.kernel.metadata.shared for tile in kernel.compile_results)
    return shared
