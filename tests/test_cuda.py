"""What only a GPU can show. Skipped without one: python -m pytest -m cuda"""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

from demo.tiny_vlm import config as tiny_config
from demo.tiny_vlm import random_model
from hybridkv import Engine, HybridConfig
from hybridkv.cache import attention
from hybridkv.cache.attention import attend_gathered, attend_pages, kernel_options
from hybridkv.cache.store import PAGE, HostStore, StoreError, lock
from tests.lab import GPU, KERNELS, kernels_of_layers, prompt

pytestmark = GPU


def split_kernel(page_size: int) -> dict:
    """Asks for the kernel that splits the keys, which raises where it can't be used."""
    return kernel_options(page_size) | {"BACKEND": "TRITON_DECODE"}


@pytest.fixture(scope="module")
def model():
    raw = tiny_config(layers=3, hidden_size=448, heads=14, kv_heads=2, head_dim=32, tie=False)
    model = random_model(raw).cuda()
    model.join()
    return model


@pytest.mark.parametrize("page_size", [16, 32, 64, 128])
def test_attention_reads_exactly_the_listed_pages(page_size, monkeypatch):
    """Against the gathered twin, G = 7 and head_dim 128, in bfloat16, and by the kernel that splits the keys."""
    monkeypatch.setattr(attention, "kernel_options", split_kernel)
    generator = torch.Generator().manual_seed(0)
    pool, lanes = 60, 4
    keys, values = (torch.randn(1, 1, pool * page_size, 128, generator=generator).cuda().bfloat16() for _ in range(2))
    owner = (torch.randperm(pool - 1, generator=generator)[: lanes * 12].view(lanes, 12) + 1).int().cuda()
    n_pages = torch.tensor([11, 0, 5, 1], dtype=torch.int32, device="cuda")
    tail, fill = owner[None, :, 11].contiguous(), torch.tensor([[0, 3, 7, 15]], dtype=torch.int32, device="cuda")
    q = torch.randn(lanes, 1, 7, 128, generator=generator).cuda().bfloat16()
    pages, layer = F.pad(owner[:, :11], (0, 1)), torch.tensor(0, device="cuda")
    args = (q, keys, values, pages, n_pages, tail, fill, layer, page_size)
    out = torch.compile(attend_pages, fullgraph=True, dynamic=False)(*args)
    exact = attend_gathered(*(t.float() if torch.is_tensor(t) and t.is_floating_point() else t for t in args))
    # bfloat16 rounds the weights and the result, each by half a unit in the last place of at most max|v|.
    bound = 2 * torch.finfo(torch.bfloat16).eps * float(values.abs().max())
    torch.testing.assert_close(out.float(), exact, atol=bound, rtol=0)


@pytest.mark.parametrize(
    "policy, store", [("hybridkv", "device"), ("hybridkv", "host"), ("full", "device"), ("dense", None)]
)
def test_cuda_graphs_answer_like_the_uncompiled_step(model, policy, store, monkeypatch):
    """The graphs are in use, and pages are read by the kernel that splits the keys."""
    monkeypatch.setattr(attention, "kernel_options", split_kernel)
    counters.clear()
    prompts = [prompt(900, 0), prompt(700, 1)]
    config = HybridConfig(budget=0.3, store=store)
    expected = Engine(model, config, policy, compile=False).generate(prompts, 40)
    engine = Engine(model, config, policy)
    assert [r.token_ids for r in engine.generate(prompts, 40)] == [r.token_ids for r in expected]
    assert counters["inductor"]["cudagraph_skips"] == 0
    cache = engine.cache
    with torch.compiler.set_stance("fail_on_recompile"):
        engine.generate([prompt(890, 2), prompt(690, 3)], 40)
    assert engine.cache is cache


@pytest.mark.skipif(torch.__version__ < "2.13", reason="its kernel does not compile: check_pool says so")
def test_a_pool_of_more_numbers_than_int32_counts():
    """On its last pages, which lie beyond what 32 bits can address."""
    page_size, last = 16, 8
    pages = (1 << 31) // (page_size * 128) + last
    shape = (1, 1, pages * page_size, 128)
    if torch.cuda.mem_get_info()[0] < 3 * 2 * pages * page_size * 128:
        pytest.skip("needs 13 GB of the device's memory")
    keys, values = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    owner = torch.arange(last, device="cuda", dtype=torch.int32).flip(0).view(2, 4)
    n_pages = torch.tensor([3, 1], dtype=torch.int32, device="cuda")
    tail, fill = owner[None, :, 3].contiguous(), torch.tensor([[0, 9]], dtype=torch.int32, device="cuda")
    q, layer = torch.randn(2, 1, 7, 128, device="cuda", dtype=torch.bfloat16), torch.tensor(0, device="cuda")
    listed = F.pad(owner[:, :3], (0, 1))
    offset = pages - last
    out = torch.compile(attend_pages, fullgraph=True, dynamic=False)(
        q, keys, values, listed + offset, n_pages, tail + offset, fill, layer, page_size
    )
    keys, values = (t[:, :, -last * page_size :].float() for t in (keys, values))
    exact = attend_gathered(q.float(), keys, values, listed, n_pages, tail, fill, layer, page_size)
    bound = 2 * torch.finfo(torch.bfloat16).eps * float(values.abs().max())
    torch.testing.assert_close(out.float(), exact, atol=bound, rtol=0)


@pytest.mark.parametrize("store", ["device", "host"])
def test_a_step_neither_waits_nor_allocates(model, store):
    """No synchronisation, and no memory of the size of the pool, in a replayed step."""
    engine = Engine(model, HybridConfig(budget=0.3, store=store))
    engine.generate([prompt(4000, 0)], 12)
    pool = engine.cache.pools[0].keys.nbytes
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() - before < pool / 4


