"""The source of the package, parsed once for all the tests of this folder."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import wrapq

PACKAGE = Path(wrapq.__file__).resolve().parent


@dataclass(frozen=True)
class Module:
    """One file of the package: its dotted name, its path for messages, and its syntax tree."""

    name: str
    path: str
    tree: ast.Module
    lines: int

    def at(self, node: ast.AST) -> str:
        """File and line of `node`, as an editor opens it."""
        return f"{self.path}:{getattr(node, 'lineno', 1)}"


@cache
def modules() -> tuple[Module, ...]:
    return tuple(_parse(path) for path in sorted(PACKAGE.rglob("*.py")))


def functions(module: Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (n for n in ast.walk(module.tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))


def _parse(path: Path) -> Module:
    relative = path.relative_to(PACKAGE.parent)
    name = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
    text = path.read_text(encoding="utf-8")
    return Module(name, relative.as_posix(), ast.parse(text), text.count("\n"))
