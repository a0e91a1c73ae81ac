"""What the documents say exists: files, modules, options, code that runs, figures that are in the rows."""

import contextlib
import importlib
import importlib.util
import io
import json
import re
import shlex
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image

import hybridkv.calibrate
import hybridkv.chat
import hybridkv.generate
from bench import overview, report
from demo.tiny_vlm import config as tiny_config
from demo.tiny_vlm import random_model
from hybridkv import HybridConfig
from hybridkv.version import __version__
from tests.lab import head_profile, prompt

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCS = [
    README,
    ROOT / "CHANGELOG.md",
    ROOT / "bench" / "NOTES.md",
    ROOT / "hybridkv" / "demos" / "boards" / "README.md",
]
DOCS += sorted((ROOT / "docs").glob("*.md"))

pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="needs a checkout")
each = pytest.mark.parametrize("file", DOCS, ids=lambda file: str(file.relative_to(ROOT)))


def prose(text: str) -> str:
    """Without blocks and spans of code."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    text = re.sub(r"^    .*$", "", text, flags=re.M)
    return re.sub(r"`[^`]*`", "`", text)


def anchors(text: str) -> set[str]:
    """The names that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def code_blocks(file: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", file.read_text(encoding="utf-8"), re.S | re.M)


def commands(text: str) -> list[list[str]]:
    """Every command of ours in code: the module and its arguments, as far as they are spelled out."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    text = re.sub(r"\\\n\s*", " ", text)  # one line each
    blocks = re.findall(r"^    .*$", text, re.M)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", re.sub(r"^    .*$", "", text, flags=re.M))]
    found = []
    for line in blocks + spans:
        line = re.sub(r"#.*$", "", line)
        line = re.sub(r"\bhybridkv-(generate|calibrate|chat)", r"python -m hybridkv.\1", line)
        for call in re.findall(r"python -m ((?:hybridkv|bench|demo)\.\w.*?)(?=;|$| python -m )", line):
            with contextlib.suppress(ValueError):  # half a quotation
                found.append(shlex.split(call))
    for table in re.findall(r"^\|.*`python -m bench\.` \+ \|$(?:\n\|.*)+", text, re.M):
        found += [shlex.split("bench." + span) for span in re.findall(r"`((?!python)[a-z_]+ --[^`]*)`", table)]
    return found


@cache
def options(module: str) -> set[str]:
    """The options that a module's `--help` names; it takes none if it has no `main`."""
    main = getattr(importlib.import_module(module), "main", None)
    if main is None:
        return set()
    shown = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(shown), pytest.raises(SystemExit):
        patch.setattr(sys, "argv", [module, "--help"])
        main()
    return set(re.findall(r"--[a-z][a-z-]*", shown.getvalue()))


@each
def test_links_lead_somewhere(file):
    text = file.read_text(encoding="utf-8")
    links = [target for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)) if "://" not in target]
    for target in links:
        name, _, anchor = target.partition("#")
        there = file.parent / name if name else file
        assert there.exists(), target
        if anchor and there.suffix == ".md":
            assert anchor in anchors(there.read_text(encoding="utf-8")), target
    assert links or file.name in ("CHANGELOG.md",)


@each
def test_commands_exist(file):
    for module, *arguments in commands(file.read_text(encoding="utf-8")):
        assert importlib.util.find_spec(module), module
        given = {argument.partition("=")[0] for argument in arguments if argument.startswith("--")}
        assert not given or given <= options(module), (module, given - options(module))


def test_enough_commands_were_found():
    found = [module for file in DOCS for module, *_ in commands(file.read_text(encoding="utf-8"))]
    assert len(found) > 60
    assert {"hybridkv.generate", "hybridkv.calibrate", "bench.decode", "bench.memory", "demo.train"} <= set(found)


def test_modules_in_prose_exist():
    for file in DOCS:
        for module in set(re.findall(r"`((?:bench|demo|hybridkv)\.[a-z_.]+)`", file.read_text(encoding="utf-8"))):
            name, _, attribute = module.rpartition(".")
            if file.name == "CHANGELOG.md" or not name:  # which names what is gone
                continue
            with contextlib.suppress(ModuleNotFoundError):
                if importlib.util.find_spec(module):
                    continue
            assert hasattr(importlib.import_module(name), attribute), f"{module} in {file.name}"


def test_files_named_in_prose_exist():
    for file in DOCS:
        for name in re.findall(
            r"`((?:hybridkv|bench|demo|model|tests|docs|examples)/[\w./-]+\.\w+)`", file.read_text()
        ):
            if file.name != "CHANGELOG.md":
                assert (ROOT / name).exists(), f"{name} in {file.name}"


