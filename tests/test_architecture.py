"""The rules of architecture that no type checker knows, read off the source text.

Each rule is a function from a project folder to a list of violations (`file:line what`). It is asserted to
be empty on this project and not to be on a planted violation, so that no rule passes by seeing nothing.
"""

import ast
import functools
import inspect
import os
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("mgie", "pipelines", "serving")

# The reading order of each package: a folder or file imports only those before it. A new one gets its word here.
# What runs on its own (the jobs of pipelines/) comes last and may import all but another job; recipes call jobs.
ORDER: dict[str, tuple[str, ...]] = {
    "mgie": (
        *("errors", "config", "storage", "images", "model", "inference", "engine", "data", "bundle", "training"),
        *("evaluation", "editor", "tiny", "cli"),
    ),
    "serving": (
        *(
            "errors",
            "deadline",
            "schema",
            "telemetry",
            "storage",
            "stages",
            "access",
            "edits",
            "ray_backend",
            "args",
            "jobs",
            "api",
        ),
        *("app", "local_cluster", "demo"),
    ),
    "pipelines": (
        *("runs", "readers", "stages", "reports", "training"),
        *("prepare", "summarize", "cache", "train", "edit", "evaluate", "export", "tiny", "compare"),
    ),
}
FACES = {"serving.app.app"}  # `serve run serving.app` looks for it in the package
MAX_MODULES = 17  # of a folder, without __init__.py

# Who may import what stands behind a wall: files, or folders that end in /.
WALLS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("ray",): (
        *("serving/app.py", "serving/ray_backend.py", "serving/local_cluster.py"),
        *("pipelines/*.py", "pipelines/runs/*", "pipelines/training/*"),
    ),
    ("fastapi", "starlette"): ("serving/app.py", "serving/api/*"),
    ("boto3", "botocore"): ("mgie/storage/s3.py",),
}

Rule = Callable[[Path], list[str]]


def _sources(root: Path, *packages: str) -> Iterator[tuple[Path, ast.Module]]:
    """Every Python file of the packages, relative to `root`, with its syntax tree."""
    for package in packages:
        for path in sorted((root / package).rglob("*.py")):
            yield path.relative_to(root), _parse(path)


