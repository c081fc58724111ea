"""The tests that the README's command runs reach every part and every module of the package; slow ones come on top."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.architecture.source import PACKAGE, Module, modules
from tests.architecture.test_layers import EMPTY

TESTS = Path(__file__).resolve().parents[1]
ELSEWHERE = {"__main__": "architecture", "version": "runs"}
"""Parts whose tests have another name."""


@cache
def plain() -> dict[str, ast.Module]:
    """The files of tests, by their path below `tests`, that hold at least one test that is neither slow nor a bench."""
    files = {path.relative_to(TESTS).as_posix(): path for path in TESTS.rglob("test_*.py")}
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in files.items()}
    return {name: tree for name, tree in trees.items() if has_plain_tests(tree)}


def has_plain_tests(tree: ast.Module) -> bool:
    """Whether a file has a test without a mark that leaves it out; marks of single parameters do not count."""
    marks = [
        node for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"
    ]
    if any(left_out(mark.value) for mark in marks):
        return False
    tests = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name.startswith("test_"))
    inherited = any(isinstance(n, ast.ClassDef) and n.name.startswith("Test") for n in tree.body)
    return inherited or any(not any(map(left_out, test.decorator_list)) for test in tests)


def left_out(mark: ast.expr) -> bool:
    marks = mark.elts if isinstance(mark, ast.List) else [mark]
    return any(
        ast.unparse(one).startswith(("pytest.mark.slow", "pytest.mark.bench", "pytest.mark.real")) for one in marks
    )


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module of the package that a file imports or names in a text, as registries do."""
    known = {module.name for module in modules()}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("wrapq."):
            text = node.value.partition(":")[0]  # `wrapq.examples.` before a name stands for all that are there
            yield from (name for name in known if name == text or (text.endswith(".") and name.startswith(text)))


def test_every_part_of_the_package_has_tests_that_are_not_slow() -> None:
    parts = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    lacking = []
    for part in sorted(parts - EMPTY - {"__init__", "__pycache__"}):
        name = ELSEWHERE.get(part, part)
        if not any(file == f"test_{name}.py" or file.startswith(f"{name}/") for file in plain()):
            lacking.append(part)
    assert not lacking, f"only slow tests, or none, in tests/: {lacking}"


def test_every_module_of_the_package_is_reached_by_tests_that_are_not_slow() -> None:
    """Through the imports of the tests, and of what they import; the modules of a registry's folder are its own."""
    by_name = {module.name: module for module in modules()}
    reached, left = set(), {name for tree in plain().values() for name in imported(tree)}
    while left:
        name = left.pop()
        if name in reached or name not in by_name:
            continue
        reached.add(name)
        left |= {*imported(by_name[name].tree), *registered(by_name[name]), name.rpartition(".")[0]}
    missed = by_name.keys() - reached - {"wrapq.__main__", *(f"wrapq.{part}" for part in EMPTY)}
    assert not missed, sorted(missed)


def registered(module: Module) -> set[str]:
    """The modules beside a `base` with a registry, which imports them by their place."""
    folder = module.name.removesuffix(".base")
    if folder == module.name or "Registry" not in ast.unparse(module.tree):
        return set()
    return {m.name for m in modules() if m.name.startswith(f"{folder}.")}


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("def test_a(): pass", True),
        ("@pytest.mark.slow\ndef test_a(): pass", False),
        ("@pytest.mark.slow\ndef test_a(): pass\ndef test_b(): pass", True),
        ("pytestmark = [pytest.mark.slow, pytest.mark.timeout(9)]\ndef test_a(): pass", False),
        ("pytestmark = pytest.mark.slow\ndef test_a(): pass", False),
        ("class TestIt(Contract): pass", True),
    ],
)
def test_slow_files_are_told_from_others(text: str, plain: bool) -> None:
    assert has_plain_tests(ast.parse(text)) == plain
