"""Plain text files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pydantic import Field

from wrapq.data.sources.base import SOURCES, TextSource
from wrapq.data.sources.files import check_text, find_files, read_lines
from wrapq.registry import Options


class TextOptions(Options):
    """Options of the source `text`."""

    path: str = Field(description="file or folder")
    separator: str | None = Field(default=None, min_length=1, description="text between two documents of a file")


@SOURCES.register("text")
class Text(TextSource):
    """A UTF-8 file, or every `.txt` and `.md` file of a folder, also packed as `.txt.gz` and `.md.gz`; a file is one
    document unless `separator` cuts it."""

    Options = TextOptions
    options: TextOptions

    def check(self) -> None:
        check_text(self._files())

    def describe(self) -> str:
        return f"text:{self.options.path}"

    def documents(self) -> Iterator[str]:
        for file in self._files():
            text = "".join(line for _, line in read_lines(file)).replace("\r\n", "\n")
            yield from text.split(self.options.separator) if self.options.separator else (text,)

    def _files(self) -> list[Path]:
        return find_files(self.options.path, (".txt", ".md", ".txt.gz", ".md.gz"))
