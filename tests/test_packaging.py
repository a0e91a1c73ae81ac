"""What is built from the tree works where the tree is not, and a bare checkout works where nothing is installed."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from hybridkv.version import __version__

ROOT = Path(__file__).parent.parent
PACKAGES = ["hybridkv", "model", "bench", "demo", "examples", "tests"]
FILES = ["pyproject.toml", "README.md", "LICENSE"]

# As `python -m`, several commands in one process: importing torch takes longest.
COMMANDS = """
import runpy, sys
def command(module, *args):
    sys.argv = [module, *args]
    print("$", module, *args, flush=True)
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        assert not stop.code, stop.code
    sys.stdout.flush()
SMALL = ("--max-pixels", "99999")
command("hybridkv.generate", "--version")
command("hybridkv.generate", "--list-demos")
command("hybridkv.generate", "--demo", "lookup", "--no-compile", "--max-new-tokens", "4", "--json", *SMALL)
command("hybridkv.calibrate", "--help")
from hybridkv.generate import main
from hybridkv.model import Processor
import hybridkv, hybridkv.model
print("$ files", hybridkv.__file__, hybridkv.model.__file__, sep="\\n")
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the tree: what git tracks, or, without git, all that is source."""
    copy = tmp_path_factory.mktemp("checkout") / "tree"
    tracked = None
    if (ROOT / ".git").exists() and shutil.which("git"):
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
        tracked = [
            name for name in listed.stdout.split("\0") if name and (ROOT / name).is_symlink() | (ROOT / name).is_file()
        ]
    if tracked:
        for name in tracked:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
    else:
        ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
        for name in PACKAGES:
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore)
        for name in FILES:
            shutil.copy2(ROOT / name, copy / name)
    return copy


def build(kind: str, tree: Path, out: Path) -> Path:
    """An `sdist` or `wheel` of the tree, by the backend that pyproject.toml names; nothing is fetched."""
    out.mkdir(exist_ok=True)
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(out)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def sdist(checkout, tmp_path_factory) -> Path:
    """The source distribution, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(build("sdist", checkout, folder / "dist")) as file:
        file.extractall(folder, filter="data")
    return folder / f"hybridkv-{__version__}"


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    return build("wheel", sdist, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The wheel, installed in a folder of its own."""
    folder = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", folder, wheel]
    done = subprocess.run(command, capture_output=True, text=True)
    if "No module named pip" in done.stderr:
        pytest.skip("pip is not installed here")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> Path:
    """A folder whose own modules have the names of our top-level folders."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "demo").mkdir()
    for name in ("model.py", "bench.py", "tests.py", "demo/__init__.py"):
        (folder / name).write_text(f"raise ImportError('{name} of somebody else was imported')\n")
    return folder


def python(*args: str, cwd: Path, path: list[Path]) -> str:
    """Runs Python with these folders and the libraries, but not what `.pth` files add: the tree, installed editable."""
    libraries = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*map(str, path), *libraries])}
    done = subprocess.run([sys.executable, "-S", *args], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_commands(out: str, where: Path) -> None:
    version, demos, answers, usage, files = out.split("$ ")[1:]
    assert version.splitlines()[1] == f"hybridkv {__version__}"
    assert "lookup" in demos and "large" in demos
    rows = [json.loads(line) for line in answers.splitlines()[1:]]
    assert [row["policy"] for row in rows] == ["hybridkv", "full"] and all(row["token_ids"] for row in rows)
    assert "usage: python -m hybridkv.calibrate" in usage
    for file in files.split()[1:]:
        assert Path(file).is_relative_to(where)


def test_the_wheel_holds_the_package_and_nothing_else(wheel, checkout):
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        links = [info.filename for info in file.infolist() if info.external_attr >> 28 == 0o12]
        scripts = file.read(f"hybridkv-{__version__}.dist-info/entry_points.txt").decode()
    assert {name.split("/")[0] for name in names} == {"hybridkv", f"hybridkv-{__version__}.dist-info"} and not links
    ours = {f"hybridkv/{path.relative_to(checkout / 'hybridkv')}" for path in (checkout / "hybridkv").rglob("*.*")}
    ours |= {f"hybridkv/model/{path.name}" for path in (checkout / "model").glob("*.py")}
    ours = {name for name in ours if (checkout / name).is_file() and "__pycache__" not in name}
    assert ours <= set(names)
    assert {"hybridkv/py.typed", "hybridkv/model/__init__.py", "hybridkv/demos/boards/model.safetensors"} <= ours
    assert "hybridkv-generate = hybridkv.generate:main" in scripts
    assert "hybridkv-calibrate = hybridkv.calibrate:main" in scripts


def test_the_source_distribution_holds_real_files(sdist):
    assert (sdist / "hybridkv" / "model" / "__init__.py").is_file()
    assert not (sdist / "hybridkv" / "model").is_symlink() and not (sdist / "model").exists()


def test_installed_it_runs_beside_modules_of_the_same_names(installed, elsewhere):
    for name in ("hybridkv-generate", "hybridkv-calibrate"):
        assert (installed / "bin" / name).is_file() or (installed / "Scripts" / f"{name}.exe").is_file()
    check_commands(python("-c", COMMANDS, cwd=elsewhere, path=[installed]), installed)


def test_a_bare_checkout_runs(checkout):
    check_commands(python("-c", COMMANDS, cwd=checkout, path=[]), checkout)


def test_a_checkout_that_lost_its_link_says_so(tmp_path):
    """As git on Windows and some archives leave it: a text file that holds the link's target."""
    copy = tmp_path / "hybridkv"
    copy.mkdir()
    for name in ("__init__.py", "version.py"):
        (copy / name).write_text("__version__ = '0'\n" if name == "version.py" else "")
    shutil.copy2(ROOT / "hybridkv" / "cli.py", copy)
    (copy / "model").write_text("../model")
    (tmp_path / "torch.py").touch()  # not needed for this
    with pytest.raises(AssertionError, match="hybridkv/model must be a link to the folder model/"):
        python("-c", "import hybridkv.cli", cwd=tmp_path, path=[])
