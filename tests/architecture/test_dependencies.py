"""What the package imports is what it declares."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

from tests.architecture.source import Module, modules

ASKED_FOR = {"torchao"}
"""Kernels that run where somebody has installed them."""
NOT_INSTALLED = {"llama_cpp": "llama-cpp-python"}
"""What is not installed with the tests and is imported by another name than its package has."""
PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def declared() -> set[str]:
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    texts = [*project["dependencies"], *(text for extra in project["optional-dependencies"].values() for text in extra)]
    return {normal(re.split(r"[\[<>=!~; ]", text)[0]) for text in texts}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def packages(module: Module) -> Iterator[tuple[ast.stmt, str]]:
    """The top-level packages that a module imports, but the standard library's and its own."""
    for node in ast.walk(module.tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        for name in {name.split(".")[0] for name in names} - sys.stdlib_module_names - ASKED_FOR - {"wrapq"}:
            yield node, name


def test_every_package_that_is_imported_is_declared() -> None:
    known, owners = declared(), packages_distributions()
    undeclared = [
        f"{module.at(node)}: {name}"
        for module in modules()
        for node, name in packages(module)
        if not known & {normal(owner) for owner in owners.get(name, [NOT_INSTALLED.get(name, name)])}
    ]
    assert not undeclared, "imported, and not in pyproject.toml:\n" + "\n".join(undeclared)


def test_a_lock_is_that_of_filelock() -> None:
    handmade = [
        module.at(node)
        for module in modules()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Import) and any(alias.name in ("fcntl", "msvcrt") for alias in node.names)
    ]
    assert not handmade, handmade
