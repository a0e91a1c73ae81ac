"""What all commands share: where they write, how they end, devices, compilers, sampling; and `hybridkv.calibrate`."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hybridkv import Sampling, calibrate, cli, generate
from hybridkv.model import InputError
from hybridkv.sampling import sample
from hybridkv.version import __version__

ROOT = Path(__file__).parent.parent


def ended(main, argv: list[str]) -> int:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    return stop.value.code


# Streams


def test_a_reader_that_has_gone_ends_it_quietly():
    """As after `| head`: no traceback, neither then nor when the interpreter ends."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "hybridkv.generate", "--list-demos"]
    with os.fdopen(writing, "w") as gone:
        done = subprocess.run(command, stdout=gone, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert done.returncode == 141 and not done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_is_one_line(monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        code = ended(generate.main, ["--list-demos"])
    err = capsys.readouterr().err
    assert code == 2 and "No space left" in err and err.count("\n") == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_notes_that_can_not_be_written_stop_nothing(monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        cli.say("nobody reads this")
        full.write("nor this")  # what is still buffered goes nowhere, too


def test_a_closed_stderr_leaves_stdout_clean(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", None)
    assert ended(generate.main, ["--bogus"]) == 2
    assert not capsys.readouterr().out


def test_a_closed_stdout_is_said(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", None)
    assert ended(generate.main, ["--list-demos"]) == 2
    assert "stdout is closed" in capsys.readouterr().err


def test_an_answer_that_the_terminal_can_not_show_is_escaped(monkeypatch, tmp_path):
    with open(tmp_path / "out", "w", encoding="ascii") as out:
        monkeypatch.setattr(sys, "stdout", out)
        with cli.one_line_errors(cli.Parser("generate", ""), ""):
            print("\u5b57")
    assert (tmp_path / "out").read_text() == "\\u5b57\n"


def test_an_interrupt_exits_with_130():
    # A shell's background jobs, and so perhaps this process, ignore SIGINT, and would hand that on.
    heed = "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    run = "runpy.run_module('hybridkv.generate', run_name='__main__')"
    command = [sys.executable, "-u", "-c", f"{heed}; {run}", "--demo", "read", "--no-compile"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout.readline().startswith("demo:")  # imported, and at work
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == 130 and "Traceback" not in err


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("x"), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")],
)
@pytest.mark.parametrize("command", [generate, calibrate])
def test_out_of_memory_is_one_line(error, command, monkeypatch, capsys):
    def run(args) -> None:
        raise error

    monkeypatch.setattr(command, "run", run)
    code = ended(command.main, ["--model", "demo"] + ["--out", "x"] * (command is calibrate))
    err = capsys.readouterr().err
    assert code == 2 and "out of memory: " in err and err.count("\n") == 1


def test_a_bug_leaves_its_traceback(monkeypatch):
    def run(args) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(generate, "run", run)
    with pytest.raises(RuntimeError, match="a bug"):
        generate.main([])


@pytest.mark.parametrize(("command", "name"), [(generate, "generate"), (calibrate, "calibrate")])
@pytest.mark.parametrize("typed", ["hybridkv-{}", "{}.py"])
def test_version_and_the_name_that_was_typed(command, name, typed, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/" + typed.format(name)])
    assert ended(command.main, ["--version"]) == 0
    assert capsys.readouterr().out == f"hybridkv {__version__}\n"
    assert ended(command.main, ["--bogus"]) == 2
    shown = f"hybridkv-{name}" if typed.startswith("hybridkv") else f"python -m hybridkv.{name}"
    assert capsys.readouterr().err.startswith(shown + ": error: ")


@pytest.mark.parametrize("option", ["--prompt", "--image", "--top-p"])
def test_two_dashes_are_no_value(option, capsys):
    assert ended(generate.main, [option + "=--"]) == 2
    assert f"argument {option}: -- is no value" in capsys.readouterr().err


# Devices and compilers


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert cli.choose_device(None) == cli.choose_device("cpu") == torch.device("cpu")
    for name in ("cuda", "cuda:0", "meta", "hpu", "mkldnn", "cpu:1", "", "\0", "abacus"):
        with pytest.raises(InputError, match="there is cpu"):
            cli.choose_device(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="there is cpu, cuda, cuda:0, cuda:1"):
        cli.choose_device("cuda:2")


@pytest.fixture(params=["missing", "not a program", "without headers", "silent"])
def broken_compiler(request, tmp_path, monkeypatch) -> Iterator[Path]:
    """A C++ compiler that does not work; one answers `--version`, as if all were well."""
    from torch._inductor import config, cpu_vec_isa

    path = tmp_path / "c++"
    answer = 'case "$*" in *--version*) echo "g++ 13.0"; exit 0;; esac\n'
    complaint = 'echo "in file x.h:" >&2; echo "x.h:1: fatal error: Python.h: No such file" >&2\n'
    if request.param != "missing":
        path.write_text("#!/bin/sh\n" + (answer + complaint) * (request.param == "without headers") + "exit 1\n")
        path.chmod(0o644 if request.param == "not a program" else 0o755)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch._dynamo.reset()
    remembered = (cpu_vec_isa.valid_vec_isa_list, cpu_vec_isa.VecISA._VecISA__bool__impl)
    for each in remembered:
        each.cache_clear()
    with config.patch({"cpp.cxx": (None, str(path))}):
        yield path
    for each in remembered:  # else later tests would compile for a processor without vectors, or not at all
        each.cache_clear()


def test_without_a_compiler_it_says_so_once_and_runs_uncompiled(broken_compiler, capsys):
    assert not cli.can_compile(torch.device("cpu"))
    err = capsys.readouterr().err
    assert err.startswith("note: decoding runs uncompiled") and err.count("\n") == 1
    assert str(broken_compiler) in err or "Python.h" in err
    assert "apt install g++" in err and "--no-compile" in err
    assert cli.can_compile(torch.device("cuda"))  # it is not asked there


def test_a_torch_that_compiles_wrongly_for_cpus_does_not(vlm, monkeypatch, capsys):
    monkeypatch.setattr("hybridkv.cache.attention.COMPILES_FOR_CPUS", False)
    arguments = ["--model", str(vlm), "--prompt", "?", "--policy", "full", "--max-new-tokens", "2", "--json"]
    generate.main(arguments)
    out, err = capsys.readouterr()
    assert err.startswith("note: decoding runs uncompiled") and "torch 2.13 or later" in err and err.count("\n") == 1
    assert json.loads(out)["compile_s"] == 0
    assert cli.can_compile(torch.device("cuda"))


def test_a_compilation_that_fails_later_is_one_line(broken_compiler, capsys):
    with pytest.raises(SystemExit) as stop, cli.one_line_errors(cli.Parser("generate", ""), ""):
        torch.compile(lambda x: x.sin() + 2)(torch.zeros(3))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "--no-compile" in err and err.count("\n") == 1


def test_the_command_falls_back_and_answers(vlm, monkeypatch, capsys):
    def no_compiler(device: torch.device) -> bool:
        cli.say("note: no compiler")
        return False

    monkeypatch.setattr(generate, "can_compile", no_compiler)
    arguments = ["--model", str(vlm), "--prompt", "?", "--policy", "full", "--max-new-tokens", "2", "--json"]
    generate.main(arguments)
    out, err = capsys.readouterr()
    assert err == "note: no compiler\n" and json.loads(out)["compile_s"] == 0
    generate.main([*arguments, "--no-compile"])
    assert not capsys.readouterr().err


# Sampling


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": x} for x in (float("nan"), float("inf"), -1.0, 1e-40, 9e-4, 1001.0, 1e308)]
    + [{"top_p": x} for x in (float("nan"), 0.0, -1.0, 1.01)]
    + [{"seed": x} for x in (-1, 2**63, 10**20, 1.5)],
)
def test_sampling_refuses_what_has_no_meaning(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name} must"):
        Sampling(**wrong)


def test_sampling_is_sound_at_its_bounds():
    torch.manual_seed(0)
    logits, noise = torch.randn(64, 50) * 1e4, torch.rand(64)
    low, high = (torch.tensor(x) for x in (1e-3, 1e3))
    one = torch.tensor(1.0)
    assert torch.equal(sample(logits, low, one, noise), logits.argmax(-1))
    assert torch.equal(sample(logits, one, torch.tensor(1e-40), noise), logits.argmax(-1))
    drawn = sample(torch.randn(1, 50).expand(5000, 50), high, one, torch.rand(5000)).bincount(minlength=50)
    assert drawn.min() > 50 and drawn.max() < 200  # about evenly


# hybridkv.calibrate

BAD_SAMPLES = {
    "nothing": ("", "holds no text"),
    "no JSON": ("prompt", "line 1: "),
    "second line": ('{"prompt": "a"}\n{"prompt": 3}', "line 2: prompt must be a text"),
    "no prompt": ("{}", 'with a "prompt"'),
    "a list": ("[1]", 'with a "prompt"'),
    "deep": ("[" * 100_000, 'with a "prompt"'),
    "a picture's name alone": ('{"prompt": "a", "images": "a.png"}', "list of file names"),
    "a number as a picture": ('{"prompt": "a", "images": [1]}', "list of file names"),
    "a missing picture": ('{"prompt": "a", "images": ["none.png"]}', "line 1: none.png does not exist"),
    "no text": ('{"prompt": "a", "context": 1}', "context must be a text"),
    "a typo": ('{"prompt": "a", "image": ["a.png"]}', "unknown key 'image'"),
    "a key twice": ('{"prompt": "a", "prompt": "b"}', "twice"),
    "too long": (json.dumps({"prompt": "a" * 200_000}), "more than the model's"),
}


@pytest.mark.parametrize("name", BAD_SAMPLES)
def test_bad_samples_are_one_line_and_leave_nothing_behind(name, vlm, tmp_path, capsys):
    text, message = BAD_SAMPLES[name]
    (tmp_path / "samples.jsonl").write_text(text)
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / "heads.json"
    code = ended(calibrate.main, ["--model", str(vlm), "--prompts", str(tmp_path / "samples.jsonl"), "--out", str(out)])
    err = capsys.readouterr().err
    assert code == 2 and message in err and err.count("\n") == 1
    assert not list(out.parent.iterdir())


@pytest.mark.parametrize(
    "out", ["none/heads.json", "", ".", "file/heads.json", "x" * 300, "a\0b", "circle", "/dev/null"]
)
def test_where_a_profile_can_not_go_is_found_before_anything_is_loaded(out, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "circle").symlink_to("circle")
    monkeypatch.chdir(tmp_path)
    code = ended(calibrate.main, ["--model", "not loaded", "--prompts", "not read", "--out", out])
    err = capsys.readouterr().err
    assert code == 2 and err.count("\n") == 1 and ("can't be written" in err or "no file that can be replaced" in err)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["circle", "file"]


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    (tmp_path / "real").write_text("before")
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(KeyboardInterrupt), cli.replacing(tmp_path / "link", "--out") as new:
        new.write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "real").read_text() == "before"
    with cli.replacing(tmp_path / "link", "--out") as new:
        new.write_text("after")
    assert (tmp_path / "real").read_text() == "after" and (tmp_path / "link").is_symlink()
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--budget", "1"], "prunes nothing"),
        (["--budget", "nan"], "budget must lie"),
        (["--new-tokens", "0"], "at least 1"),
        (["--device", "hpu"], "can't be used"),
        (["--model", "none"], "--prompts is missing"),
    ],
)
def test_what_calibrate_refuses_before_anything_is_loaded(wrong, message, tmp_path, capsys):
    code = ended(calibrate.main, ["--model", "demo", "--out", str(tmp_path / "heads.json"), *wrong])
    err = capsys.readouterr().err
    assert code == 2 and message in err and err.count("\n") == 1 and not list(tmp_path.iterdir())
