"""The demo's parts and the benchmark, small."""

import json
import subprocess
import sys
from pathlib import Path

from demo import logbook, scene

ROOT = Path(__file__).parent.parent


def test_the_picture_and_the_text_are_the_same_at_every_run():
    assert scene.scene().tobytes() == scene.scene().tobytes()
    assert logbook.logbook() == logbook.logbook()
    lines = logbook.logbook().splitlines()
    assert len(lines) == 60 and [i for i, line in enumerate(lines) if logbook.FACT in line] == [23]


def test_the_decode_benchmark_writes_its_rows(tmp_path):
    out = tmp_path / "rows.jsonl"
    sizes = "--layers 1 --kv-heads 2 --group 2 --head-dim 16 --hidden-size 32 --intermediate-size 32 --steps 3"
    command = [
        sys.executable,
        "-m",
        "bench.decode",
        "--contexts",
        "2048",
        "--budgets",
        "0.1",
        *sizes.split(),
        "--out",
        out,
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["contender"] for row in rows] == ["dense", "full", "hybridkv 0.1"]
    assert all(row["ms_per_token"] > 0 and row["compile_s"] > 0 for row in rows)
    assert rows[2]["bytes_read"] < rows[0]["bytes_read"] <= rows[1]["bytes_read"]
