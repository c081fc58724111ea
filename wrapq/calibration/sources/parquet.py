"""Parquet files (needs the extra `wrapq[data]`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from wrapq.calibration.sources.base import SOURCES, SourceOptions, TextSource, require
from wrapq.calibration.sources.files import check_readable, find_files
from wrapq.errors import CalibrationError, nearest

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

ROWS = 1024  # rows decoded at a time


@SOURCES.register("parquet")
class Parquet(TextSource):
    """A `.parquet` file or a folder of them; every row of the column `field` is one document, nulls are skipped."""

    class Options(SourceOptions):
        """Options of the source `parquet`."""

        path: str = Field(description="file or folder")
        field: str = Field(default="text", description="the column that holds the text")

    def check(self) -> None:
        """Refuse a missing package or file, a file that is not parquet, a missing column, no rows."""
        require("pyarrow", "parquet")
        files = self._files()
        check_readable(files)
        if not sum(self._open(file).metadata.num_rows for file in files):
            raise CalibrationError(f"data file '{files[0]}' has no rows")

    def describe(self) -> str:
        """`parquet:`, the path and the column."""
        return f"parquet:{self.options.path}#{self.options.field}"

    def documents(self) -> Iterator[str]:
        """The column's values, file by file."""
        require("pyarrow", "parquet")
        for file in self._files():
            for batch in self._open(file).iter_batches(batch_size=ROWS, columns=[self.options.field]):
                yield from (value for value in batch.column(0).to_pylist() if value is not None)

    def _open(self, file: Path) -> ParquetFile:
        import pyarrow as pa
        from pyarrow.parquet import ParquetFile

        field = self.options.field
        try:
            opened = ParquetFile(file)
        except (pa.ArrowInvalid, OSError) as error:
            raise CalibrationError(f"data file '{file}' cannot be read as parquet: {error}") from None
        schema = opened.schema_arrow
        if field not in schema.names:
            raise CalibrationError(
                f"data file '{file}': no column {field!r}; did you mean: {', '.join(nearest(field, schema.names))}"
            )
        kind = schema.field(field).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise CalibrationError(f"data file '{file}': column {field!r} holds {kind}, expected text")
        return opened

    def _files(self) -> list[Path]:
        return find_files(self.options.path, (".parquet",))
