"""What a newcomer installs: the project's metadata, the lock, the wheel and the Makefile's first words."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from importlib import metadata
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FORBIDDEN = {"torchvision", "lpips"}  # a second image stack; parts of their work are done in mgie itself


def _lock() -> dict[str, Requirement]:
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def _direct() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    lines = (*PROJECT["dependencies"], *chain(*extras))
    return [Requirement(line) for line in lines if not line.startswith("mgie[")]  # `all` names the others


def _closure(todo: list[Requirement]) -> set[str]:
    """Names of everything that requirements need on this machine; read off installed metadata."""
    needed: set[str] = set()
    seen: set[tuple[str, frozenset[str]]] = set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if (name, frozenset(requirement.extras)) in seen:
            continue
        seen.add((name, frozenset(requirement.extras)))
        needed.add(name)
        for inner in map(Requirement, metadata.requires(name) or []):
            extras = requirement.extras or {""}
            if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in extras):
                todo.append(inner)
    return needed


def _all_needed() -> set[str]:
    """What the project needs with all extras."""
    return _closure(_direct())


def test_the_lock_pins_everything_that_the_project_needs() -> None:
    needed = _all_needed()
    assert "torch" in needed
    assert "starlette" in needed  # of an extra of a dependency
    assert needed - set(_lock()) == set()


def test_the_lock_agrees_with_this_environment() -> None:
    """A difference means that tests run on versions nobody else gets: `make setup`, or `make lock`."""
    for name, requirement in _lock().items():
        if requirement.marker is None or requirement.marker.evaluate():
            public = metadata.version(name).partition("+")[0]
            assert str(requirement.specifier) == f"=={public}", name


def test_the_lock_satisfies_the_ranges_of_the_project() -> None:
    lock = _lock()
    for requirement in _direct():
        (pin,) = lock[canonicalize_name(requirement.name)].specifier
        assert requirement.specifier.contains(pin.version), requirement


def test_the_lock_holds_names_and_versions_only() -> None:
    pin = re.compile(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*(; [a-z_]+ == \"\w+\")?")
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not line.startswith("#") and not pin.fullmatch(line)] == []
    assert "mgie" not in _lock()


def test_nothing_pulls_in_a_second_image_stack() -> None:
    assert FORBIDDEN & (_all_needed() | set(_lock())) == set()


def _imported_names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []


def test_every_library_that_the_packages_import_is_declared() -> None:
    """Otherwise it is there by luck, through a dependency of a dependency."""
    declared = {canonicalize_name(r.name) for r in _direct() if str(r) not in PROJECT["optional-dependencies"]["dev"]}
    declared |= {"mgie"}
    owners = metadata.packages_distributions() | {package: ["mgie"] for package in ("mgie", "pipelines", "serving")}
    imported = {
        (str(path.relative_to(ROOT)), name.split(".")[0])
        for package in ("mgie", "pipelines", "serving")
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in _imported_names(node)
    }
    undeclared = [
        f"{path} imports {top}"
        for path, top in sorted(imported)
        if top not in sys.stdlib_module_names
        and not {canonicalize_name(owner) for owner in owners.get(top, [top])} & declared
    ]
    assert ("mgie/config.py", "mgie") in imported
    assert undeclared == []


def test_ranges_of_the_project_are_open() -> None:
    closed = [str(requirement) for requirement in _direct() for s in requirement.specifier if s.operator != ">="]
    assert closed == []


def test_the_version_is_the_same_everywhere() -> None:
    from mgie import __version__

    assert PROJECT["version"] == __version__ == metadata.version("mgie")


@pytest.mark.slow
def test_the_wheel_holds_the_packages_and_their_data(tmp_path: Path) -> None:
    source = tmp_path / "source"  # setuptools would leave build/ in the project, and pick up a stale one
    for name in ("mgie", "pipelines", "serving"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE", "NOTICE", *([PROJECT["readme"]] if "readme" in PROJECT else [])):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry_points = archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    data = [path for pattern in ("*/py.typed", "serving/page/*", "mgie/**/*.txt") for path in ROOT.glob(pattern)]
    code = [path for package in ("mgie", "pipelines", "serving") for path in (ROOT / package).rglob("*.py")]
    assert {str(path.relative_to(ROOT)) for path in [*data, *code]} <= names
    assert "mgie = mgie.cli:main" in entry_points
    assert any(name.endswith("licenses/NOTICE") for name in names)
    assert not [name for name in names if name.startswith("tests")]


WITHOUT_EXTRAS = """
import sys
from mgie import Editor
from PIL import Image
result = Editor.load("random", device="cpu").edit(Image.new("RGB", (64, 48), "teal"), "make it night", seed=1, steps=1)
assert result.image.size == (64, 48)
for absent in ("ray", "fastapi", "starlette", "tensorboard"):
    assert absent not in sys.modules, absent
    try:
        __import__(absent)
    except ModuleNotFoundError:
        continue
    raise AssertionError(f"{absent} can be imported")
print("edited")
"""


@pytest.mark.slow
def test_an_environment_without_extras_has_no_ray_and_edits(tmp_path: Path) -> None:
    """What `pip install .` brings: a real virtual environment, in which only what the project asks for is linked."""
    venv.create(tmp_path / "venv", symlinks=True)
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    for name in _closure([Requirement(line) for line in PROJECT["dependencies"]]):
        distribution = metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(distribution.locate_file(top))
    (site / "mgie").symlink_to(ROOT / "mgie")
    command = [str(tmp_path / "venv" / "bin" / "python"), "-I", "-c", WITHOUT_EXTRAS]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "edited"), done.stderr


def _make_setup(tmp_path: Path, python: str) -> "subprocess.CompletedProcess[str]":
    """`make setup` in an empty copy of the project, with a stand-in for the interpreter."""
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "python").write_text(f"#!/bin/sh\n{python}\n", encoding="utf-8")
    (tmp_path / "python").chmod(0o755)
    return subprocess.run(
        ["make", "setup", "PYTHON=./python"], cwd=tmp_path, capture_output=True, text=True, check=False
    )


def test_setup_names_the_version_that_is_too_old(tmp_path: Path) -> None:
    done = _make_setup(tmp_path, 'case "$1" in --version) echo Python 3.9.2;; *) exit 1;; esac')
    assert done.returncode != 0
    assert "Python 3.11 or newer is needed; ./python is Python 3.9.2" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_setup_says_what_is_missing_without_ensurepip(tmp_path: Path) -> None:
    done = _make_setup(tmp_path, 'case "$2" in *ensurepip*) exit 1;; esac')
    assert done.returncode != 0
    assert "python3-venv" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_what_ci_runs_is_executable() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
