"""`hybridkv.chat` as a person would use it, at a terminal and on a pipe; and the conversation behind it."""

import io
import os
import re
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from demo import tiny_vlm
from hybridkv import Engine, HybridConfig, chat, demos
from hybridkv.conversation import Conversation
from hybridkv.model import InputError, Processor, from_pretrained
from hybridkv.typed import history_file
from tests.lab import examples
from tests.terminal import terminal
from tests.test_pictures import picture

DEMOS = demos.by_name()


@pytest.fixture(scope="module")
def parts(vlm) -> tuple[torch.nn.Module, Processor]:
    return from_pretrained(vlm, dtype=torch.float64), Processor.from_pretrained(vlm)


def conversation(parts, **chosen) -> Conversation:
    model, processor = parts
    return Conversation(Engine(model, HybridConfig(budget=0.3, strict=False), compile=False), processor, **chosen)


def said(talk: Conversation, question: str, new_tokens: int = 6) -> str:
    return "".join(talk.stream(question, new_tokens))


def read_tokens(talk: Conversation) -> list[int]:
    """Fills a list with how many tokens go through a layer, time after time."""
    passed: list[int] = []
    talk.engine.model.layers[0].mlp.register_forward_hook(lambda m, x, y: passed.append(x[0].shape[1]))
    return passed


def at_once(talk: Conversation, pictures: list, question: str, new_tokens: int) -> str:
    """The answer to the same messages, all read at once."""

    def content(message: dict) -> str | list[dict]:
        if isinstance(message["content"], str):
            return message["content"]
        return [part if part["type"] == "text" else {"type": "image"} for part in message["content"]]

    messages = [message | {"content": content(message)} for message in talk.messages]
    prompt = talk.processor([{"role": "user", "content": question}], images=pictures, after=messages)
    engine = Engine(talk.engine.model, talk.engine.config, compile=False)
    return talk.processor.decode(engine.generate([prompt], new_tokens)[0].token_ids)


def test_turns_are_those_of_reading_all_at_once(parts):
    talk = conversation(parts, system="Be brief.", join=40)
    talk.show(images=[picture(112, 84)])
    for n, question in enumerate(["What is it?", "And then, at some length, please?", "Is it?", "So?"]):
        if n == 2:
            talk.show(images=[picture(84, 56, 1)], context="A note on it. " * 9)
        pictures = [picture(112, 84), picture(84, 56, 1)][: 1 + (n >= 2)]
        expected = at_once(talk, pictures, "\n\n" * (n == 2) + question, 30)  # after a context, a paragraph of its own
        assert said(talk, question, 30) == expected
        assert talk.messages[-1]["role"] == "assistant" and talk.messages[0]["role"] == "system"
    assert [m["role"] for m in talk.messages[1:]] == ["user", "assistant"] * 4


def test_turns_join_the_reading_when_there_are_many(parts):
    talk = conversation(parts, join=60)
    talk.show(images=[picture(112, 84)])
    first = talk.read_tokens
    tokens = []
    for _ in range(5):
        said(talk, "And what else is there?")
        tokens.append(talk.read_tokens)
    assert tokens[0] == first and tokens[-1] > first and tokens == sorted(tokens)
    plain = conversation(parts, join=60)  # without anything to look at, too
    for _ in range(4):
        said(plain, "And what else is there?")
    assert plain.reading and plain.reading.tokens > 60


def test_a_conversation_of_text_needs_no_reading(parts):
    talk = conversation(parts)
    assert said(talk, "Hi") and talk.reading is None
    with pytest.raises(InputError, match="nothing was read yet"):
        talk.save("x")


