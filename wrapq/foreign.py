"""Text from outside is shown and does nothing else: names, paths, descriptions, what libraries and servers say.

Everything that is read by people passes here, where it leaves: the terminal (`cli/command.py` and
`console/terminal.py`), pages, a run's log, tables for spreadsheets and notes in Markdown. What programs read is data:
JSON and YAML keep it as it is.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_HIDING = "\u061c\u200e\u200f\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
_UNSHOWN = (*range(0x80, 0xA0), *range(0xD800, 0xE000), *map(ord, _HIDING))
_VISIBLE = {
    **{code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"},
    0x7F: 0x2421,
    **dict.fromkeys(_UNSHOWN, 0xFFFD),
}
_FORMULA = re.compile(r"\A(?=[=+\-@\t\n])(?![+-]?[0-9.]+(?:[eE][+-]?[0-9]+)?\Z)")
_MARKDOWN = re.compile(r"[\\`*\[\]<>|&~]|(?<!\w)_|_(?!\w)")


def plain(text: str) -> str:
    """`text` with a visible character in place of each that acts on what shows it: a terminal's controls (`␛`), and `�`
    for C1 controls, marks that turn the direction of writing, line separators and halves of surrogates. Lines and tabs
    stay."""
    return text.translate(_VISIBLE)


def markdown(text: str) -> str:
    """`text` in a line of Markdown, where it reads as it is."""
    return _MARKDOWN.sub(r"\\\g<0>", _line(text))


def markdown_code(text: str) -> str:
    """`text` as code in a line of Markdown."""
    text = _line(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}"


def spreadsheet_cell(value: Any) -> Any:
    """`value`; text that a spreadsheet would take for a formula has a `'` before it, which makes it text there."""
    if not isinstance(value, str):
        return value
    return _FORMULA.sub("'", plain(value), count=1)


class PlainRecord(logging.LogRecord):
    """A record that is `plain` whoever writes it down."""

    def getMessage(self) -> str:  # noqa: N802
        """The message with its arguments."""
        return plain(super().getMessage())


class LogFormatter(logging.Formatter):
    """Records of which each begins a line, and no line within one looks like another's beginning."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as text, the lines after its first indented."""
        return re.sub(r"\n(?=\S)", "\n    ", plain(super().format(record)))


@contextmanager
def quiet(*loud: str) -> Iterator[None]:
    """Without the warnings of a library, of its loggers `loud` among others; none that it imports sets up how this
    process logs, which `logging.basicConfig` does where there is no handler."""
    root, handler = logging.getLogger(), logging.NullHandler()
    loggers = {logging.getLogger(name): logging.getLogger(name).level for name in loud}
    root.addHandler(handler)
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.removeHandler(handler)
        for logger, level in loggers.items():
            logger.setLevel(level)


def _line(text: str) -> str:
    return " ".join(plain(text).split("\n"))
