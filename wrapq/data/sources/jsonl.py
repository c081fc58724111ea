"""JSON lines: one object a line, one of its fields is the text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from pydantic import Field

from wrapq.data.sources.base import SOURCES, TextSource
from wrapq.data.sources.files import check_text, find_files, read_lines
from wrapq.errors import CalibrationError, nearest
from wrapq.registry import Options


class JsonlOptions(Options):
    """Options of the source `jsonl`."""

    path: str = Field(description="file or folder")
    field: str = Field(default="text", description="the key that holds the text")


@SOURCES.register("jsonl")
class JsonLines(TextSource):
    """A `.jsonl` file or a folder of them; every line is one document. Blank lines are skipped."""

    Options = JsonlOptions
    options: JsonlOptions

    def check(self) -> None:
        """Refuse a missing, unreadable or blank file, and one whose first line does not hold the field."""
        check_text(self._files())
        next(self.documents(), None)

    def describe(self) -> str:
        return f"jsonl:{self.options.path}#{self.options.field}"

    def documents(self) -> Iterator[str]:
        for file in self._files():
            for number, line in read_lines(file):
                if line.strip():
                    yield self._text(f"data file '{file}', line {number}", line)

    def _text(self, where: str, line: str) -> str:
        field = self.options.field
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CalibrationError(f"{where}: not valid JSON ({error})") from None
        if not isinstance(record, dict):
            raise CalibrationError(f"{where}: expected an object, found {type(record).__name__}")
        if field not in record:
            names = ", ".join(nearest(field, record)) or "none"
            raise CalibrationError(f"{where}: no field {field!r}; its fields are like: {names}")
        if not isinstance(record[field], str):
            raise CalibrationError(f"{where}: field {field!r} is {type(record[field]).__name__}, expected text")
        try:
            record[field].encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(record[field][error.start]):04x}"
            raise CalibrationError(
                f"{where}: field {field!r} holds {half}, half a surrogate, which is no text"
            ) from None
        return record[field]

    def _files(self) -> list[Path]:
        return find_files(self.options.path, (".jsonl", ".json"))
