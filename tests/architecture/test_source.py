"""What every file of the package keeps to."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache

import pytest

from tests.architecture.source import Module, functions, modules

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80
SCRIPTS = {"wrapq.examples.train_demo_model"}
"""Made the shipped model, and is kept as the record of how."""


@pytest.fixture(params=modules(), ids=lambda module: module.name)
def module(request: pytest.FixtureRequest) -> Module:
    return request.param


def test_names_say_what_is_inside(module: Module) -> None:
    assert module.name.rpartition(".")[2] not in {"utils", "util", "helpers", "helper", "common", "misc"}


def test_no_star_import_no_print_no_assert(module: Module) -> None:
    found = []
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
            found.append(f"{module.at(node)}: import *")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            found.append(f"{module.at(node)}: print")
        if isinstance(node, ast.Assert):
            found.append(f"{module.at(node)}: assert, which vanishes under python -O; raise an error instead")
    assert not found, "\n".join(found)


def test_sizes(module: Module) -> None:
    if module.name in SCRIPTS:
        pytest.skip("a script kept as a record")
    lengths = {f: (f.end_lineno or f.lineno) - f.lineno + 1 for f in functions(module)}
    long = [f"{module.at(f)}: {f.name} has {n} lines" for f, n in lengths.items() if n > MAX_FUNCTION_LINES]
    assert module.lines <= MAX_FILE_LINES, f"{module.path} has {module.lines} lines"
    assert not long, "\n".join(long)


def test_public_names_are_documented(module: Module) -> None:
    found = [f"{module.path}: the module itself"] if ast.get_docstring(module.tree) is None else []
    found += [f"{module.at(node)}: {node.name}" for node in _public(module.tree) if ast.get_docstring(node) is None]
    assert not found, "without a docstring:\n" + "\n".join(found)


def _public(tree: ast.Module | ast.ClassDef) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """Public classes and functions, and the methods of public classes; one that overrides inherits its text."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            if not (isinstance(tree, ast.ClassDef) and (_overrides(tree, node) or _is_setter(node))):
                yield node
            if isinstance(node, ast.ClassDef):
                yield from _public(node)


def _overrides(cls: ast.ClassDef, node: ast.FunctionDef | ast.ClassDef) -> bool:
    bases = {ast.unparse(base).split("[")[0].split(".")[-1] for base in cls.bases}
    inherited = {"forward", "extra_repr"} | {m for base in bases for m in _methods().get(base, ())}
    return node.name in inherited and bool(bases)


@cache
def _methods() -> dict[str, set[str]]:
    classes = (node for module in modules() for node in ast.walk(module.tree) if isinstance(node, ast.ClassDef))
    return {cls.name: {node.name for node in cls.body if isinstance(node, ast.FunctionDef)} for cls in classes}


def _is_setter(node: ast.FunctionDef | ast.ClassDef) -> bool:
    return any(ast.unparse(decorator).endswith(".setter") for decorator in node.decorator_list)
