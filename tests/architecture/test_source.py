"""What every file of the package keeps to."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache

import pytest

from tests.architecture.source import Module, functions, modules

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80


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


DOORS = {
    "echo": "wrapq.cli.command", "secho": "wrapq.cli.command", "print_exc": "", "from_markup": "",
    "Console": "", "Terminal": "wrapq.cli.command", "Environment": "wrapq.html.parts",
    "Formatter": "", "basicConfig": "", "writer": "", "DictWriter": "wrapq.sweep.table",
}  # fmt: skip
"""Calls by which text leaves for a reader, and the one file for each that makes text from outside harmless there."""


def test_text_leaves_by_few_doors(module: Module) -> None:
    calls = [node for node in ast.walk(module.tree) if isinstance(node, ast.Call)]
    named = [(ast.unparse(call.func).split(".")[-1], call) for call in calls]
    found = [f"{module.at(call)}: {name}" for name, call in named if DOORS.get(name, module.name) != module.name]
    writes = [call for call in calls if ast.unparse(call.func) in ("sys.stdout.write", "sys.stderr.write")]
    found += [f"{module.at(call)}: write" for call in writes]
    columns = [call for name, call in named if name == "TextColumn"]
    found += [f"{module.at(call)}: markup" for call in columns if "markup=False" not in ast.unparse(call)]
    assert not found, "see wrapq/foreign.py:\n" + "\n".join(found)


def test_sizes(module: Module) -> None:
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
    """Whether `node` overrides what a base of `cls` documents, or is what a protocol of the package asks for."""
    inherited = {m for base in _ancestors(cls.name) for m in _classes()[base][1]} | {"forward", "extra_repr"}
    return node.name in (inherited if cls.bases else set()) or node.name in _promised() - _classes()[cls.name][1]


@cache
def _ancestors(name: str) -> frozenset[str]:
    bases = [base for base in _classes().get(name, ((), ()))[0] if base in _classes() and base != name]
    return frozenset(bases).union(*map(_ancestors, bases))


@cache
def _promised() -> frozenset[str]:
    return frozenset(m for bases, methods in _classes().values() if "Protocol" in bases for m in methods)


@cache
def _classes() -> dict[str, tuple[set[str], set[str]]]:
    """Of each class by name: its bases, and its methods that have a text."""
    found: dict[str, tuple[set[str], set[str]]] = {}
    for cls in (node for module in modules() for node in ast.walk(module.tree) if isinstance(node, ast.ClassDef)):
        bases = {ast.unparse(base).split("[")[0].split(".")[-1] for base in cls.bases}
        methods = {n.name for n in cls.body if isinstance(n, ast.FunctionDef) and ast.get_docstring(n) is not None}
        known = found.setdefault(cls.name, (set(), set()))
        known[0].update(bases)
        known[1].update(methods)
    return found


def _is_setter(node: ast.FunctionDef | ast.ClassDef) -> bool:
    return any(ast.unparse(decorator).endswith(".setter") for decorator in node.decorator_list)
