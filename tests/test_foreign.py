"""Text from outside, as it stands on a terminal, in a log, in Markdown and in a spreadsheet."""

from __future__ import annotations

import csv
import io
import logging
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from wrapq.foreign import LogFormatter, markdown, markdown_code, plain, spreadsheet_cell

TEXTS = st.text(st.characters(exclude_categories=()))  # halves of surrogates too
TABLES = MarkdownIt("gfm-like", {"linkify": False, "html": True})
DIRECTIONS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def bare(text: str) -> str:
    return "".join(text.split())


def read(written: str) -> list[tuple[str, str]]:
    """The parts of a line of Markdown, without spaces, the word `x` on both sides."""
    (line,) = TABLES.parseInline(f"x{written}x")
    return [(part.type, bare(part.content)) for part in line.children or ()]


@given(TEXTS)
def test_nothing_is_left_that_acts(text: str) -> None:
    shown = plain(text)
    for character in shown:
        assert character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cs", "Zl", "Zp")
        assert unicodedata.bidirectional(character) not in DIRECTIONS and character not in "\u200e\u200f\u061c"
    assert len(shown) == len(text) and plain(shown) == shown
    shown.encode()


@pytest.mark.parametrize(
    "text", ["", "a\tb\nc", "Größe naïve", "量化模型", "👩‍🔬 🏳️‍🌈 é", "مرحبا שלום", "[/] [red] :bug:"]
)
def test_letters_of_every_language_stay(text: str) -> None:
    assert plain(text) == text


def test_what_acts_is_seen() -> None:
    assert plain("\x00\x1b[31m\r\x7f\x9b\u202e\udcff") == "␀␛[31m␍␡���"


@given(st.one_of(TEXTS, st.text("\\`*_[](){}<>!|&;~#ax \n")))
def test_markdown_reads_as_the_text(text: str) -> None:
    assert read(markdown(text)) == [("text", bare(f"x{plain(text)}x"))]


@given(st.one_of(TEXTS, st.text("`\\<x \n")).filter(bool))
def test_markdown_code_reads_as_the_text(text: str) -> None:
    assert read(markdown_code(text)) == [("text", "x"), ("code_inline", bare(plain(text))), ("text", "x")]


@pytest.mark.parametrize("text", ["w4a16_gptq", "8-bit weights, half the size; at 2.5 bits (about). C:/x y!", "量化"])
def test_markdown_leaves_ordinary_text(text: str) -> None:
    assert (markdown(text), markdown_code(text)) == (text, f"`{text}`")


@pytest.mark.parametrize("text", ["=1+1", "+x", "-x", "@SUM(1)", "\t=1", "\n=1", "--1", "-1e", "=\x1b", "-1\n"])
def test_a_formula_is_text_in_a_spreadsheet(text: str) -> None:
    assert spreadsheet_cell(text) == f"'{plain(text)}"


@pytest.mark.parametrize("value", ["-1.5", "+2", "-1e-05", "a=1", "x", "", -1.5, 3, None, True])
def test_numbers_and_names_stay_what_they_are(value: object) -> None:
    assert spreadsheet_cell(value) is value or spreadsheet_cell(value) == value


@given(TEXTS)
def test_no_cell_begins_a_formula(text: str) -> None:
    file = io.StringIO(newline="")
    csv.writer(file).writerow([spreadsheet_cell(text), "end"])
    ((cell, _),) = csv.reader(io.StringIO(file.getvalue(), newline=""))
    assert not cell.startswith(("=", "+", "-", "@", "\t", "\r")) or float(cell) is not None


@given(TEXTS)
def test_a_record_of_a_log_begins_its_line(text: str) -> None:
    record = logging.LogRecord("wrapq", logging.INFO, "", 0, "it says %s", (text,), None)
    first, *others = LogFormatter("%(name)s: %(message)s").format(record).split("\n")
    assert first.startswith("wrapq: it says ")
    assert all(line[:1].isspace() or not line for line in others)
