"""Parquet files (needs the extra `wrapq[data]`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from wrapq.data.sources.base import SOURCES, Chat, TextSource
from wrapq.data.sources.files import check_readable, find_files
from wrapq.data.sources.rows import HOLDS, MEDIA, TEXT, TOOLS, document, field_of, without_nulls
from wrapq.errors import CalibrationError, reading
from wrapq.registry import Options, require

if TYPE_CHECKING:
    from pyarrow import RecordBatch
    from pyarrow.parquet import ParquetFile

ROWS = 1024  # rows decoded at a time


class ParquetOptions(Options):
    """Options of the source `parquet`."""

    path: str = Field(description="file or folder")
    field: str | None = Field(default=None, description=HOLDS)


@SOURCES.register("parquet")
class Parquet(TextSource):
    """A `.parquet` file or a folder of them; every row is one document: the text of a column, or the conversation of
    one that holds lists of structs, or JSON text. Nulls are skipped."""

    Options = ParquetOptions
    options: ParquetOptions

    def check(self) -> None:
        """Refuse a missing package or file, a file that is not parquet, a missing column, no rows."""
        require("pyarrow", "data", "data source 'parquet'", CalibrationError)
        files = self._files()
        check_readable(files)
        if not sum(self._open(file).metadata.num_rows for file in files):
            raise CalibrationError(f"data file '{files[0]}' has no rows")

    def describe(self) -> str:
        return f"parquet:{self.options.path}" + (f"#{self.options.field}" if self.options.field else "")

    def documents(self) -> Iterator[str | Chat]:
        require("pyarrow", "data", "data source 'parquet'", CalibrationError)
        for file in self._files():
            opened = self._open(file)
            name, names = self._field(opened, file), opened.schema_arrow.names
            columns = [name, *(each for each in (TOOLS, *MEDIA) if each in names and name != TEXT)]
            size = 1 if {*columns} & {*MEDIA} else ROWS  # what is refused is not decoded in thousands
            batches = opened.iter_batches(batch_size=size, columns=columns)
            for number, row in enumerate(_rows(batches, file), start=1):
                yield document({name: None, **without_nulls(row)}, name, f"data file '{file}', row {number}")

    def _open(self, file: Path) -> ParquetFile:
        import pyarrow as pa
        from pyarrow.parquet import ParquetFile

        with _reading(file):
            opened = ParquetFile(file)
            schema = opened.schema_arrow
        name = self._field(opened, file)
        kind = schema.field(name).type
        chats = (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_struct(kind.value_type)
        if not (chats or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise CalibrationError(f"data file '{file}': column {name!r} holds {kind}, expected text or messages")
        return opened

    def _field(self, opened: ParquetFile, file: Path) -> str:
        return field_of(opened.schema_arrow.names, self.options.field, f"data file '{file}'")

    def _files(self) -> list[Path]:
        return find_files(self.options.path, (".parquet",))


def _reading(file: Path) -> AbstractContextManager[None]:
    return reading(f"data file '{file}' cannot be read as parquet", CalibrationError)


def _rows(batches: Iterator[RecordBatch], file: Path) -> Iterator[dict[str, Any]]:
    while True:
        with _reading(file):
            batch = next(batches, None)
            rows = batch and batch.to_pylist()
        if rows is None:
            return
        yield from rows
