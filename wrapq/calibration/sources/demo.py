"""The text that ships with the package."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Literal

from wrapq.calibration.sources.base import SOURCES, SourceOptions, TextSource
from wrapq.errors import CalibrationError


@SOURCES.register("demo")
class Demo(TextSource):
    """The shipped text: `split: calib` for calibration, `split: heldout` for evaluation; one document each."""

    class Options(SourceOptions):
        """Options of the source `demo`."""

        split: Literal["calib", "heldout"] = "calib"

    def check(self) -> None:
        """Refuse an installation without the text."""
        if not self._file().is_file():
            raise CalibrationError(f"the shipped text '{self._file()}' is missing: install wrapq again")

    def describe(self) -> str:
        """`demo/calib` or `demo/heldout`."""
        return f"demo/{self.options.split}"

    def documents(self) -> Iterator[str]:
        """The whole text as one document."""
        self.check()
        yield self._file().read_text(encoding="utf-8")

    def _file(self) -> Traversable:
        return files("wrapq") / "assets" / "demo" / f"{self.options.split}.txt"
