"""`generate --batch`: many prompts, each answered as if it were the only one; bad lines, and runs that go on."""

import json
from pathlib import Path

import pytest
import torch

from hybridkv import Engine, HybridConfig, batch, generate
from hybridkv.batch_lines import Answers, Line, read_lines
from hybridkv.model import InputError, Processor, from_pretrained
from tests.test_pictures import picture

LONG = "The cache grew and grew. " * 20


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("batch")
    picture(168, 168, 1).save(folder / "a.png")
    picture(112, 224, 2).save(folder / "b.png")
    (folder / "long.txt").write_text(LONG)
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_model(vlm):
    """In float64, so that answers are the same whatever they are computed with; loaded once."""
    model = from_pretrained(vlm, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch, "from_pretrained", lambda *args, **how: model)
        yield model


def rows_of(files: Path) -> list[dict]:
    a, b = str(files / "a.png"), str(files / "b.png")
    told = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "image", "path": b}]}]
    told[1]["content"].append({"type": "text", "text": "What?"})
    return [
        {"id": "first", "prompt": "What is it?", "images": [a]},
        {"prompt": "And what else, in many words?", "images": [a], "max_new_tokens": 3},
        {"prompt": "What?", "images": [b], "system": "Be brief."},
        {"prompt": "Hi"},
        {"prompt": "Where?", "images": [a]},
        {"prompt": "Who?", "context": LONG},
        {"prompt": "Who?", "context_file": str(files / "long.txt")},
        {"messages": told},
    ]


def ask(vlm, source: Path, out: Path, *more: str, code: int = 0) -> list[dict]:
    """What the command writes for a file, in the order of its lines."""
    arguments = ["--model", str(vlm), "--batch", str(source), "--out", str(out), "--max-new-tokens", "8"]
    try:
        generate.main([*arguments, "--no-compile", "--no-calibration", *more])
        ended = 0
    except SystemExit as stop:
        ended = stop.code
    assert ended == code
    return sorted(map(json.loads, out.read_text().splitlines()), key=lambda row: row["line"])


def write(file: Path, rows: list) -> Path:
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def alone(vlm, model, row: dict, budget: dict) -> list[int]:
    """A line's answer, asked by itself."""
    processor = Processor.from_pretrained(vlm)
    context = LONG if "context_file" in row else row.get("context", "")
    text, system = row.get("prompt", row.get("messages")), row.get("system", "")
    prompt = processor(text, images=row.get("images", ()), context=context, system=system)
    engine = Engine(model, HybridConfig(**budget), "hybridkv", model.cfg.eos_token_id, compile=False)
    return engine.generate([prompt], row.get("max_new_tokens", 8))[0].token_ids


@pytest.mark.parametrize("memory", [(), ("--memory", "0.000001")], ids=["as many as fit", "one at a time"])
def test_each_is_answered_as_if_alone(vlm, files, tmp_path, monkeypatch, one_model, memory):
    read = []
    monkeypatch.setattr(
        Engine, "read", lambda self, prompt, f=Engine.read, **how: read.append(1) or f(self, prompt, **how)
    )
    rows = rows_of(files)
    got = ask(vlm, write(tmp_path / "in", rows), tmp_path / "out", *memory)
    assert [row["line"] for row in got] == list(range(1, len(rows) + 1)) and got[0]["id"] == "first"
    rounded = ask(vlm, tmp_path / "in", tmp_path / "other", "--int8-readings", *memory)
    assert len(read) == 6 and [row["line"] for row in rounded] == [row["line"] for row in got]
    for row, answer in zip(rows, got, strict=True):
        assert answer["token_ids"] == alone(vlm, one_model, row, {"strict": False})
        assert answer["finished"] == (len(answer["token_ids"]) < row.get("max_new_tokens", 8))
    assert read[:3] == [1] * 3  # of a.png, of b.png, and of the long text, which is the same in a file


def test_what_lines_have_in_common_is_read_once(vlm, files, tmp_path, monkeypatch, one_model):
    """Two pictures and a text, by whatever names; and lines with budgets of their own."""
    read = []
    monkeypatch.setattr(Engine, "read", lambda self, prompt, f=Engine.read, **how: read.append(1) or f(self, prompt))
    a, b, long = files / "a.png", files / "b.png", {"context_file": str(files / "long.txt")}
    rows = [
        {"prompt": "What?", "images": [str(a), str(b)]} | long,
        {"prompt": "Where is it?", "images": [f"{files}/./a.png", f"{files}/../{files.name}/b.png"], "context": LONG},
        {"prompt": "Why?", "images": [str(b), str(a)]} | long,
        {"prompt": "Who?", "images": [str(a)], "budget": 0.95},
        {"prompt": "When?", "images": [str(a)], "budget": 1},
    ]
    got = ask(vlm, write(tmp_path / "in", rows), tmp_path / "out")
    assert len(read) == 1 + 1  # of the first two lines, and of the last two
    for row, answer in zip(rows, got, strict=True):
        budget = {"budget": row["budget"]} if "budget" in row else {"strict": False}
        assert answer["token_ids"] == alone(vlm, one_model, row, budget)
    (wrong,) = ask(vlm, write(tmp_path / "in", rows[-1:]), tmp_path / "full", "--policy", "full", code=2)
    assert '"budget" does not go with --policy full' in wrong["error"]


