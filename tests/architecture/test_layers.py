"""Imports point down: a module imports lower layers, its own folder and layer 0, nothing else of the package."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter

import pytest

from tests.architecture.source import Module, modules

LAYERS = (
    (
        "errors",
        "foreign",
        "half_products",
        "large_pages",
        "metrics",
        "ownership",
        "paths",
        "redact",
        "registry",
        "version",
    ),
    ("quant",),
    ("runtime", "observers", "recipe", "data"),
    ("wrappers",),
    ("statistics", "pt2e"),
    ("graph",),
    ("algorithms",),
    ("calibration",),
    ("resolve",),
    ("evaluation", "export", "tracking", "runs"),
    ("html",),
    ("engine",),
    ("api", "sweep"),
    ("console",),
    ("wrapq",),  # the package's own names, which re-export those of the engine
    ("cli",),
    ("__main__",),
)
LAYER = {part: number for number, parts in enumerate(LAYERS) for part in parts}
CONTRACTS = {"wrapq.export.base": "resolve"}
"""Contracts that the plan asks, while what implements them stands above it."""
EMPTY = {"assets"}


def part_of(name: str) -> str:
    """The part of the package a module belongs to: `wrapq.quant.spec` to `quant`, `wrapq` to `wrapq`."""
    if name in CONTRACTS:
        return CONTRACTS[name]
    return name.split(".")[1] if "." in name else name


def imports(module: Module) -> Iterator[tuple[ast.stmt, str]]:
    """Every import of something in wrapq, those inside functions included, with the full name of the module."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names if alias.name.split(".")[0] == "wrapq")
        elif isinstance(node, ast.ImportFrom) and node.level:
            raise AssertionError(f"{module.at(node)}: relative import; imports name the whole path")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "wrapq":
            names = [f"wrapq.{alias.name}" if node.module == "wrapq" else node.module for alias in node.names]
            known = {part_of(n) for n in names} <= set(LAYER)
            yield from ((node, name) for name in (names if known else [node.module]))


def broken(module: Module) -> Iterator[str]:
    own = part_of(module.name)
    for node, target in imports(module):
        other = part_of(target)
        if other != own and LAYER[other] and LAYER[other] >= LAYER[own]:
            yield f"{module.at(node)}: {own} (layer {LAYER[own]}) imports {target} (layer {LAYER[other]})"


def test_every_part_of_the_package_has_a_layer() -> None:
    parts = {part_of(module.name) for module in modules()}
    assert parts - EMPTY == set(LAYER), "add the new part to LAYERS, at the place the design gives it"


def test_imports_point_down() -> None:
    found = [line for module in modules() if module.name != "wrapq" for line in broken(module)]
    assert not found, "imports that do not point down the layers:\n" + "\n".join(found)


def test_no_import_cycles() -> None:
    """No file needs, by way of what it imports anywhere but for types, a file that needs it."""
    known = {module.name for module in modules()}
    try:
        TopologicalSorter({module.name: set(needed(module, known)) for module in modules()}).prepare()
    except CycleError as error:
        pytest.fail("import cycle: " + " <- ".join(error.args[1]))


def needed(module: Module, known: set[str]) -> Iterator[str]:
    """The files that are loaded by the imports of `module`, those under `if TYPE_CHECKING` left out."""
    types = [n for n in ast.walk(module.tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    skipped = {node for block in types for statement in block.body for node in ast.walk(statement)}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom) and node not in skipped:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in known else node.module or "" for name in names)
        elif isinstance(node, ast.Import) and node not in skipped:
            yield from (alias.name for alias in node.names if alias.name in known)


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("wrapq.quant.spec", "from wrapq.api import prepare", "wrapq/m.py:1: quant (layer 1)"),
        ("wrapq.evaluation.quality", "def f():\n    import wrapq.tracking.base", "wrapq/m.py:2: evaluation (layer 9)"),
        ("wrapq.resolve.plan", "from wrapq import cli", "imports wrapq.cli (layer 15)"),
        ("wrapq.engine.run", "from wrapq import load", "imports wrapq (layer 14)"),
        ("wrapq.engine.run", "import wrapq\n\nwrapq.load('x')", "imports wrapq (layer 14)"),
    ],
)
def test_a_wrong_import_is_named(name: str, text: str, named: str) -> None:
    (line,) = broken(Module(name, "wrapq/m.py", ast.parse(text), 1))
    assert named in line
