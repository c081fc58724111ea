"""Parquet files (needs the extra `wrapq[data]`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from wrapq.data.sources.base import SOURCES, TextSource
from wrapq.data.sources.files import check_readable, find_files
from wrapq.errors import CalibrationError, nearest, reading
from wrapq.registry import Options, require

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

ROWS = 1024  # rows decoded at a time


class ParquetOptions(Options):
    """Options of the source `parquet`."""

    path: str = Field(description="file or folder")
    field: str = Field(default="text", description="the column that holds the text")


@SOURCES.register("parquet")
class Parquet(TextSource):
    """A `.parquet` file or a folder of them; every row of the column `field` is one document, nulls are skipped."""

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
        return f"parquet:{self.options.path}#{self.options.field}"

    def documents(self) -> Iterator[str]:
        require("pyarrow", "data", "data source 'parquet'", CalibrationError)
        for file in self._files():
            batches = self._open(file).iter_batches(batch_size=ROWS, columns=[self.options.field])
            while True:
                with _reading(file):
                    batch = next(batches, None)
                    texts = batch and batch.column(0).to_pylist()
                if texts is None:
                    break
                yield from (text for text in texts if text is not None)

    def _open(self, file: Path) -> ParquetFile:
        import pyarrow as pa
        from pyarrow.parquet import ParquetFile

        field = self.options.field
        with _reading(file):
            opened = ParquetFile(file)
            schema = opened.schema_arrow
        if field not in schema.names:
            close = ", ".join(nearest(field, schema.names))
            raise CalibrationError(f"data file '{file}': no column {field!r}; did you mean: {close}")
        kind = schema.field(field).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise CalibrationError(f"data file '{file}': column {field!r} holds {kind}, expected text")
        return opened

    def _files(self) -> list[Path]:
        return find_files(self.options.path, (".parquet",))


def _reading(file: Path) -> AbstractContextManager[None]:
    return reading(f"data file '{file}' cannot be read as parquet", CalibrationError)