def test_a_run_goes_on_where_it_was_cut_off(vlm, files, tmp_path, monkeypatch, capsys):
    source, out, asked = write(tmp_path / "in", rows_of(files)), tmp_path / "out", []
    whole = ask(vlm, source, out)
    stream = Engine.stream
    monkeypatch.setattr(
        Engine, "stream", lambda self, given, *more: asked.append(len(given)) or stream(self, given, *more)
    )
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:5]) + lines[5][:30])
    assert ask(vlm, source, out) == whole and sum(asked) == 3
    assert ask(vlm, source, out) == whole and sum(asked) == 3
    assert "all 8 lines are answered already" in capsys.readouterr().err
    for changed in (("--budget", "0.9"), ("--seed", "3")):
        before = out.read_text()
        ask(vlm, source, out, *changed, code=2)
        assert "given with other settings" in capsys.readouterr().err and out.read_text() == before
    out.write_text("a diary\n")
    with pytest.raises(SystemExit):
        generate.main(["--model", str(vlm), "--batch", str(source), "--out", str(out)])
    assert "line 1, is no answer of this command" in capsys.readouterr().err and out.read_text() == "a diary\n"


def test_compiled_batches_are_all_of_one_size(vlm, files, tmp_path, monkeypatch):
    """A batch of another size would need another graph. Here nothing is compiled really."""
    rows, stream, asked = rows_of(files)[:5], Engine.stream, []
    expected = ask(vlm, write(tmp_path / "in", rows), tmp_path / "out")
    monkeypatch.setattr(Engine, "stream", lambda self, b, *more: asked.append(len(b)) or stream(self, b, *more))
    monkeypatch.setattr(Engine, "_compile", lambda self: None)
    monkeypatch.setattr(batch, "can_compile", lambda device: True)
    monkeypatch.setattr(batch, "AT_ONCE", 3)
    generate.main(
        ["--model", str(vlm), "--batch", str(tmp_path / "in"), "--out", str(tmp_path / "other"), "--no-calibration",
         "--max-new-tokens", "8"]
    )  # fmt: skip
    got = sorted(map(json.loads, (tmp_path / "other").read_text().splitlines()), key=lambda row: row["line"])
    assert got == expected and asked == [3, 3]


BAD = [
    ("nonsense", "no JSON"),
    ("[" * 100_000, "no JSON"),
    ('"text"', "must be a JSON object, got str"),
    ('{"prompt": "a", "image": "b"}', "has no place for image: known are"),
    ("{}", 'wants either "prompt" or "messages"'),
    ('{"prompt": "a", "messages": []}', 'wants either "prompt" or "messages"'),
    ('{"messages": "a"}', '"messages" must be a list'),
    ('{"prompt": "a", "context": "b", "context_file": "c"}', "not both"),
    ('{"prompt": "a", "max_new_tokens": 0}', "at least 1, got 0"),
    ('{"prompt": "a", "max_new_tokens": true}', "at least 1, got True"),
    ('{"prompt": "a", "max_new_tokens": 1000000}', "more than the model's"),
    ('{"prompt": "a", "budget": 1.5}', "a share in (0, 1], got 1.5"),
    ('{"prompt": "a", "budget": true}', "a share in (0, 1], got True"),
    ('{"prompt": 5}', "the prompt must be text"),
    ('{"prompt": "a", "images": ["missing.png"]}', "missing.png does not exist"),
    ('{"prompt": "a", "images": 5}', "images must be a list"),
    ('{"prompt": "a", "context_file": "missing.txt"}', "missing.txt does not exist"),
    ('{"prompt": "a", "context_file": 5}', '"context_file" must be the name of a file, got 5'),
    ('{"messages": []}', "no messages"),
    ('{"prompt": "a", "prompt": "b"}', "says 'prompt' twice"),
    ('{"messages": [{"role": "user", "role": "system", "content": "a"}]}', "says 'role' twice"),
    ('{"prompt": "\\ud800"}', "half of a surrogate pair"),
]