def test_what_fails_leaves_the_conversation_as_it_was(parts, tmp_path):
    talk = conversation(parts)
    talk.show(images=[picture(112, 84)])
    said(talk, "What?")
    before = list(talk.messages), talk.reading
    for wrong in (
        lambda: talk.show(images=["missing.png"]),
        lambda: talk.show(context=" "),
        lambda: said(talk, " "),
        lambda: said(talk, "What?", 10**6),
        lambda: talk.load(tmp_path / "missing"),
    ):
        with pytest.raises((InputError, OSError)):
            wrong()
        assert (talk.messages, talk.reading) == before
    pieces = talk.stream("Go on?", 50)
    assert next(pieces)
    pieces.close()  # as Ctrl-C does: what was answered counts
    assert len(talk.messages) == len(before[0]) + 2 and talk.messages[-1]["content"]
    talk.reset()
    assert not talk.messages and talk.reading is None


def test_questions_apart_do_not_know_of_each_other(parts):
    talk = conversation(parts, apart=True)
    talk.show(images=[picture(112, 84)])
    one, other = said(talk, "What?"), said(talk, "Where?")
    assert (said(talk, "Where?"), said(talk, "What?")) == (other, one)
    assert len(talk.messages) == 1


def test_saved_and_gone_on_from(parts, tmp_path):
    talk = conversation(parts)
    talk.show(images=[picture(112, 84)])
    said(talk, "What?")
    talk.save(tmp_path / "talk")
    other = conversation(parts)
    other.load(tmp_path / "talk")
    assert other.messages == talk.messages
    assert said(other, "And?") == said(talk, "And?")


# The command


