"""What pages are built of: tables, the templates, and how figures are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from wrapq.foreign import plain
from wrapq.version import __version__

if TYPE_CHECKING:
    from jinja2 import Environment


@dataclass(frozen=True)
class Column:
    """A column: its heading, whether it holds numbers, whether its cells are code."""

    name: str
    number: bool = False
    code: bool = False


@dataclass(frozen=True)
class Row:
    """A row: its cells as they are read, how long its bar is (0 to 1), a class of the style, a shade per cell."""

    cells: Sequence[str]
    share: float = 0.0
    kind: str = ""
    shades: Sequence[float] = ()


@dataclass(frozen=True)
class Table:
    """A table; the first cell of each row is its heading."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    style: str = ""


def render(template: str, values: Mapping[str, Any]) -> str:
    """A page; everything in `values` is escaped, and `plain`."""
    return _environment().get_template(template).render(**values, version=__version__)


def short(value: float) -> str:
    """A figure in few letters."""
    return f"{value:.3g}" if abs(value) < 1e4 else f"{value:.1e}"


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("wrapq.html", "")
    shown = lambda value: plain(value) if isinstance(value, str) else value  # noqa: E731
    return Environment(loader=loader, autoescape=True, trim_blocks=True, undefined=StrictUndefined, finalize=shown)