@pytest.mark.parametrize("store", KERNELS)
def test_a_layer_takes_no_more_kernels_than_without_a_gpu(store, capsys):
    """As counted by `bench.kernels --as-gpu`, which tells the compiler that there is an H200."""
    (other, retrieving), _ = kernels_of_layers(capsys, store)
    assert other <= KERNELS[store][0] and retrieving <= KERNELS[store][1]


@pytest.mark.parametrize("policy", ["hybridkv", "snapkv"])
def test_a_reading_comes_over_the_bus(model, policy):
    """Questions about a reading in host memory; layers come over one by one."""
    engine = Engine(model, HybridConfig(budget=0.3), policy, compile=False)
    whole = prompt(3000, 0)
    reading = engine.read(whole, tokens=2900)
    assert all(not t.is_cuda and t.is_pinned() for t in (*reading.k, *reading.v))
    assert engine.ask(reading, whole, 20) == engine.generate([whole], 20)[0]
    longer = engine.read(whole, reading, 2950)
    assert engine.ask(longer, whole, 20) == engine.generate([whole], 20)[0]
    small = engine.read(whole, tokens=2900, int8=True)
    assert all(not t.is_cuda and t.is_pinned() for part in (*small.k, *small.v) for t in (part.numbers, part.scale))
    assert small.bytes < reading.bytes / 2 and len(engine.ask(small, whole, 20).token_ids) == 20
    there, here = (small.k[1].to(torch.device(where)).cpu() for where in ("cuda", "cpu"))
    torch.testing.assert_close(there, here)


def test_a_question_holds_few_layers_of_its_reading():
    """What a question takes beside its cache does not grow with the layers: two of the reading are there at a time."""

    def beside(layers: int) -> tuple[int, int]:
        """Bytes beside weights and cache, and those of a layer of the reading."""
        raw = tiny_config(layers=layers, hidden_size=448, heads=14, kv_heads=2, head_dim=32, tie=False)
        engine = Engine(random_model(raw).cuda(), HybridConfig(budget=0.2, store="host"), compile=False)
        whole = prompt(16_000, 0)
        reading = engine.read(whole, tokens=15_900)
        engine.ask(reading, whole, 1)  # makes the cache
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        engine.ask(reading, whole, 1)
        return torch.cuda.max_memory_allocated() - before, reading.k[0].nbytes + reading.v[0].nbytes

    (few, layer), (many, _) = beside(4), beside(12)
    assert many - few < layer


HOST = HybridConfig(budget=0.2, dynamic_share=0.5, dynamic_weight=0.4, store="host", stickiness=1.0)


def test_a_captured_graph_reads_the_store(model):
    """Chunks that a replayed step fetched lie in their frames as they lie in host memory, bit for bit."""
    engine = Engine(model, HOST)
    engine.generate([prompt(4000, 0)], 40)
    cache, store = engine.cache, engine.cache.store
    (frame_pool,) = cache.pools
    assert int(cache.fetched.sum()) > 0
    torch.cuda.synchronize()
    frames = 0
    for nth, layer in enumerate(cache.retrieving.tolist()):
        for row, lane in enumerate(cache.lane[nth].tolist()):
            if lane == cache.row.shape[1]:
                continue
            start = int(cache.start[layer, lane])
            for frame in range(start, start + int(cache.n_retrieve[nth, row])):
                page = int(cache.first[nth, row]) + int(frame_pool.held[frame])
                for pool, host in ((frame_pool.keys, store.keys), (frame_pool.values, store.values)):
                    here, there = (t[0, 0].view(-1, cache.page_size, t.shape[-1]) for t in (pool, host))
                    assert torch.equal(here[frame], there[page] + 0)
                frames += 1
    assert frames > 10


def test_bytes_promised_are_bytes_allocated(model):
    """By the allocator: a tensor takes a whole number of 512 bytes. Host memory is no device memory."""
    record = Engine(model, HOST, compile=False)
    record.take_in([prompt(4000, 0)], 8)
    promised = record.cache.count_bytes()
    tensors = sum(1 for _ in record.cache.buffers())
    before = torch.cuda.memory_allocated()
    record.cache = None
    torch.cuda.synchronize()
    freed = before - torch.cuda.memory_allocated()
    assert promised.allocated <= freed <= promised.allocated + 512 * tensors
    assert promised.resident <= HOST.budget * promised.full and promised.host > promised.resident


def test_host_memory_is_locked_and_given_back():
    """As many bytes as there are, and another store may lock its own afterwards."""
    for _ in range(3):
        store = HostStore(3000, 16, torch.zeros(1, 64, device="cuda", dtype=torch.bfloat16), 1.0)
        slots = torch.tensor([16 * 2999 + 15], device="cuda")
        k, v = torch.randn(2, 1, 64, device="cuda", dtype=torch.bfloat16)
        store.append(k, v, slots)
        assert torch.equal(store.keys[0, 0, -1] + 0, k[0]) and torch.equal(store.values[0, 0, -1] + 0, v[0])
        del store


def test_a_refusal_is_not_reported_again():
    """What is locked can't be locked once more; the kernel after that starts as if it had not been tried."""

    class Owner:
        pass

    owner, block = Owner(), torch.zeros(2 * PAGE, dtype=torch.uint8)
    data, device = block[-block.data_ptr() % PAGE :][:PAGE], torch.device("cuda", torch.cuda.current_device())
    view = lock(data, device, owner)
    with pytest.raises(StoreError, match="can't be locked"):
        lock(data, device, owner)
    assert int((view + 1).sum()) == PAGE