def test_a_bad_line_is_an_error_of_that_line_only(vlm, files, tmp_path, capsys):
    rows = [*(text for text, _ in BAD), "", {"id": [1], "prompt": "Hi"}]
    source, out = write(tmp_path / "in", rows), tmp_path / "out"
    got = ask(vlm, source, out, code=2)
    assert [row["line"] for row in got] == [*range(1, len(BAD) + 1), len(BAD) + 2]
    for (_, message), row in zip(BAD, got, strict=False):
        assert message in row["error"] and "\n" not in row["error"]
    assert got[-1]["id"] == [1] and got[-1]["token_ids"]
    assert f"{len(BAD)} of {len(BAD) + 1} lines went wrong" in capsys.readouterr().err
    write(source, ['{"prompt": "put right"}'] * len(BAD) + rows[-2:])
    assert not any("error" in row for row in ask(vlm, source, out))


def test_a_budget_that_one_line_can_not_keep(vlm, files, tmp_path, one_model):
    rows = [{"prompt": f"Who {n}?", "context": LONG + LONG} for n in range(3)]
    rows.insert(1, {"id": "short", "prompt": "Hello, and how do you do? " * 4, "context": "word " * 8})
    got = ask(vlm, write(tmp_path / "in", rows), tmp_path / "out", "--budget", "0.6", code=2)
    assert [row["line"] for row in got if "error" in row] == [2]
    assert "a budget of 0.6 can't be met" in got[1]["error"] and got[1]["id"] == "short"
    for row, answer in zip(rows, got, strict=True):
        if "error" not in answer:
            assert answer["token_ids"] == alone(vlm, one_model, row, {"budget": 0.6})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "in"], "--out is missing"),
        (["--out", "x"], "--batch is missing"),
        (["--batch", "in", "--out", "x"], "--model is missing"),
        (["--batch", "in", "--out", "x", "--prompt", "y"], "--prompt does not go with --batch"),
        (["--batch", "in", "--out", "x", "--image", "y"], "--image does not go with --batch"),
        (["--batch", "in", "--out", "x", "--json"], "--json does not go with --batch"),
        (["--batch", "in", "--out", "x", "--model", "demo", "--memory", "0"], "--memory must be"),
        (["--batch", "in", "--out", "x", "--model", "demo", "--memory", "nan"], "--memory must be"),
        (["--batch", "missing", "--out", "x", "--model", "demo"], "missing: No such file"),
        (["--batch", "blank", "--out", "x", "--model", "demo"], "blank holds no prompts"),
        (["--batch", "binary", "--out", "x", "--model", "demo"], "is not UTF-8 text"),
        (["--batch", "in", "--out", "no/such/file", "--model", "demo"], "no/such/file can't be written: No such file"),
        (["--batch", "in", "--out", ".", "--model", "demo"], "Is a directory"),
        (["--batch", "in", "--out", "in", "--model", "demo"], "is no answer"),
        (["--batch", "in", "--out", "binary", "--model", "demo"], "is no answer"),
        (["--batch", "in", "--out", "line", "--model", "demo"], "is no answer"),
        (["--batch", "line", "--out", "line", "--model", "demo"], "is no answer"),
    ],
)
def test_what_can_not_be_asked_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in", [{"prompt": "Hi"}])
    (tmp_path / "blank").write_text("\n \n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "line").write_text('{"prompt": "without an end of line"}')
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(SystemExit) as stop:
        generate.main(arguments)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and message in err and err.count("\n") == 1
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_bugs_and_running_out_of_memory(vlm, files, tmp_path, monkeypatch):
    rows, stream = [{"prompt": "Hi"}, {"prompt": "Who?"}, {"prompt": "Is it so?"}], Engine.stream

    def small(self, given, *more):
        if len(given) > 1:
            raise torch.OutOfMemoryError("x")
        return stream(self, given, *more)

    monkeypatch.setattr(Engine, "stream", small)
    got = ask(vlm, write(tmp_path / "in", rows), tmp_path / "out")
    assert all(row["token_ids"] for row in got) and len(got) == 3

    def broken(self, given, *more):
        raise RuntimeError("a bug")

    monkeypatch.setattr(Engine, "stream", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        ask(vlm, tmp_path / "in", tmp_path / "other")


def test_files_of_lines(tmp_path):
    file = tmp_path / "in"
    file.write_bytes('\ufeff{"prompt": "a"}\r\n\n  {"prompt": "b"}'.encode())
    assert read_lines(file) == [Line(1, '{"prompt": "a"}'), Line(3, '{"prompt": "b"}')]
    answers = Answers(tmp_path / "out", read_lines(file), "settings")
    answers.add(Line(3, '{"prompt": "b"}'), {"text": "x"})
    assert Answers(tmp_path / "out", read_lines(file), "settings").done == {3}
    with pytest.raises(InputError, match="other prompts"):
        Answers(tmp_path / "out", [Line(3, '{"prompt": "c"}')], "settings")
