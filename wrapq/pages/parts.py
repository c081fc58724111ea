"""What pages are built of: tables, the templates, and how figures are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

import wrapq

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

    cells: tuple[str, ...]
    share: float = 0.0
    kind: str = ""
    shades: tuple[float, ...] = ()


@dataclass(frozen=True)
class Table:
    """A table; the first cell of each row is its heading."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    style: str = ""


def table(caption: str, columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> Table:
    """A table of plain rows."""
    return Table(caption, tuple(columns), tuple(Row(tuple(row)) for row in rows))


def render(template: str, values: Mapping[str, Any]) -> str:
    """A page; everything in `values` is escaped."""
    style = resources.files("wrapq.pages").joinpath("style.css").read_text(encoding="utf-8")
    page = _environment().get_template(template)
    return page.render(**values, style=_safe(style), version=wrapq.__version__)


def percent(value: float, sign: bool = False) -> str:
    """A share as per cent."""
    return f"{100 * value:{'+' if sign else ''}.2f} %"


def megabytes(size: float) -> str:
    """Bytes as `12.3 MB`."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """Seconds as `4.1 s`, `3 min 20 s` or `2 h 5 min`."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def short(value: float) -> str:
    """A figure in few letters."""
    return f"{value:.3g}" if abs(value) < 1e4 else f"{value:.1e}"


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("wrapq.pages", "")
    return Environment(loader=loader, autoescape=True, trim_blocks=True, undefined=StrictUndefined)


def _safe(style: str) -> Any:
    from markupsafe import Markup

    return Markup(style)  # our own file, which must not be escaped
