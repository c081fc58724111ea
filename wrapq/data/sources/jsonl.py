"""JSON lines: one object a line, one of its fields is the text or the messages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from pydantic import Field

from wrapq.data.sources.base import SOURCES, Chat, TextSource
from wrapq.data.sources.files import check_text, find_files, read_lines
from wrapq.data.sources.rows import HOLDS, document
from wrapq.errors import CalibrationError
from wrapq.registry import Options


class JsonlOptions(Options):
    """Options of the source `jsonl`."""

    path: str = Field(description="file or folder")
    field: str | None = Field(default=None, description=HOLDS)


@SOURCES.register("jsonl")
class JsonLines(TextSource):
    """A `.jsonl` file, also packed as `.jsonl.gz`, or a folder of them; every line is one document, a text or a
    conversation. Blank lines are skipped."""

    Options = JsonlOptions
    options: JsonlOptions

    def check(self) -> None:
        """Refuse a missing, unreadable or blank file, and one whose first line does not hold the field."""
        check_text(self._files())
        next(self.documents(), None)

    def describe(self) -> str:
        return f"jsonl:{self.options.path}" + (f"#{self.options.field}" if self.options.field else "")

    def documents(self) -> Iterator[str | Chat]:
        for file in self._files():
            for number, line in read_lines(file):
                if line.strip():
                    yield self._document(f"data file '{file}', line {number}", line)

    def _document(self, where: str, line: str) -> str | Chat:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CalibrationError(f"{where}: not valid JSON ({error})") from None
        if not isinstance(row, dict):
            raise CalibrationError(f"{where}: expected an object, found {type(row).__name__}")
        return document(row, self.options.field, where)

    def _files(self) -> list[Path]:
        return find_files(self.options.path, (".jsonl", ".json", ".jsonl.gz", ".json.gz"))
