"""The benchmarks of speed and memory, small: that they measure what they say."""

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._inductor import config as inductor_config

from bench import attention, common, compile_time, decode, fits, kernels, memory, prefill, throughput
from demo.tiny_vlm import config as tiny_config
from demo.tiny_vlm import random_model
from hybridkv import HybridConfig, Prefill, engine, estimate, hybrid_plan
from hybridkv.cache import attention as cache_attention
from hybridkv.cache.attention import PoolError
from hybridkv.cache.store import StoreError

SMALL = ["--kv-heads", "1", "--group", "2", "--head-dim", "16", "--hidden-size", "32", "--intermediate-size", "32"]
ROOT = Path(__file__).parent.parent
CPU = [*SMALL, "--device", "cpu"]
# What the rows say does not hang on how a step is computed: uncompiled by default, compiled by `make test-slow`.
STANCES = ["force_eager", pytest.param("default", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def model():
    return random_model(tiny_config(layers=2, hidden_size=96, heads=6, kv_heads=2, head_dim=16, tie=False))


def rows_of(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module", params=STANCES)
def decoded(request, tmp_path_factory):
    """A run of bench.decode: its rows, its picture."""
    folder = tmp_path_factory.mktemp("decode")
    command = ["--contexts", "600", "2048", "--budgets", "0.02", "0.3", "--steps", "3", "--layers", "1"]
    command += ["--contenders", *decode.CONTENDERS, "--attended", "300", "--stores", "device", "host"]
    with torch.no_grad(), torch.compiler.set_stance(request.param):
        decode.main([*command, *CPU, "--out", str(folder / "rows.jsonl"), "--plot", str(folder / "plot.png")])
    return rows_of(folder / "rows.jsonl"), folder / "plot.png"


def test_the_decode_bench_has_a_row_for_each_contender_that_fits(decoded):
    rows, picture = decoded
    names = ["dense", "full", "transformers", "eager"]
    names += [f"hybridkv {what} store {store}" for store in ("device", "host") for what in ("0.3", "300 tokens")]
    assert [(row["context"], row["contender"]) for row in rows] == [(n, name) for n in (600, 2048) for name in names]
    assert picture.stat().st_size > 5000


def test_the_columns_of_the_decode_bench_follow_from_each_other(decoded):
    rows = [row for row in decoded[0] if row["context"] == 2048]
    dense = rows[0]
    for row in rows:
        assert row["ms_per_token"] > 0 and row["compile_s"] > 0 and row["command"].startswith("python -m bench.decode")
        assert row["roofline_share"] == pytest.approx(row["roofline_ms"] / row["ms_per_token"])
        assert row["tokens_per_s"] == pytest.approx(1e3 / row["ms_per_token"])
        assert row["speedup_limit"] == pytest.approx(dense["bytes_read"] / row["bytes_read"])
        assert row["speedup_vs"]["dense"] == pytest.approx(dense["ms_per_token"] / row["ms_per_token"])
        assert set(row["speedup_vs"]) == {"dense", "full", "transformers", "eager"}
    assert dense["cache_bytes"] == 2048 * 2 * 16 * 4
    assert rows[4]["cache_bytes"] <= 0.3 * dense["cache_bytes"] < rows[1]["cache_bytes"]


@pytest.mark.parametrize("stance", STANCES)
def test_all_full_caches_of_the_decode_bench_take_the_same_steps(stance):
    """The contenders do the same work: from one random context they go on with the same tokens."""
    model = common.random_model(common.shape_config(2, 2, 3, 16, 48, 64, 128, False))
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.5)
    sizes = (300, 2, 8)
    field = [decode.ours(model, name, HybridConfig(budget=1.0), *sizes) for name in ("dense", "full")]
    field += [decode.theirs(model, compiled, *sizes) for compiled in (True, False)]
    with torch.compiler.set_stance(stance):
        tokens = [[each.step().tolist() for _ in range(6)] for each in field]
    assert all(each == tokens[0] for each in tokens) and len({str(step) for step in tokens[0]}) > 3


def test_the_decode_bench_says_what_it_leaves_out(capsys, monkeypatch):
    """Budgets that do not fit, and pools that no kernel reads; the others are measured."""
    model = common.random_model(common.shape_config(2, 4, 1, 32, 32, 32, 64, True))
    args = argparse.Namespace(
        contenders=["dense", "full", "hybridkv"], budgets=[1e-5, 0.3], attended=[5000], steps=1, page_size=16,
        retrieving_layers=[1.0, 0.5], stores=[], inductor=[],
    )  # fmt: skip

    def refuse(numbers, device):
        if numbers > 2 * 4 * 4000 * 32:  # what the full cache takes
            raise ValueError("too large a pool")

    monkeypatch.setattr(engine, "check_pool", refuse)
    assert [each.name for each in decode.contenders(model, args, 4000, 1)] == [
        "dense",
        "hybridkv 0.3",
        "hybridkv 0.3 in 0.5",
    ]
    said = capsys.readouterr().out
    for text in ("full: too large", "hybridkv 1e-05: a budget of 1e-05 can't", "hybridkv 5000 tokens: no budget reads"):
        assert text in said


def test_the_decode_bench_times_options_of_the_compiler(tmp_path, monkeypatch):
    """Each set of them beside none, for full and hybrid caches alike; the compiler has them while it compiles."""
    seen = []

    def step(*_):
        seen.append((inductor_config.coordinate_descent_tuning, inductor_config.max_autotune_gemm_backends))
        return torch.zeros(1)

    monkeypatch.setattr(engine, "compiled_step", lambda _: step)
    monkeypatch.setattr(decode, "copy_bandwidth", lambda _: 1e9)
    usual = inductor_config.coordinate_descent_tuning, inductor_config.max_autotune_gemm_backends
    options = "coordinate_descent_tuning=1+max_autotune_gemm_backends=ATEN,TRITON"
    command = ["--contexts", "600", "--budgets", "0.3", "--steps", "2", "--layers", "1", *CPU]
    command += ["--contenders", "dense", "hybridkv", "--out", str(tmp_path / "rows.jsonl")]
    decode.main([*command, "--inductor", options, "b2b_gemm_pass=1"])
    told = ("", f" {options}", " b2b_gemm_pass=1")
    names = [f"{name}{text}" for text in told for name in ("dense", "hybridkv 0.3")]
    assert [row["contender"] for row in rows_of(tmp_path / "rows.jsonl")] == names
    assert [each for each in seen if each != usual] == 2 * [(True, "ATEN,TRITON")]
    assert len(seen) == 6 * (1 + decode.WARM_UP + 2)


@pytest.mark.parametrize(
    "text, said",
    [
        ("b2b_gemm=1", "has no option 'b2b_gemm'"),
        ("max_autotune", "takes 0 or 1, got ''"),
        ("coordinate_descent_search_radius=wide", "a value of type int, got 'wide'"),
        ("autotune_lookup_table=1", "more than a number or a word"),
    ],
)
def test_options_that_the_compiler_has_not_are_refused(text, said, capsys):
    with pytest.raises(SystemExit):
        decode.main(["--inductor", text])
    assert said in capsys.readouterr().err


def test_a_budget_for_a_number_of_attended_tokens():
    model = common.random_model(common.shape_config(2, 4, 1, 32, 32, 32, 64, True))
    for context, tokens in ((1000, 400), (4000, 400), (4000, 1500)):
        config = decode.budget_reading(model, HybridConfig(page_size=32), context, tokens)
        read = float(hybrid_plan(common.random_prefill(model, context, config)).attended.double().mean())
        # Dynamic heads get whole pages: the next smaller budget may differ by a page a head.
        assert tokens <= read <= tokens + config.page_size
    for tokens in (10, 5000):  # fewer than every head keeps, more than there are
        with pytest.raises(ValueError, match=f"no budget reads {tokens} of 4000 tokens"):
            decode.budget_reading(model, HybridConfig(), 4000, tokens)


def test_weights_that_a_step_reads():
    tied, untied = (common.random_model(common.shape_config(1, 1, 2, 16, 32, 32, 100, tied)) for tied in (True, False))
    assert common.weight_bytes(tied) == sum(p.nbytes for p in tied.parameters())
    assert common.weight_bytes(untied) == sum(p.nbytes for p in untied.parameters()) - 100 * 32 * 4
    assert (
        untied.cfg.tie_word_embeddings is False
        and common.random_model(untied.cfg, dtype=torch.bfloat16).dtype == torch.bfloat16
    )


@pytest.mark.parametrize("stance", STANCES)
def test_the_attention_bench_runs_every_contender(stance, tmp_path, monkeypatch):
    """With our kernel options and others in turn; a tile that does not divide the page is left out."""
    out, measure, given = tmp_path / "rows.jsonl", attention.measure, []

    def look(*args):
        given.append(cache_attention.kernel_options(16))
        return measure(*args)

    monkeypatch.setattr(attention, "measure", look)
    options = ["--kernel-options", "BLOCK_N=32", "BLOCK_N=16,num_stages=2"]
    with torch.compiler.set_stance(stance):
        attention.main(["--contexts", "1024", "--budgets", "0.3", "--repeats", "2", *options, *CPU, "--out", str(out)])
    rows = rows_of(out)
    assert given == [cache_attention.kernel_options(16), {"BLOCK_N": 16, "num_stages": 2}]
    assert [row["kernel_options"] for row in rows[::5]] == given
    rows = rows[:5]
    assert [row["contender"] for row in rows] == ["sdpa gqa", "sdpa rows", "flex full", "hybridkv 0.3", "flex 0.3"]
    assert max(row["speedup_vs_sdpa"] for row in rows[:2]) == 1
    assert rows[3]["bytes_read"] <= 0.3 * rows[0]["bytes_read"]


def test_bad_kernel_options_are_refused(capsys):
    with pytest.raises(SystemExit):
        attention.main(["--kernel-options", "num_stages"])
    assert "NAME=NUMBER" in capsys.readouterr().err


def test_all_full_attentions_of_the_attention_bench_agree():
    model = common.random_model(common.shape_config(1, 2, 3, 16, 48, 64, 128, True))
    field = attention.contenders(model, 200, 1, 16, list(attention.POLICIES), [1.0])
    q, (k, v) = torch.randn(1, 6, 1, 16), torch.randn(2, 1, 2, 1, 16)
    with torch.no_grad():
        call, cache, _ = field.pop("sdpa rows")
        rows = call(cache[0], q, k, v)  # appends k and v; the others' turn to do so, or to see them
        assert list(field) == ["sdpa gqa", "flex full", "hybridkv 1", "flex 1"]
        for call, cache, _ in field.values():
            torch.testing.assert_close(call(cache[0], q, k, v), rows, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stance", STANCES)
def test_memory_is_traced_but_for_scalars(stance):
    kept, before = [], [torch.ones(5000)]

    def work():
        a = torch.ones(1000)
        b = a.view(10, 100)  # shares its memory
        kept.append(b * 2)
        del a, b
        before.clear()  # somebody else's: the peak is ours alone
        kept.append(kept[0] + 1)

    assert memory.traced(work) == pytest.approx((8000, 8000), abs=100)
    assert memory.traced(kept.clear) == (0, 0)
    assert memory.traced(lambda: kept.append(torch.ones(1000)), lambda: kept) == (0, 0)  # told apart
    halves = torch.compile(lambda x: (x @ x).relu() @ x)
    x = torch.ones(100, 100)
    with torch.compiler.set_stance(stance):
        halves(x)
        # Compiled, the product is rectified in place; else it is gone before the result is there.
        assert memory.traced(lambda: kept.append(halves(x))) == pytest.approx((80_000, 40_000), abs=100)


MEASURED_ALONE = """
import sys, torch
from bench import memory
torch.compiler.set_stance(sys.argv[1])
for contender in memory.CONTENDERS:
    memory.main([*sys.argv[2:], "--one", "--contenders", contender])
"""


@pytest.mark.parametrize("stance", STANCES)
def test_the_memory_bench_sees_what_each_cache_holds(stance):
    """In a process of its own, where nobody else takes or frees memory."""
    command = ["--contexts", "2000", "--batches", "1", "--budget", "0.2", "--device", "cpu", "--vocab-size", "64"]
    # Deep enough for the cache to outweigh a layer.
    command += ["--layers", "12", "--kv-heads", "2", "--group", "1", "--head-dim", "16"]
    command += ["--hidden-size", "32", "--intermediate-size", "32"]
    child = [sys.executable, "-c", MEASURED_ALONE, stance, *command]
    done = subprocess.run(child, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = dict(zip(memory.CONTENDERS, map(json.loads, done.stdout.splitlines()), strict=True))
    model = common.random_model(common.shape_config(12, 2, 1, 16, 32, 32, 64, True))
    cache = 2000 * 12 * 2 * 2 * 16 * 4
    for each in found.values():
        assert each["weights"] == sum(p.nbytes for p in model.parameters())
        assert each["prefill_peak"] > each["decode_peak"] > each["prefilled"] > each["weights"]
        assert each["host"] > 1e7
    held = {name: each["prefilled"] - each["weights"] for name, each in found.items()}
    assert held["dense"] > cache and held["full"] > cache > 0.8 * held["full"]
    assert held["hybridkv"] < 0.8 * cache  # most heads are static
    # Planned ahead, the other layers' keys and values are not there at the peak.
    assert found["hybridkv ahead"]["prefill_peak"] < found["hybridkv"]["prefill_peak"] - 0.2 * cache


def test_the_memory_bench_says_what_would_fit(tmp_path, capsys, monkeypatch):
    """A process for each batch and context; the lines through their peaks go on to --fits."""
    out, asked = tmp_path / "rows.jsonl", []

    def measured(command, **_):
        one = command[command.index("--one") :]
        layers, batch, context = (int(one[one.index(name) + 1]) for name in ("--layers", "--batches", "--contexts"))
        asked.append((layers, batch, context))
        if context == 256:
            return SimpleNamespace(returncode=1, stdout="", stderr="Traceback\nno room")
        peak = 5 + 1_000_000 * layers * batch * context
        found = {"weights": 5, "prefill_peak": peak, "prefilled": peak - 2, "decode_peak": peak - 1, "store": 0}
        return SimpleNamespace(returncode=0, stdout=f"\n{json.dumps(found | {'host': 1})}\n", stderr="")

    monkeypatch.setattr(subprocess, "run", measured)
    command = ["--contexts", "256", "512", "1024", "--batches", "2", "1", *CPU, "--contenders", "full"]
    memory.main([*command, "--fits", "20.5GB", "--out", str(out)])
    assert asked == [(2, batch, context) for batch in (1, 2) for context in (256, 512, 1024)]
    *rows, fits = rows_of(out)
    assert [(row["batch"], row["context"]) for row in rows] == [(1, 512), (1, 1024), (2, 512), (2, 1024)]
    assert rows[0]["peak"] == 2 * 512_000_000 + 5
    assert (fits["fits"], fits["at_context"], fits["largest_context"]) == (20_500_000_000, 1024, 10_249)
    assert fits["largest_batch"] == 10
    said = capsys.readouterr().out
    for text in (
        " 256             full failed: no room",
        "at batch 1, a context of 10,249; at context 1024, a batch of 10",
    ):
        assert text in said
    # Few layers and a small vocabulary stand for all of the shape's.
    asked.clear()
    shape = ["--shape", "qwen2.5-vl-3b", "--layers", "4", "--vocab-size", "64", "--at", "2048"]
    memory.main([*command, "hybridkv", *shape, "--fits", "100GB", "400GB"])
    assert {layers for layers, *_ in asked} == {2, 4}
    said = capsys.readouterr().out
    weights = estimate.weight_bytes(common.shape_config(36, 1, 2, 16, 32, 32, 151936, True), torch.float32)
    for room in (100, 400):
        longest, batch = (int((room * 1e9 - weights) / (36e6 * n)) for n in (1, 2048))
        fitting = (
            f"in {room} GB: at batch 1, a context of {longest:,}; at context 2048, a batch of {batch:,} (36 layers"
        )
        assert f"full {fitting}" in said and f"hybridkv {fitting}" not in said


def test_what_fits_is_told_from_peaks_that_do_not_hang_together():
    """Each stage on lines of its own: the highest at the size asked about need not be the highest measured."""

    def row(layers: int, batch: int, context: int) -> dict:
        cache, moment = 10 * layers * batch * context + 60, 1000 * context * min(layers, 2) // 2 + 7
        stages = {"prefilled": cache, "prefill_peak": cache + moment, "decode_peak": cache + 50_000 * batch}
        sizes = {"weights": 3} | {name: number + 3 for name, number in stages.items()}
        return {"layers": layers, "batch": batch, "context": context, "bytes": sizes}

    rows = [row(*each) for each in itertools.product((1, 2), (1, 2), (10, 20))]
    (found,) = fits.fitting(rows, [10_000_000], 28, 500, context=100)
    assert found["made_of"] == {"weights": 500, "caches": 28_060, "moment": 100_007}
    # 560 + 280 context + the larger of 1000 context + 7 and 50,000; then 560 + 28,000 batch + that of 100,007.
    assert found["largest_context"] == (10_000_000 - 567) // 1280
    assert found["largest_batch"] == min((10_000_000 - 100_567) // 28_000, (10_000_000 - 560) // 78_000)
    (alone,) = fits.fitting(rows[:1], [10_000_000], 1, 500)
    assert "largest_batch" not in alone and "not known" in fits.described(alone)
    assert fits.fitting([], [10_000_000], 1, 500) == []


@pytest.mark.slow
def test_a_warm_compile_cache_is_found(tmp_path):
    """How much time that saves is for the bench to say; that nothing is compiled again is what it is about."""
    out = tmp_path / "rows.jsonl"
    compile_time.main(["--depths", "1", "--policies", "dense", *CPU, "--out", str(out)])
    (row,) = rows_of(out)
    assert row["layers"] == 1 and row["cold_s"] > 0 and row["warm_s"] > 0
    assert (row["cold_hits"], row["warm_hits"]) == (0, 1)


def test_the_prefill_bench_splits_the_time_to_the_first_token(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    command = ["--contexts", "512", "--repeats", "1", "--budget", "0.5", "--policies", "hybridkv", "snapkv"]
    prefill.main([*command, *SMALL, "--device", "cpu", "--out", str(out)])
    rows = {row["contender"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert list(rows) == ["plain", "hybridkv", "snapkv"] and rows["plain"]["overhead"] == 0
    for name, row in rows.items():
        stages = {"read", "pack"} | ({"plan"} if name != "plain" else set())
        assert set(row["ms"]) == stages | {"total"}
        assert row["ms"]["total"] == pytest.approx(sum(row["ms"][stage] for stage in stages))
    with pytest.raises(SystemExit):
        prefill.main(["--contexts", "96", "--budget", "0.1", *SMALL, "--device", "cpu"])
    assert "Raise the budget" in capsys.readouterr().err


def test_a_plain_prefill_keeps_the_keys_and_values_of_a_profiled_one(model):
    x = torch.randn(1, 90, model.cfg.hidden_size, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(90).expand(3, 1, -1)
    records = [kind(None, HybridConfig()) for kind in (prefill.Plain, Prefill)]
    with torch.no_grad():
        plain, profiled = (model(x, positions, record) for record in records)
    torch.testing.assert_close(plain, profiled)
    for a, b in zip(*(record.layers for record in records), strict=True):
        torch.testing.assert_close(a.k, b.k)
        torch.testing.assert_close(a.v, b.v)


# bench.kernels

CODE = """
cpp_fused_add_0 = async_compile.cpp('void kernel()')
def subgraph_0(args):
    buf0 = empty_strided_cpu((1, 2))
    cpp_fused_add_0(arg0, buf0)
    buf1 = torch.ops.aten.cumsum.default(buf0, dim=0)
    assert_size_stride(buf1, (2, ), (1, ), 'torch.ops.aten.cumsum.default')
    extern_kernels.mm(buf0, buf1, out=buf2)
    return buf2
def subgraph_1_while_loop_body_graph_0(args):
    triton_red_fused_1.run(arg0, 4, stream=stream0)
def subgraph_1(args):
        triton_poi_fused_2.run(arg0, 4, stream=stream0)
def call(args):
    triton_poi_fused_3.run(arg0, 4, stream=stream0)
"""


def test_kernels_are_read_off_the_code_region_by_region():
    first = ["cpp_fused_add_0", "torch.ops.aten.cumsum", "extern_kernels.mm"]
    assert kernels.regions(CODE) == [(first, []), (["triton_poi_fused_2"], ["triton_red_fused_1"])]


@pytest.mark.slow
@pytest.mark.compiles
def test_the_kernels_of_both_kinds_of_layers_are_printed(capsys):
    kernels.main(["--layers", "4", "--context", "700", "--budget", "0.4", *CPU])
    out = capsys.readouterr().out
    assert out.count("kernels in a layer") == 2 and "in each turn of its loop" in out and "flex_attention" in out


def test_the_largest_batch_that_fits(tmp_path, capsys):
    """By arithmetic, a full cache beside it; where the device has less, an eighth fewer are tried."""
    out, command = tmp_path / "rows.jsonl", ["--context", "1024", "--steps", "2", "--layers", "2", *CPU]
    packed, refused = throughput.packed, []

    def full(model, policy, config, context, batch, new_tokens):
        if batch > 2:
            refused.append(batch)
            raise [torch.OutOfMemoryError, StoreError("locked"), PoolError("large")][batch % 3]
        return packed(model, policy, config, context, batch, new_tokens)

    with torch.compiler.set_stance("force_eager"), pytest.MonkeyPatch.context() as patch:
        throughput.main([*command, "--memory", "2MB", "--budgets", "0.3", "--batches", "1", "50", "--out", str(out)])
        throughput.main([*command, "--memory", "1kB", "--budgets", "0.3"])
        throughput.main([*command, "--memory", "2MB", "--budgets", "0.3", "--host-memory", "1kB"])
        with pytest.raises(SystemExit):
            throughput.main([*command, "--memory", "2MB", "--budgets", "0.001"])
        patch.setattr(throughput, "packed", full)
        throughput.main([*command, "--memory", "2MB", "--budgets", "0.3", "--out", str(out)])
    said, error = capsys.readouterr()
    assert "a budget of 0.001 can't be met" in error
    assert said.count("not one sequence fits") == 3 and said.count("do not fit") == len(refused) > 2
    dense, one, ours, *limited = rows_of(out)
    assert [row["contender"] for row in (dense, one, ours)] == ["dense", "hybridkv 0.3", "hybridkv 0.3"]
    assert ours["batch"] > dense["batch"] > one["batch"] == 1 and [row["batch"] for row in limited] == [2, 2]
    token = 2 * 2 * 16 * 4
    assert ours["allocated_bytes"] + 1024 * token < 2e6
    assert ours["allocated_bytes"] / ours["batch"] < 0.5 * 1024 * token
    assert ours["tokens_per_s"] == pytest.approx(ours["batch"] / ours["ms_per_step"] * 1e3)