def lines(monkeypatch, capsys, arguments: list, text: str, code: int | None = None) -> tuple[str, str]:
    """What `chat` says to lines on a pipe: stdout and stderr."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode("utf-8", "surrogateescape")), "utf-8"))
    if code is None:
        chat.main([*arguments, "--no-compile"])
    else:
        with pytest.raises(SystemExit) as stop:
            chat.main([*arguments, "--no-compile"])
        assert stop.value.code == code
    return tuple(capsys.readouterr())


def test_a_question_a_line(monkeypatch, capsys):
    asked = f"\n{DEMOS['lookup'].prompt}\n\nWhere does K8 point?\n/budget 0.5\n/policy snapkv\n/stats\n"
    out, err = lines(monkeypatch, capsys, [], asked)
    assert out.splitlines() == [" " + DEMOS["lookup"].answer, " K8 m3"]
    assert "tokens read" in err and "in host memory; first token after" in err and "> " not in out
    assert "(hybridkv, budget 0.1: a step reads" in err  # by which the last one was answered


def test_bad_lines_never_end_it(monkeypatch, capsys, tmp_path, vlm):
    saved = tmp_path / "with space.reading"
    (tmp_path / "notes").write_text("not to be lost")
    wrong = [
        ("/image missing.png", "missing.png does not exist"),
        ("/context missing.txt", "missing.txt does not exist"),
        ("/image", "/image wants something after it"),
        ("/nothing", "there is no command /nothing"),
        ("/stats", "nothing was answered to its end yet"),
        ("/reset now", "/reset takes nothing more"),
        ("/exit now", "/exit takes nothing more"),
        ("/budget much", "/budget wants a share in (0, 1], got 'much'"),
        ("/budget 2", "budget must lie in (0, 1]"),
        ("/policy sparsemm", "sparsemm needs a head profile"),
        ("/policy best", "/policy wants one of hybridkv, full"),
        ("/save /", "error:"),
        ("/save no/such/talk", "error: no/such/talk: No such file or directory"),
        (f"/save {tmp_path / 'notes'}", "is no reading, and stays as it is"),
        ("/load missing.reading", "there is no such file"),
        ("\udcff", "half of a surrogate pair"),
    ]
    fine = ["Where does V3 point?", f"/save '{saved}'", "/reset", f'/load "{saved}"', "/policy quest", "/policy snapkv"]
    fine += [f"/save '{saved}'", "/budget 0.5", "Where does K8 point?", "//why?", "/help", "/exit", "never asked"]
    out, err = lines(monkeypatch, capsys, [], "\n".join([*(line for line, _ in wrong), *fine]) + "\n", code=2)
    assert out.splitlines()[:2] == [" V3 K8", " K8 m3"] and len(out.splitlines()) == 3
    for line, message in wrong:
        assert message in err, line
    assert err.count("error: ") == len(wrong) and saved.is_file()
    assert (tmp_path / "notes").read_text() == "not to be lost"
    assert "(snapkv from now on)" in err and "(a budget of 0.5 from now on)" in err and "/video FILE" in err


def test_options(monkeypatch, capsys, vlm, tmp_path):
    (tmp_path / "text").write_text("A long text. " * 30)
    picture(112, 84).save(tmp_path / "a.png")
    arguments = ["--model", str(vlm), "--image", str(tmp_path / "a.png"), "--context", str(tmp_path / "text")]
    arguments += ["--system", "Be brief.", "--policy", "snapkv", "--max-new-tokens", "4", "--seed", "1"]
    out, err = lines(monkeypatch, capsys, arguments, "What?\nAnd?\n/stats\n")
    assert "(snapkv, budget 0.1" in err and out.count("\n") >= 2
    held = re.search(r"[\d.]+ kB in host memory", err)[0]
    _, err = lines(monkeypatch, capsys, [*arguments, "--int8-readings"], "What?\n")
    assert held not in err and "kB in host memory" in err
    _, err = lines(monkeypatch, capsys, ["--model", "no/such/folder"], "", code=2)
    assert err.count("\n") == 1 and "error: " in err
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(SystemExit):
        chat.main([])
    assert "stdin is closed" in capsys.readouterr().err


def test_at_a_terminal(tmp_path):
    """Types, reads and compares, with the bundled model; lines are kept, and Ctrl-C at the prompt is no end."""
    history = tmp_path / "folder" / "lines"
    with terminal("hybridkv.chat", "--no-compile", ignore_interrupts=True, HYBRIDKV_HISTORY=str(history)) as person:
        person.until("/help lists commands")
        person.until("> ")
        person.type(DEMOS["lookup"].prompt + "\n")
        person.until(DEMOS["lookup"].answer)
        person.until("first token after")
        person.until("> ")
        person.type(f"/image {DEMOS['chain'].images[0]}\n")
        person.until("tokens read")
        person.until("> ")
        person.interrupt_at_prompt()
        person.until("(Ctrl-D ends)")
        person.until("> ")
        person.type("/stats\n")
        person.until("a step reads")
        person.until("> ")
        person.type("\x04")
        assert person.ended() == 0
    assert DEMOS["lookup"].prompt in history.read_text()


def test_ctrl_c_stops_an_answer_and_not_the_program(vlm, tmp_path):
    """An answer of 50,000 tokens, and a home that nothing can be written to."""
    home = tmp_path / "file"
    home.write_text("")
    endless = shutil.copytree(vlm, tmp_path / "endless")
    weights = load_file(endless / "model.safetensors")
    weights["lm_head.weight"][tiny_vlm.token_id("<|im_end|>")] = 0.0  # a logit of 0 is never the largest of hundreds
    save_file(weights, endless / "model.safetensors", metadata={"format": "pt"})
    arguments = ["--model", endless, "--no-compile", "--no-calibration", "--max-new-tokens", 50_000]
    with terminal("hybridkv.chat", *arguments, HOME=str(home), XDG_STATE_HOME=str(home)) as person:
        person.until("> ")
        person.type("Go on and on?\n")
        person.until("Go on and on?")  # the echo
        while not re.search(r"\S", person.text[person.seen :]):
            assert person.read()
        person.type("\x03")
        person.until("(stopped)")
        person.until("> ")
        person.type("/help\n")
        person.until("/exit")
        person.until("> ")
        person.type("/exit\n")
        assert person.ended() == 0
    assert "Traceback" not in person.text


def test_ctrl_c_while_a_file_is_opened(tmp_path):
    """The file is a pipe into which nobody writes."""
    os.mkfifo(tmp_path / "never")
    with terminal("hybridkv.chat", "--no-compile", "--no-history") as person:
        person.until("/help lists commands")
        person.until("> ")
        person.type(f"/context {tmp_path / 'never'}\n")
        person.until("never")  # the echo
        person.interrupt_at_prompt()
        person.until("(stopped)")
        person.until("> ")
        person.type(DEMOS["lookup"].prompt + "\n")
        person.until(DEMOS["lookup"].answer)
        person.type("/exit\n")
        assert person.ended() == 0


@pytest.mark.parametrize("reading", [True, False], ids=["what is shown", "the question"])
def test_an_interrupt_while_reading_leaves_all_as_it_was(session, monkeypatch, reading):
    chat_, folder = session
    chat_.talk.reset()
    chat_.take(f"/image {folder / 'a.png'}")
    before = list(chat_.talk.messages), chat_.talk.reading
    waiting = [f"/context {folder / 'text'}" if reading else "What?", "/stats now", "And?"]
    last, layers = chat_.engine.model.layers[-1], iter([1])

    def interrupted(*_) -> None:
        if next(layers, 0):
            raise KeyboardInterrupt

    def lines() -> str:
        if len(waiting) == 2:
            assert (chat_.talk.messages, chat_.talk.reading) == before
        if not waiting:
            raise EOFError
        return waiting.pop(0)

    hook = last.register_forward_hook(interrupted)
    try:
        with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
            assert not chat.converse(chat_, lines, interactive=True)
    finally:
        hook.remove()
    assert "(stopped)" in err.getvalue() and out.getvalue().count("\n") == 1 and len(chat_.talk.messages) == 2


WORDS = ["/image", "/video", "/context", "/budget", "/policy", "/save", "/load", "/reset", "/stats", "/help", "/", "//"]
FILES = ["", "a.png", "'a.png'", "text", ".", "talk", "no/talk"]
OPERANDS = [*FILES, "0.5", "1", "1e-9", "nan", "snapkv", "quest", "full", "What?"]
typed = st.builds(lambda word, rest: f"{word} {rest}", st.sampled_from(WORDS), st.sampled_from(OPERANDS))


@given(st.lists(typed | st.sampled_from(OPERANDS) | st.text(st.characters(codec="utf-8"), max_size=12), max_size=12))
@examples(15)
def test_no_lines_end_it_but_the_last(session, given_lines):
    """Whatever is typed, in any order: each line is done, or is one line of error."""
    chat_, folder = session
    chat_.talk.reset()
    waiting = [line.replace("/exit", "").replace("/quit", "") for line in given_lines]

    def lines() -> str:
        if not waiting:
            raise EOFError
        return waiting.pop(0)

    here = Path.cwd()
    os.chdir(folder)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as err:
            fine = chat.converse(chat_, lines, interactive=True)
    finally:
        os.chdir(here)
    assert not waiting and fine == ("error: " not in err.getvalue())
    assert all(len(line) < 500 for line in err.getvalue().splitlines())


@pytest.fixture(scope="module")
def session(vlm, tmp_path_factory) -> tuple[chat.Chat, Path]:
    """A chat with a tiny model, in a folder with a picture and a text."""
    folder = tmp_path_factory.mktemp("session")
    picture(56, 56).save(folder / "a.png")
    (folder / "text").write_text("A long text. " * 20)
    arguments = ["--model", str(vlm), "--no-compile", "--no-calibration", "--max-new-tokens", "2"]
    return chat.Chat(chat.build_parser().parse_args(arguments)), folder


@pytest.mark.parametrize("where", ["", "own"])
def test_where_lines_are_kept(monkeypatch, where, tmp_path):
    for name, value in (("HYBRIDKV_HISTORY", where), ("XDG_STATE_HOME", "")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert history_file() == (Path("own") if where else tmp_path / ".local/state/hybridkv/chat-history")


def test_an_interrupt_on_a_pipe_is_the_end():
    def interrupted() -> str:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat.converse(None, interrupted, interactive=False)


def test_bugs_are_not_hidden(monkeypatch):
    class Broken:
        def take(self, line: str) -> None:
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        chat.converse(Broken(), lambda: "x", interactive=True)
