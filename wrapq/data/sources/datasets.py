"""Any data set that the `datasets` package can load, by name or by folder (needs the extra `wrapq[data]`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from wrapq.data.sources.base import SOURCES, Chat, TextSource
from wrapq.data.sources.rows import HOLDS, document, without_nulls
from wrapq.errors import CalibrationError
from wrapq.paths import expand
from wrapq.registry import Options, require

_SAVED = ("dataset_dict.json", "state.json")
"""What `save_to_disk` writes into the folder: of several splits, of one."""


class DatasetsOptions(Options):
    """Options of the source `datasets`."""

    path: str = Field(description="name on the hub, or a local folder, also one that save_to_disk wrote")
    name: str | None = Field(default=None, description="configuration of the data set")
    split: str = "train"
    field: str | None = Field(default=None, description=HOLDS)
    revision: str | None = Field(default=None, description="commit, tag or branch; pin it to repeat a run")
    streaming: bool = Field(default=False, description="read row by row instead of downloading the whole split")


@SOURCES.register("datasets")
class Datasets(TextSource):
    """A split of a data set: every row is one document, a text or a conversation. Code in a data set's repository is
    never run."""

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

    def documents(self) -> Iterator[str | Chat]:
        self.check()
        for number, row in enumerate(self._load(), start=1):
            given = {**dict.fromkeys(row), **without_nulls(row)}
            yield document(given, self.options.field, f"{self.describe()}, row {number}")

    def _load(self) -> Any:
        from datasets import load_dataset

        o = self.options
        path = str(expand(o.path)) if o.path.startswith("~") else o.path
        try:
            if any((Path(path) / name).is_file() for name in _SAVED):
                return self._load_saved(path)
            return load_dataset(path, o.name, split=o.split, revision=o.revision, streaming=o.streaming)
        except CalibrationError:
            raise
        except Exception as error:  # the package raises a dozen kinds, from several libraries
            raise CalibrationError(
                f"{self.describe()} cannot be loaded: {type(error).__name__}: {error}\n"
                "    check the name, configuration and split; without a network use a local file "
                "(calibration=text, jsonl or parquet) or a data set that is already in the cache"
            ) from error

    def _load_saved(self, path: str) -> Any:
        """The split of a folder that `save_to_disk` wrote, of one data set or one for each split."""
        from datasets import DatasetDict, load_from_disk

        o, found = self.options, load_from_disk(path)
        if o.name or o.revision:
            raise CalibrationError(f"{self.describe()}: a folder of save_to_disk has no configuration and no revision")
        splits = found if isinstance(found, DatasetDict) else {str(found.split or o.split): found}
        if o.split not in splits:
            raise CalibrationError(f"{self.describe()}: no split {o.split!r} in it; there is: {', '.join(splits)}")
        return splits[o.split]
