"""Any data set that the `datasets` package can load, by name or by folder (needs the extra `wrapq[data]`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import Field

from wrapq.data.sources.base import SOURCES, TextSource
from wrapq.errors import CalibrationError, nearest
from wrapq.paths import expand
from wrapq.registry import Options, require


class DatasetsOptions(Options):
    """Options of the source `datasets`."""

    path: str = Field(description="name on the hub, or a local folder")
    name: str | None = Field(default=None, description="configuration of the data set")
    split: str = "train"
    field: str = Field(default="text", description="the column that holds the text")
    revision: str | None = Field(default=None, description="commit, tag or branch; pin it to repeat a run")
    streaming: bool = Field(default=False, description="read row by row instead of downloading the whole split")


@SOURCES.register("datasets")
class Datasets(TextSource):
    """A split of a data set: every row's `field` is one document. Code in a data set's repository is never run."""

    Options = DatasetsOptions
    options: DatasetsOptions

    def check(self) -> None:
        """Refuse a missing package, and a local path that does not exist; the hub is not asked."""
        require("datasets", "data", "data source 'datasets'", CalibrationError)
        path = self.options.path
        if path.startswith((".", "/", "~")) and not expand(path).exists():
            raise CalibrationError(f"data set folder {path!r} does not exist")

    def describe(self) -> str:
        o = self.options
        named = "/".join(part for part in (o.path, o.name, o.split) if part)
        return f"datasets:{named}" + (f"@{o.revision}" if o.revision else "")

    def documents(self) -> Iterator[str]:
        self.check()
        field, source = self.options.field, self.describe()
        for number, row in enumerate(self._load()):
            if field not in row:
                raise CalibrationError(f"{source}: no column {field!r}; did you mean: {', '.join(nearest(field, row))}")
            value = "" if row[field] is None else row[field]
            if not isinstance(value, str):
                found = type(value).__name__
                raise CalibrationError(f"{source}, row {number}: column {field!r} is {found}, expected text")
            yield value

    def _load(self) -> Any:
        from datasets import load_dataset

        o = self.options
        path = str(expand(o.path)) if o.path.startswith("~") else o.path
        try:
            return load_dataset(path, o.name, split=o.split, revision=o.revision, streaming=o.streaming)
        except Exception as error:  # the package raises a dozen kinds, from several libraries
            raise CalibrationError(
                f"{self.describe()} cannot be loaded: {type(error).__name__}: {error}\n"
                "    check the name, configuration and split; without a network use a local file "
                "(calibration=text, jsonl or parquet) or a data set that is already in the cache"
            ) from error
