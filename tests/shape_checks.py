"""The run-time checks that tests/conftest.py puts around every annotated function and record of mgie.

Shapes are jaxtyping's to check, which costs some at each import and call, for it remembers the sizes of named axes.
Where no shape is written there is nothing to remember, and beartype checks the types alone. The import hook is our
own, too: jaxtyping's keeps Python from finding the compiled files of libraries that a checked module imports first.
"""

import ast
import dataclasses
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

# The numeric tower of PEP 484, as mypy has it: an int is fine where a float is asked for.
_types = beartype(conf=BeartypeConf(is_pep484_tower=True, violation_type=jaxtyping.TypeCheckError))
_shapes = jaxtyping.jaxtyped(typechecker=beartype(conf=BeartypeConf(is_pep484_tower=True)))


def _has_shape(function: Any) -> bool:
    """Whether an annotation names a shape, or is a string, which might."""
    annotations = getattr(function, "__annotations__", {}).values()
    return any(isinstance(one, str) or "jaxtyping." in repr(one) for one in annotations)


def check(thing: Any) -> Any:
    """The function, or the class if it is a record, with its arguments and results checked."""
    if not isinstance(thing, type):
        return (_shapes if _has_shape(thing) else _types)(thing)
    if dataclasses.is_dataclass(thing) and "__init__" in vars(thing):
        if _has_shape(thing.__init__):
            return _shapes(thing)
        thing.__init__ = _types(thing.__init__)  # type: ignore[method-assign]
    return thing


class _Decorate(ast.NodeTransformer):
    """Puts `check` around each function, below its other decorators, and each class, above them."""

    def visit_Module(self, node: ast.Module) -> ast.AST:
        num_first = 1 if ast.get_docstring(node, clean=False) is not None else 0
        node.body.insert(num_first, ast.Import(names=[ast.alias(name=__name__, asname="_shape_checks")]))
        return ast.fix_missing_locations(self.generic_visit(node))

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.decorator_list.append(self._decorator(node))
        return self.generic_visit(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        node.decorator_list.append(self._decorator(node))
        return self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        node.decorator_list.insert(0, self._decorator(node))
        return self.generic_visit(node)

    @staticmethod
    def _decorator(node: ast.AST) -> ast.expr:
        made = ast.Attribute(ast.Name("_shape_checks", ast.Load()), "check", ast.Load())
        ast.copy_location(made.value, node)
        return ast.copy_location(made, node)


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:  # compiled anew each time: no file of it may be left
        path = self.get_filename(fullname)
        tree = _Decorate().visit(ast.parse(self.get_data(path), path))
        return compile(tree, path, "exec", dont_inherit=True)


class _Finder(MetaPathFinder):
    def __init__(self, package: str) -> None:
        self._package = package

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._package and not fullname.startswith(f"{self._package}."):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def install(package: str) -> None:
    """For the whole process; raises RuntimeError if the package was imported before: it would go unchecked."""
    if any(name.split(".")[0] == package for name in sys.modules):
        raise RuntimeError(f"{package} was imported before its checks were installed")
    sys.meta_path.insert(0, _Finder(package))
