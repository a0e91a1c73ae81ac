"""`bench.readings`, small: that its rows say what was asked, and how."""

import json
import re
from pathlib import Path

import pytest

from bench import batch, reading_speed, readings, second

ROOT = Path(__file__).parent.parent


def rows_of(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_questions_about_a_board(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    command = ["--tokens", "64", "--questions", "2", "--subjects", "2", "--policies", "hybridkv", "full"]
    readings.main([*command, "--out", str(out)])
    rows, printed = rows_of(out), capsys.readouterr().out
    assert [row["policy"] for row in rows] == ["hybridkv", "full"] and "question 1" in printed
    for row in rows:
        assert row["questions"] == 2 and row["tokens"] == 64 and row["command"].endswith(str(out))
        assert row["same"] == 1 and row["right"] == row["right_again"]
        assert abs(row["kl"] - row["kl_again"]) < 1e-3 and (row["kl"] < 1e-5 or row["policy"] == "hybridkv")
        assert row["right_kept"] is None or 0 <= row["right_kept"] <= 1
        assert row["next_s"] > 0 and row["again_s"] > 0 and row["read_s"] < row["first_s"]
        assert 0 < row["new_tokens_read"] < row["prompt_tokens"] - 64 and row["reading_bytes"] > 0
        assert 0 < row["pack_share"] < 1 if row["policy"] == "hybridkv" else row["pack_share"] is None
    assert rows[1]["right_kept"] == rows[1]["right"]  # what is whole serves every question


def test_questions_about_a_text(llama, tmp_path):
    out = tmp_path / "rows.jsonl"
    command = ["--model", str(llama), "--tokens", "300", "--questions", "2", "--policies", "snapkv", "--budget", "0.5"]
    readings.main([*command, "--out", str(out)])
    readings.main([*command, "--out", str(out), "--times-only"])
    row, times = rows_of(out)
    assert times.keys() == row.keys() - {"same", "right", "right_again", "right_kept", "kl", "kl_again"}
    assert row["questions"] == 1 and row["budget"] == 0.5 and row["new_tokens_read"] < row["prompt_tokens"] - 200


def test_the_table_of_times_is_in_the_rows():
    table = (ROOT / "docs" / "readings.md").read_text(encoding="utf-8").split("## Measured")[1].split("Every later")[0]
    made = []
    lines = [line for line in table.splitlines() if line.startswith("| ")][1:]
    said = [" | ".join(cell.strip() for cell in line.split("|")[2:9]) for line in lines]
    for row in rows_of(ROOT / "bench" / "results" / "readings.jsonl"):
        later = f"{row['next_s']:.3f} s ({row['first_s'] / row['next_s']:.0f}x sooner)"
        right = ["-"] * 3
        if "right" in row:
            right = [
                f"{row['right']:.0%} of {row['questions']}",
                f"{row['right_again']:.0%}",
                f"{row['right_kept']:.0%}",
            ]
        cells = [f"`{row['policy']}`", f"{row['first_s']:.2f} s", later, f"{row['again_s']:.2f} s", *right]
        made.append(" | ".join(cells))
    assert said == made


def test_the_table_of_second_questions_is_in_the_rows():
    table = (ROOT / "docs" / "readings.md").read_text(encoding="utf-8").split("### A second question")[1]
    table = table.split("### Many")[0]
    rows, said = rows_of(ROOT / "bench" / "results" / "second.jsonl"), re.findall(r"^\|.*?\| (`.*) \|$", table, re.M)
    made = []
    for row in rows:
        ways = [f"{row[f'right_{way}']:.0%}, {row[f'kl_{way}']:.3f}" for way in second.WAYS]
        made.append(" | ".join([f"`{row['policy']}`", *ways, f"{row['kl_rounded']:.4f}"]))
    assert said == made


def test_a_second_question(llama, tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    second.main(["--tokens", "64", "--subjects", "1", "--task", "lookup", "--policies", "full", "--out", str(out)])
    more = ["--model", str(llama), "--tokens", "200", "--subjects", "1", "--policies", "snapkv", "--budget", "0.6"]
    second.main([*more, "--out", str(out)])
    full, text = rows_of(out)
    assert full["right_anew"] == full["right_kept"] == 1 and full["kl_anew"] < 1e-5 and full["kl_rounded"] < 0.01
    assert full["int8_bytes"] < full["reading_bytes"] and (full["task"], text["task"]) == ("lookup", "needle")
    assert text["subjects"] == 1 and text["kl_kept_ci"][0] <= text["kl_kept"] and text["budget"] == 0.6
    assert "int8 from anew" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        second.main(["--subjects", "0"])


def test_many_prompts(tmp_path, capsys):
    batch.main(["--tokens", "16", "--lines", "2", "--out", str(tmp_path / "rows.jsonl")])
    rows = rows_of(tmp_path / "rows.jsonl")
    assert [row["pictures"] for row in rows] == [1, 2] and all(row["same"] and row["lines"] == 2 for row in rows)
    assert all(row["together_s"] > 0 and row["one_by_one_s"] > 0 for row in rows)
    assert "one by one" in capsys.readouterr().out


def test_times_of_random_weights(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    shape = ["--layers", "1", "--kv-heads", "1", "--hidden-size", "32", "--intermediate-size", "32", "--device", "cpu"]
    command = [*shape, "--tokens", "300", "--repeats", "1", "--policies", "hybridkv", "--retrieving-layers", "0.5"]
    reading_speed.main([*command, "--out", str(out)])
    (row,) = rows_of(out)
    assert row["first_s"] > row["read_s"] > 0 and row["next_s"] > 0 and row["again_s"] > 0
    assert row["beside_bytes"] is None and row["reading_bytes"] > 2 * 236 * 128 * 4 and row["retrieving_layers"] == 0.5
    assert "question 1" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        reading_speed.main(["--tokens", "60"])
    assert "make a measurement" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["--questions", "1"], ["--subjects", "0"]])
def test_what_is_no_measurement(command, capsys):
    with pytest.raises(SystemExit):
        readings.main(command)
    assert "make a measurement" in capsys.readouterr().err
