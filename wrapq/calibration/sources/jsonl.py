"""JSON lines: one object a line, one of its fields is the text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from pydantic import Field

from wrapq.calibration.sources.base import SOURCES, SourceOptions, TextSource
from wrapq.calibration.sources.files import check_text, find_files, read_lines
from wrapq.errors import CalibrationError, nearest


@SOURCES.register("jsonl")
class JsonLines(TextSource):
    """A `.jsonl` file or a folder of them; every line is one document. Blank lines are skipped."""

    class Options(SourceOptions):
        """Options of the source `jsonl`."""

        path: str = Field(description="file or folder")
        field: str = Field(default="text", description="the key that holds the text")

    def check(self) -> None:
        """Refuse a missing, unreadable or blank file, and one whose first line does not hold the field."""
        check_text(self._files())
        next(self.documents(), None)

    def describe(self) -> str:
        """`jsonl:`, the path and the field."""
        return f"jsonl:{self.options.path}#{self.options.field}"

    def documents(self) -> Iterator[str]:
        """The field's text of each line; errors name the file and the line."""
        for file in self._files():
            for number, line in read_lines(file):
                if line.strip():
                    yield self._text(f"data file '{file}', line {number}", line)

    def _text(self, where: str, line: str) -> str:
        field = self.options.field
        try:
            record = json.loads(line)
        except ValueError as error:
            raise CalibrationError(f"{where}: not valid JSON ({error})") from None
        if not isinstance(record, dict):
            raise CalibrationError(f"{where}: expected an object, found {type(record).__name__}")
        if field not in record:
            names = ", ".join(nearest(field, record)) or "none"
            raise CalibrationError(f"{where}: no field {field!r}; its fields are like: {names}")
        if not isinstance(record[field], str):
            raise CalibrationError(f"{where}: field {field!r} is {type(record[field]).__name__}, expected text")
        return record[field]

    def _files(self) -> list[Path]:
        return find_files(self.options.path, (".jsonl", ".json"))