@functools.cache
def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def _imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of all that is imported, inside functions too; `from a import b` gives `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield node.lineno, "." * node.level  # relative: seen, and refused, by the direction rule
            else:
                yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def _dotted(node: ast.expr) -> str:
    """`a.b.c` of an attribute chain; "" for anything else at its root."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = _dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def _calls(tree: ast.AST) -> Iterator[tuple[ast.Call, str]]:
    yield from ((node, _dotted(node.func)) for node in ast.walk(tree) if isinstance(node, ast.Call))


def _top_modules(root: Path, package: str) -> list[str]:
    """The modules directly in a package: files, and folders that hold Python."""
    files = {path.stem for path in (root / package).glob("*.py")}
    folders = {path.parent.name for path in (root / package).glob("*/*.py")}
    return sorted((files | folders) - {"__init__"})


def unlisted_modules(root: Path) -> list[str]:
    return [
        f"{package}/{name}: not in ORDER"
        for package, order in ORDER.items()
        for name in _top_modules(root, package)
        if name not in order
    ]


def wrong_directions(root: Path) -> list[str]:
    """Between packages, and inside each by ORDER (`__init__.py` comes first: it imports nothing at its top)."""
    allowed = {"mgie": {"mgie"}, "pipelines": {"pipelines", "mgie"}, "serving": {"serving", "mgie"}}
    found = []
    for path, tree in _sources(root, *PACKAGES):
        package, here = path.with_suffix("").parts[:2]
        order = ORDER[package]
        for line, name in _imports(tree):
            parts = name.split(".")
            if parts[0] == "":
                found.append(f"{path}:{line} relative import")
            elif parts[0] in PACKAGES and parts[0] not in allowed[package]:
                found.append(f"{path}:{line} {package} imports {parts[0]}")
            elif parts[0] == package and len(parts) > 1 and parts[1] in order and parts[1] != here:
                if here in order and order.index(parts[1]) > order.index(here):
                    found.append(f"{path}:{line} {here} imports {parts[1]}, which is not before it")
                elif here == "__init__" and line in _top_lines(tree) and name not in FACES:
                    found.append(f"{path}:{line} the package's face imports {parts[1]}")
    return found


def _top_lines(tree: ast.Module) -> set[int]:
    return {node.lineno for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)}


def loops(root: Path) -> list[str]:
    """Files that import each other in a circle, by way of any others."""
    modules = {
        ".".join(path.with_suffix("").parts).removesuffix(".__init__"): tree for path, tree in _sources(root, *PACKAGES)
    }
    graph = {
        module: {
            target
            for _, name in _imports(tree)
            for target in (name, name.rpartition(".")[0])
            if target in modules and target != module
        }
        for module, tree in modules.items()
    }
    found, finished = [], set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        if module in trail:
            found.append(" -> ".join((*trail[trail.index(module) :], module)))
        elif module not in finished:
            for target in sorted(graph[module]):
                visit(target, (*trail, module))
            finished.add(module)

    for module in graph:
        visit(module, ())
    return found


def wide_folders(root: Path) -> list[str]:
    counts: Counter[Path] = Counter(
        path.parent for path, _ in _sources(root, *PACKAGES, "tests", "benchmarks") if path.name != "__init__.py"
    )
    return [f"{folder}: {count} modules" for folder, count in counts.items() if count > MAX_MODULES]


def holes_in_walls(root: Path) -> list[str]:
    found = []
    for path, tree in _sources(root, *PACKAGES):
        for line, name in _imports(tree):
            for libraries, doors in WALLS.items():
                if name.split(".")[0] in libraries and not any(_fits(path, door) for door in doors):
                    found.append(f"{path}:{line} imports {name}")
    return found


def _fits(path: Path, door: str) -> bool:
    """Whether the door, a file or `folder/*`, is the path's own: `*` stands for one name."""
    return len(path.parts) == door.count("/") + 1 and path.match(door)


def postponed_annotations(root: Path) -> list[str]:
    """They hide types from Serve's application builder and from the shape checks."""
    return [
        f"{path}:{line}"
        for path, tree in _sources(root, *PACKAGES, "tests", "benchmarks", "examples")
        for line, name in _imports(tree)
        if name == "__future__.annotations"
    ]


def image_opened_elsewhere(root: Path) -> list[str]:
    """Limits, orientation and colour are settled in mgie/images/files.py; another door would go round them."""
    found = []
    for path, tree in _sources(root, *PACKAGES):
        if path == Path("mgie/images/files.py"):
            continue
        found += [f"{path}:{line} imports {name}" for line, name in _imports(tree) if name == "PIL.Image.open"]
        found += [
            f"{path}:{call.lineno} calls {name}" for call, name in _calls(tree) if f".{name}".endswith(".Image.open")
        ]
    return found


def unsafe_unpickling(root: Path) -> list[str]:
    """Pickles are read by `torch.load(..., weights_only=True)` in mgie/bundle/weights.py only; their errors may be named."""
    found = []
    for path, tree in _sources(root, *PACKAGES):
        names = [*_imports(tree), *((n.lineno, _dotted(n)) for n in ast.walk(tree) if isinstance(n, ast.Attribute))]
        found += [
            f"{path}:{line} {name}"
            for line, name in names
            if name.split(".")[0] in {"pickle", "cloudpickle", "dill", "joblib"}
            and name not in {"pickle", "pickle.UnpicklingError"}
        ]
        for call, name in _calls(tree):
            if name != "torch.load":
                continue
            given = {keyword.arg: keyword.value for keyword in call.keywords}
            weights_only = given.get("weights_only")
            if not (isinstance(weights_only, ast.Constant) and weights_only.value is True):
                found.append(f"{path}:{call.lineno} torch.load without weights_only=True")
            if path != Path("mgie/bundle/weights.py"):
                found.append(f"{path}:{call.lineno} torch.load outside mgie/bundle/weights.py")
    return found


def files_without_a_concept(root: Path) -> list[str]:
    return [
        str(path)
        for path, _ in _sources(root, *PACKAGES, "tests")
        if path.stem in {"utils", "util", "common", "helpers", "helper", "misc"}
    ]


def _is_main_guard(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "__name__" in ast.unparse(node.test) and "__main__" in ast.unparse(node.test)


def jobs_that_cannot_run(root: Path) -> list[str]:
    """`ray job submit -- pipelines/x.py` runs the file itself: it needs a shebang and the execute bit."""
    found = []
    for path, tree in _sources(root, "pipelines"):
        if any(_is_main_guard(node) for node in tree.body):
            if not (root / path).read_text(encoding="utf-8").startswith("#!/usr/bin/env python"):
                found.append(f"{path}: no shebang (#!/usr/bin/env python3)")
            if (root / path).stat().st_mode & 0o111 != 0o111:
                found.append(f"{path}: not executable (chmod 755)")
    return found


PLANTED: dict[Rule, dict[str, str]] = {
    unlisted_modules: {"serving/novelty/thing.py": ""},
    wrong_directions: {"mgie/errors.py": "def f():\n    from mgie.config import Part\n"},
    loops: {
        "mgie/model/a.py": "def f():\n    import mgie.model.b\n",
        "mgie/model/b.py": "from mgie.model.a import f\n",
    },
    wide_folders: {f"tests/mgie/test_{number}.py": "" for number in range(MAX_MODULES + 1)},
    holes_in_walls: {"mgie/config.py": "def f():\n    import ray.data\n"},
    postponed_annotations: {"serving/app.py": "from __future__ import annotations\n"},
    image_opened_elsewhere: {"serving/api/routes.py": "import PIL.Image\nPIL.Image.open('x')\n"},
    unsafe_unpickling: {"mgie/bundle/weights.py": "import torch\ntorch.load('x.pt')\n"},
    files_without_a_concept: {"mgie/utils.py": ""},
    jobs_that_cannot_run: {"pipelines/prepare.py": "if __name__ == '__main__':\n    pass\n"},
}


@pytest.mark.parametrize("rule", PLANTED, ids=lambda rule: rule.__name__)
def test_the_project_keeps_the_rule(rule: Rule) -> None:
    assert rule(ROOT) == []


@pytest.mark.parametrize("rule", PLANTED, ids=lambda rule: rule.__name__)
def test_the_rule_sees_a_planted_violation(rule: Rule, tmp_path: Path) -> None:
    for name, text in PLANTED[rule].items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert rule(tmp_path) != []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("mgie/errors.py", "import serving.app"),
        ("mgie/config.py", "from pipelines.runs import lease"),
        ("pipelines/edit.py", "from serving.schema import EditForm"),
        ("serving/app.py", "import pipelines.stages.describe"),
        ("mgie/bundle/untrained.py", "from mgie import cli"),
        ("mgie/bundle/untrained.py", "from mgie.tiny.world import Scene"),
        ("mgie/__init__.py", "from mgie.editor import Editor"),
        ("serving/stages/mllm.py", "from serving.api.responses import status_of"),
        ("pipelines/stages/describe.py", "from pipelines.summarize import summarize"),
        ("serving/app.py", "from . import schema"),
    ],
)
def test_an_import_against_the_direction_is_seen(file: str, line: str, tmp_path: Path) -> None:
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(line + "\n", encoding="utf-8")
    assert len(wrong_directions(tmp_path)) == 1


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("mgie/cli.py", "import ray"),
        ("serving/demo.py", "from ray import serve"),
        ("serving/stages/mllm.py", "import ray"),
        ("serving/api/routes.py", "from ray.serve.handle import DeploymentHandle"),
        ("pipelines/stages/score.py", "import ray.data"),
        ("pipelines/readers/hub.py", "import ray.data"),
        ("serving/edits/service.py", "from fastapi import Request"),
        ("serving/ray_backend.py", "from starlette.requests import Request"),
        ("serving/api/deeper/routes.py", "import fastapi"),
        ("mgie/bundle/resolve.py", "import boto3.exceptions"),
        ("serving/storage/blobs.py", "from botocore.config import Config"),
    ],
)
def test_an_import_through_a_wall_is_seen(file: str, line: str, tmp_path: Path) -> None:
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(f"def f():\n    {line}\n", encoding="utf-8")
    assert len(holes_in_walls(tmp_path)) == 1


def test_imports_through_the_doors_pass(tmp_path: Path) -> None:
    for file, text in {
        "serving/app.py": "import ray\nimport fastapi\n",
        "serving/api/routes.py": "import starlette.requests\n",
        "pipelines/train.py": "import ray.train\n",
        "pipelines/runs/cluster.py": "import ray\n",
        "mgie/storage/s3.py": "import boto3\nimport botocore.config\n",
    }.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text, encoding="utf-8")
    assert holes_in_walls(tmp_path) == []


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("mgie/bundle/weights.py", "import pickle\npickle.load(file)"),
        ("mgie/bundle/weights.py", "from pickle import Unpickler"),
        ("mgie/bundle/weights.py", "import torch\ntorch.load(file, weights_only=False)"),
        ("mgie/bundle/bundle.py", "import torch\ntorch.load(file, weights_only=True)"),
    ],
)
def test_unsafe_unpickling_is_seen(file: str, code: str, tmp_path: Path) -> None:
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(code + "\n", encoding="utf-8")
    assert len(unsafe_unpickling(tmp_path)) == 1


def test_imports_along_the_direction_pass(tmp_path: Path) -> None:
    for file, text in {
        "mgie/config.py": "from mgie.errors import ConfigError\n",
        "mgie/tiny/pretraining/clip.py": "from mgie.tiny.world import Scene\nfrom mgie import errors\n",
        "serving/app.py": "from mgie import config\nfrom serving.schema import EditRequest\n",
        "pipelines/edit.py": "import mgie.editor\nfrom pipelines.runs import lease\n",
    }.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text, encoding="utf-8")
    assert wrong_directions(tmp_path) == []


def _import_in_a_fresh_process(
    modules: list[str], tmp_path: Path, before: str = ""
) -> "subprocess.CompletedProcess[str]":
    """Imports the modules with an empty home, cache and working folder below `tmp_path`."""
    program = textwrap.dedent("""
        import importlib, sys
        {before}
        for name in {modules!r}:
            importlib.import_module(name)
    """).format(before=before, modules=modules)
    for folder in ("home", "cwd", "tmp"):
        (tmp_path / folder).mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MGIE_", "XDG_", "HF_"))}
    environment |= {
        "HOME": str(tmp_path / "home"),
        "TMPDIR": str(tmp_path / "tmp"),
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, "-W", "error:::mgie", "-c", program]
    return subprocess.run(command, cwd=tmp_path / "cwd", env=environment, capture_output=True, text=True, check=False)


def _mgie_modules() -> list[str]:
    paths = [path for path, _ in _sources(ROOT, "mgie") if path.name != "__main__.py"]
    return [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in paths]


@pytest.mark.slow
def test_mgie_imports_without_ray_and_without_effects(tmp_path: Path) -> None:
    """A `None` in sys.modules is how Python itself says "cannot be imported"; libraries that probe see it too."""
    modules = _mgie_modules()
    assert "mgie.errors" in modules
    done = _import_in_a_fresh_process(modules, tmp_path, before="sys.modules['ray'] = None")
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("", "")
    left = [path.relative_to(tmp_path) for path in tmp_path.rglob("*")]
    # torch makes an empty folder among the temporary files; whatever we import, we leave nothing
    assert sorted(str(path) for path in left if "torchinductor" not in path.name) == ["cwd", "home", "tmp"]


def test_a_module_that_needs_ray_fails_the_import_check(tmp_path: Path) -> None:
    done = _import_in_a_fresh_process(["ray"], tmp_path, before="sys.modules['ray'] = None")
    assert "ModuleNotFoundError" in done.stderr


# What passes on words, bytes and records: it starts quickly, and stays small beside the models.
LIGHT = (
    "mgie",
    "mgie.cli",
    "serving.app",  # the ingress and the cancel board import it
    "serving.api.routes",
    "pipelines.prepare",
    "pipelines.summarize",
    "pipelines.cache",
    "pipelines.edit",
    "pipelines.train",
    "pipelines.evaluate",
    "pipelines.export",
    "pipelines.stages.fetch",
    "pipelines.stages.squares",
    "pipelines.stages.score_rows",
)


@pytest.mark.slow
def test_what_passes_on_words_and_bytes_loads_no_torch(tmp_path: Path) -> None:
    """A `None` in sys.modules: whoever tries to load torch fails, and says where."""
    blocked = "sys.modules |= dict.fromkeys(('torch', 'transformers', 'diffusers'))"
    done = _import_in_a_fresh_process(list(LIGHT), tmp_path, before=blocked)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("argument", ["--help", "info", "nonsense"])
def test_the_command_answers_without_torch(argument: str) -> None:
    heavy = ("torch", "transformers", "diffusers", "pyarrow", "boto3")
    program = (
        f"import atexit, sys; atexit.register(lambda: print('loaded', [m for m in {heavy} if m in sys.modules]));"
        "from mgie.cli import main; sys.argv = ['mgie', sys.argv[1]]; main()"
    )
    command = [sys.executable, "-c", program, argument]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == (2 if argument == "nonsense" else 0), done.stderr
    assert done.stdout.endswith("loaded []\n")


@pytest.mark.ray
def test_importing_serving_starts_nothing(tmp_path: Path) -> None:
    at_exit = "import atexit, ray; atexit.register(lambda: print(ray.is_initialized()))"
    done = _import_in_a_fresh_process(["serving", "serving.app"], tmp_path, before=at_exit)
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr


@pytest.mark.ray
def test_serving_app_is_an_application_builder() -> None:
    """`serve run serving.app key=value` gives a validated object only to one parameter typed by a pydantic model."""
    from pydantic import BaseModel

    from serving import app

    assert callable(app)
    (parameter,) = inspect.signature(app).parameters.values()
    assert isinstance(parameter.annotation, type)
    assert issubclass(parameter.annotation, BaseModel)