def test_the_tree_in_method_is_the_tree():
    tree = (ROOT / "docs" / "method.md").read_text(encoding="utf-8").split("## Where things are")[1]
    for folder in ("hybridkv", "hybridkv/planning", "hybridkv/cache", "hybridkv/html", "hybridkv/lmms", "model"):
        for module in (ROOT / folder).glob("*.py"):
            if module.name not in ("__init__.py", "version.py"):
                assert re.search(rf"\b{module.name}", tree), f"{folder}/{module.name}"
    for name in re.findall(r"\b[a-z_]+\.py\b", tree):
        assert list(ROOT.glob(f"*/{name}")) + list(ROOT.glob(f"hybridkv/*/{name}")), name


def test_every_option_and_field_is_named():
    text = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    for module in ("hybridkv.generate", "hybridkv.chat"):
        assert options(module) - {"--help"} <= set(re.findall(r"--[a-z-]+", text))
    source = (ROOT / "hybridkv" / "report.py").read_text(encoding="utf-8").split("def table")[0]
    assert set(re.findall(r'^ +"(\w+)":', source, re.M)) <= set(
        re.findall(r"`(\w+)`", text.split("`--json` prints")[1])
    )


def test_readme_is_short_and_its_code_compiles():
    assert len(README.read_text(encoding="utf-8").splitlines()) < 150
    blocks = code_blocks(README)
    assert blocks
    for block in blocks:
        code = compile(block, "README.md", "exec")
        imports = "\n".join(line for line in block.splitlines() if line.startswith(("from ", "import ")))
        exec(imports, {})
        assert code.co_names


def test_a_policy_of_ones_own_runs_as_written():
    own, profile = code_blocks(ROOT / "docs" / "policies.md")
    model = random_model(tiny_config(layers=2, hidden_size=96, heads=6, kv_heads=2, head_dim=16, tie=False))
    space = {"model": model}
    exec(own, space)
    engine = space["engine"]
    engine.compile = False
    (result,) = engine.generate([prompt(500, 0)], 20)
    assert len(result.token_ids) == 20
    assert engine.stats.dynamic_heads == engine.stats.static_heads == 2
    assert engine.stats.bytes.step <= 0.3 * engine.stats.bytes.full
    compile(profile, "policies.md", "exec")


def test_a_head_profile_loads_as_written(tmp_path, monkeypatch):
    _, profile = code_blocks(ROOT / "docs" / "policies.md")
    head_profile(2, 2).save(tmp_path / "heads.json")
    monkeypatch.chdir(tmp_path)
    space = {}
    exec(profile, space)
    assert isinstance(space["config"], HybridConfig)
    assert torch.equal(space["config"].head_profile.need, head_profile(2, 2).need)


def test_the_table_on_quality_is_in_the_rows(capsys):
    text = README.read_text(encoding="utf-8")
    (call,) = [args for module, *args in commands(text) if module == "bench.report"]
    report.main([str(ROOT / call[0]), *call[1:]])
    printed = capsys.readouterr().out.splitlines()
    table = [line for line in text.split("## Quality")[1].split("## Memory")[0].splitlines() if line.startswith("| `")]
    assert len(table) >= 5
    assert set(table) <= set(printed)


def test_the_table_on_speed_is_in_the_rows():
    """Its commands are those that the rows were made by, and its milliseconds theirs."""
    table = [line for line in README.read_text(encoding="utf-8").split("## Memory")[1].splitlines() if line[:1] == "|"]
    files = (ROOT / "bench" / "results").glob("*.jsonl")
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    made = {row["command"].partition(" --out")[0]: [] for row in rows if "command" in row}
    for row in rows:
        if row.keys() >= {"command", "ms_per_token"}:
            made[row["command"].partition(" --out")[0]].append(f"{row['ms_per_token']:.1f}")
    command = ""
    for _, what, full, ours, how, _ in (line.split("|") for line in table[2:]):
        command = command if "the same" in how else "python -m bench." + how.strip(" `")
        assert command in made, command
        if "step" in what or "decode" in command:
            shown = re.findall(r"\d+\.\d(?= ms|;)", full + ours)
            assert shown and set(shown) <= set(made[command]), what


def test_the_picture_is_drawn_from_the_rows(tmp_path):
    pytest.importorskip("matplotlib")
    overview.main([str(tmp_path / "overview.png")])
    with Image.open(tmp_path / "overview.png") as new, Image.open(ROOT / "docs" / "overview.png") as there:
        assert new.size == there.size


def test_version_and_changes():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[(.*?)\]", text, re.M)
    assert versions[0] == "Unreleased"
    assert versions[1] == __version__
    for main in (hybridkv.generate.main, hybridkv.calibrate.main, hybridkv.chat.main):
        with pytest.raises(SystemExit) as stop:
            main(["--version"])
        assert stop.value.code == 0
