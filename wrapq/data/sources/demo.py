"""The text that ships with the package."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Literal

from wrapq.data.sources.base import SOURCES, TextSource
from wrapq.errors import CalibrationError
from wrapq.registry import Options


class DemoOptions(Options):
    """Options of the source `demo`."""

    split: Literal["calib", "heldout"] = "calib"


@SOURCES.register("demo")
class Demo(TextSource):
    """The shipped text: `split: calib` for calibration, `split: heldout` for evaluation; one document each."""

    Options = DemoOptions
    options: DemoOptions

    def check(self) -> None:
        if not self._file().is_file():
            raise CalibrationError(f"the shipped text '{self._file()}' is missing: install wrapq again")

    def describe(self) -> str:
        return f"demo/{self.options.split}"

    def documents(self) -> Iterator[str]:
        self.check()
        yield self._file().read_text(encoding="utf-8")

    def _file(self) -> Traversable:
        return files("wrapq") / "assets" / "demo" / f"{self.options.split}.txt"
