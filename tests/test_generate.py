"""`hybridkv.generate` on pictures, video and text, good input and bad; `test_cli` has what all commands share."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hybridkv import generate
from hybridkv.report import size, table
from tests.fuzz_cli import fuzz

PLAIN = ["--no-compile", "--no-calibration"]
KEYS = {
    "policy", "budget", "text", "token_ids", "prompt_tokens", "visual_tokens", "static_heads", "dynamic_heads",
    "retrieving_layers",
    "full_bytes", "resident_bytes", "host_bytes", "attended_tokens", "ttft_s", "ms_per_token", "compile_s", "device",
    "dtype",
}  # fmt: skip


def run(*args: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "hybridkv.generate", "--no-calibration", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("image") / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (840, 840, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def context(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "context.txt"
    path.write_text("The cache grew and grew. " * 40, encoding="utf-8")
    return path


@pytest.mark.parametrize("how", [["--no-compile"], pytest.param([], marks=pytest.mark.slow)], ids=" ".join)
def test_picture_beside_the_full_cache(vlm, image, how):
    """--compare streams both answers to stdout; the table goes to stderr. Compiled also in test_bundled.py."""
    done = run(
        "--model",
        vlm,
        "--image",
        image,
        "--prompt",
        "What?",
        "--budget",
        0.2,
        "--compare",
        "--max-new-tokens",
        12,
        *how,
    )
    assert done.returncode == 0, done.stderr
    assert "--- hybridkv cache, budget 0.2" in done.stdout and "--- full cache" in done.stdout
    assert ("compiling the decoding step" in done.stderr) == (not how)
    for part in ("text + 900 visual", "hybridkv 0.2", "read/step", "ms/token"):
        assert part in done.stderr


def test_a_system_prompt(vlm, capfd):
    arguments = ["--model", str(vlm), "--prompt", "What?", "--json", "--no-compile", "--max-new-tokens", "1"]
    for more in ([], ["--system", "Be brief."]):
        generate.main([*arguments, *more])
    usual, ours = (json.loads(line)["prompt_tokens"] for line in capfd.readouterr().out.splitlines())
    assert usual - ours == len("You are a helpful assistant.") - len("Be brief.")  # a token for each byte


def test_json_is_alone_on_stdout_and_its_numbers_fit_together(vlm, image, capfd):
    generate.main(
        ["--model", str(vlm), "--image", str(image), "--image", str(image), "--prompt", "What?", "--budget", "0.2",
         "--compare", "--json", *PLAIN, "--max-new-tokens", "12", "--max-pixels", "300000"]
    )  # fmt: skip
    hybrid, full = (json.loads(line) for line in capfd.readouterr().out.splitlines())
    assert set(hybrid) >= KEYS and set(full) >= KEYS
    assert (hybrid["policy"], full["policy"]) == ("hybridkv", "full")
    assert hybrid["visual_tokens"] == 2 * 361 and hybrid["prompt_tokens"] > 722
    assert hybrid["static_heads"] + hybrid["dynamic_heads"] == full["static_heads"] == 4
    assert hybrid["step_bytes"] <= 0.2 * hybrid["full_bytes"] < hybrid["resident_bytes"] < full["resident_bytes"]
    assert full["attended_tokens"] == full["prompt_tokens"]
    assert len(full["token_ids"]) <= 12 and full["text"]
    assert (full["device"], full["dtype"]) == ("cpu", "float32")


def test_long_text(llama, context, capfd):
    generate.main(
        ["--model", str(llama), "--context", str(context), "--prompt", "What grew?", "--budget", "0.3", *PLAIN,
         "--json", "--max-new-tokens", "4"]
    )  # fmt: skip
    row = json.loads(capfd.readouterr().out)
    assert row["visual_tokens"] == 0 and row["attended_tokens"] < 0.3 * row["prompt_tokens"]


def test_sampling_repeats_with_its_seed(vlm, image, capsys):
    def tokens(*more: str) -> list[int]:
        generate.main(
            ["--model", str(vlm), "--image", str(image), "--prompt", "?", "--policy", "full", *PLAIN, "--json",
             "--max-new-tokens", "8", "--temperature", "1.5", "--top-p", "0.95", *more]
        )  # fmt: skip
        return json.loads(capsys.readouterr().out)["token_ids"]

    assert tokens("--seed", "1") == tokens("--seed", "1") != tokens("--seed", "2")


def test_video_and_float16(vlm, tmp_path, capsys):
    av = pytest.importorskip("av")
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 128
        for i in range(32):
            container.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", (128, 128), (7 * i, 0, 99)))))
        container.mux(stream.encode())
    generate.main(
        ["--model", str(vlm), "--video", str(path), "--prompt", "?", "--budget", "0.6", *PLAIN, "--json",
         "--max-new-tokens", "4", "--dtype", "bfloat16"]
    )  # fmt: skip
    row = json.loads(capsys.readouterr().out)
    assert row["visual_tokens"] > 100 and row["dtype"] == "bfloat16"


def test_streamed_text_is_the_text(vlm, image, capsys):
    arguments = ["--model", str(vlm), "--image", str(image), "--prompt", "?", "--policy", "full", *PLAIN]
    generate.main([*arguments, "--max-new-tokens", "16"])
    streamed = capsys.readouterr().out
    generate.main([*arguments, "--max-new-tokens", "16", "--json"])
    text = json.loads(capsys.readouterr().out)["text"]
    assert streamed.replace("\ufffd", "").rstrip("\n") == text.replace("\ufffd", "").rstrip("\n")


def test_the_default_budget_gives_way_to_a_short_prompt_and_says_so(vlm, capsys, tmp_path):
    Image.new("RGB", (224, 224), "teal").save(tmp_path / "small.png")
    generate.main(
        ["--model", str(vlm), "--image", str(tmp_path / "small.png"), "--prompt", "?", *PLAIN, "--json",
         "--max-new-tokens", "2"]
    )  # fmt: skip
    out, err = capsys.readouterr()
    row = json.loads(out)
    assert 0.1 < row["budget"] == row["step_bytes"] / row["full_bytes"] < 1
    assert err.startswith("note: a budget of 0.1 can't hold what must be kept of this short prompt")


@pytest.mark.parametrize("budget", [[], ["--budget", "0.5"]])
@pytest.mark.parametrize("policy", ["hybridkv", "snapkv"])
def test_with_nothing_to_prune_the_full_cache_is_kept_and_a_note_says_so(vlm, capsys, policy, budget):
    arguments = ["--model", str(vlm), "--prompt", "no picture at all", *PLAIN, "--max-new-tokens", "2"]
    generate.main([*arguments, "--policy", policy, *budget])
    err = capsys.readouterr().err
    share = float(err.partition(" of the full cache a step")[0].split()[-1].rstrip("%"))
    assert share > 100 and err.count("note:") == 1 and f"({share:.1f}%)" in err


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stop:
        generate.main(["--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    for part in ("examples:", "--budget", "--context", "resident", "hybridkv/planning/policies.py"):
        assert part in out
    assert (Path(generate.__file__).parent / "planning" / "policies.py").is_file()


def test_a_second_option_never_replaces_the_first_unseen(capsys):
    for name in ("--model", "--prompt", "--context", "--demo", "--head-profile", "--report"):
        with pytest.raises(SystemExit) as stop:
            generate.main([name, "a", name, "b"])
        assert stop.value.code == 2 and f"argument {name}: can be given only once" in capsys.readouterr().err


def test_an_option_that_makes_no_difference_is_said(vlm, image, capsys):
    asked = ["--model", str(vlm), "--prompt", "?", *PLAIN, "--max-new-tokens", "1"]
    drawn, seen = ["--top-p", "0.5", "--seed", "3"], ["--fps", "1", "--min-pixels", "1000", "--max-pixels", "9000"]
    generate.main([*asked, *drawn, *seen])
    err = capsys.readouterr().err
    for name in (*drawn[::2], *seen[::2]):
        assert len(re.findall(f"note: {name}, .* makes no difference", err)) == 1
    generate.main([*asked, *drawn, *seen[2:], "--temperature", "1", "--image", str(image)])
    assert "makes no difference" not in capsys.readouterr().err


BAD = {
    "no such model": (["--model", "{tmp}/nothing"], "neither a folder nor a Hub name"),
    "model without a name": (["--model", ""], "error"),
    "broken checkpoint": (["--model", "{tmp}/broken"], "not a readable safetensors file"),
    "pickle checkpoint": (["--model", "{tmp}/pickle"], "pickle"),
    "no tokenizer": (["--model", "{tmp}/bare"], "tokenizer"),
    "no such image": (["--image", "{tmp}/none.png"], "does not exist"),
    "corrupt image": (["--image", "{tmp}/corrupt.png"], "is not a picture"),
    "truncated image": (["--image", "{tmp}/truncated.png"], "can't be read"),
    "animated image": (["--image", "{tmp}/moving.gif"], "animated"),
    "huge image": (["--image", "{tmp}/bomb.png"], "scale it down"),
    "no such context": (["--context", "{tmp}/none.txt"], "does not exist"),
    "binary context": (["--context", "{tmp}/broken/model.safetensors"], "not UTF-8"),
    "empty context": (["--context", "{tmp}/empty.txt"], "holds no text"),
    "context without end": (["--context", "/dev/zero"], "more than 32 MB"),
    "folder as context": (["--context", "{tmp}"], "can't be read"),
    "context with a long name": (["--context", "x" * 300], "can't be read"),
    "context of a NUL": (["--context", "a\0b"], "can't be read"),
    "context of nobody's": (["--context", "~nobody/x"], "does not exist"),
    "no such video": (["--video", "{tmp}/none.mp4"], "does not exist"),
    "budget out of range": (["--budget", "7"], "budget must lie in (0, 1]"),
    "budget of no number": (["--budget", "nan"], "budget must lie in (0, 1]"),
    "budget for everything": (["--policy", "full", "--budget", "0.5"], "leave one of the two out"),
    "budget too small": (["--image", "{image}", "--budget", "0.01"], "can't be met"),
    "prompt too long": (["--max-new-tokens", "200000"], "more than the model's 128000"),
    "no tokens wanted": (["--max-new-tokens", "0"], "at least 1"),
    "negative temperature": (["--temperature", "-1"], "temperature must be 0 or lie in [0.001, 1000]"),
    "temperature of no number": (["--temperature", "nan"], "temperature must be 0"),
    "low temperature": (["--temperature", "1e-40"], "temperature must be 0"),
    "high temperature": (["--temperature", "1e308"], "temperature must be 0"),
    "bad top-p": (["--top-p", "2"], "top_p"),
    "top-p of no number": (["--top-p", "nan"], "top_p"),
    "long seed": (["--seed", "9" * 20], "seed must be a whole number from 0"),
    "negative seed": (["--seed", "-1"], "seed must be a whole number from 0"),
    "no frames": (["--video", "{tmp}/none.mp4", "--fps", "nan"], "fps"),
    "no pixels": (["--image", "{image}", "--max-pixels", "0"], "max_pixels"),
    "crossed pixels": (["--image", "{image}", "--min-pixels", "90000", "--max-pixels", "9000"], "min_pixels"),
    "unknown device": (["--device", "abacus"], "device 'abacus' can't be used; on this machine there is cpu"),
    "unbuilt device": (["--device", "hpu"], "device 'hpu' can't be used"),
    "device without numbers": (["--device", "meta"], "device 'meta' can't be used"),
    "no such profile": (["--head-profile", "{tmp}/none.json"], "is not a head profile"),
    "profile of no numbers": (["--head-profile", "{tmp}/infinite.json"], "need must be finite"),
    "other model's profile": (["--head-profile", "{tmp}/other.json"], "this model has"),
    "report into nowhere": (["--report", "{tmp}/nowhere/x.html"], "can't be written: No such file"),
    "report over the picture": (["--image", "{tmp}/corrupt.png", "--report", "{tmp}/corrupt.png"], "would replace"),
    "report over the context": (["--context", "{tmp}/empty.txt", "--report", "{tmp}/./empty.txt"], "would replace"),
    "profile for nothing": (["--head-profile", "{tmp}/other.json", "--policy", "snapkv"], "takes no --head-profile"),
    "memory without a batch": (["--memory", "1"], "--batch is missing"),
    "report over a folder": (["--report", "{tmp}"], "is no file that can be replaced"),
    "unknown option": (["--bogus"], "unrecognized arguments"),
    "shortened option": (["--max-new", "4"], "unrecognized arguments"),
    "option over two lines": (["--bo\ngus"], "unrecognized arguments"),
    "not a number": (["--budget", "much"], "invalid float"),
    "not UTF-8": (["--prompt=\udcff"], "prompt"),
    "empty prompt": (["--prompt= "], "the prompt is empty"),
}


@pytest.fixture(scope="module")
def spoilt(vlm, image, tmp_path_factory) -> Path:
    """A folder of things that can't be used."""
    tmp = tmp_path_factory.mktemp("spoilt")
    for name in ("broken", "pickle", "bare"):
        shutil.copytree(vlm, tmp / name)
    (tmp / "broken" / "model.safetensors").write_bytes(b"\xff" * 64)
    (tmp / "pickle" / "model.safetensors").rename(tmp / "pickle" / "pytorch_model.bin")
    (tmp / "bare" / "tokenizer.json").unlink()
    (tmp / "corrupt.png").write_bytes(b"not a picture")
    (tmp / "truncated.png").write_bytes(image.read_bytes()[:5000])
    (tmp / "empty.txt").write_text(" \n")
    frames = [Image.new("RGB", (50, 50), c) for c in ("red", "blue")]
    frames[0].save(tmp / "moving.gif", save_all=True, append_images=frames[1:])
    Image.new("1", (20_000, 20_000)).save(tmp / "bomb.png")
    for name, value in (("infinite", float("inf")), ("other", 1.0)):
        row = {"need": [[value] * 2] * 9, "visual": [[1.0] * 2] * 9, "prompts": 1, "model": "another"}
        (tmp / f"{name}.json").write_text(json.dumps(row))
    return tmp


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_line_and_exit_code_2(name, vlm, spoilt, image, capsys):
    args, message = BAD[name]
    args = [a.format(tmp=spoilt, image=image) for a in args]
    model = [] if "--model" in args else ["--model", str(vlm)]
    prompt = [] if args[0].startswith("--prompt") else ["--prompt", "?"]
    with pytest.raises(SystemExit) as stop:
        generate.main([*model, *prompt, *PLAIN, *args])
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert message in err and err.count("\n") == 1 and err.startswith("python -m hybridkv.generate: error: ")
    assert not out


def test_bad_input_ends_a_real_process_in_the_same_way(vlm):
    done = run("--model", vlm, "--prompt", b"\xff", "--image", "none.png")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not done.stdout


def test_sizes_are_readable():
    assert [size(n) for n in (7, 1234, 999_600, 2.5e9, 5e12)] == ["7 B", "1.23 kB", "1 MB", "2.5 GB", "5e+03 GB"]


def test_table_lines_up():
    row = dict.fromkeys(KEYS, 1) | {"step_bytes": 1, "policy": "full", "ms_per_token": None}
    lines = table([row, row | {"policy": "hybridkv", "budget": 0.1}]).splitlines()
    assert len(lines) == 4 and lines[1].index("full") == lines[2].index("1 B")


def test_command_lines_of_every_kind():
    counts = fuzz(cases=24, seed=7)
    assert counts["right"] >= 6 and counts["refused"] >= 6 and counts["right"] + counts["refused"] == 24
