"""Where a value comes from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Origin:
    """A preset file, and the package that it came from.

    Attributes:
        preset: its kind and name, `scheme/w4a16`.
        package: the distribution that holds it; for a folder or file of the user's own, its name.
        version: of the distribution; empty for a folder or file.
        digest: SHA-256, in hex, of the file's text.
    """

    preset: str
    package: str
    version: str
    digest: str

    @property
    def kind(self) -> str:
        """The group it is chosen from: `recipe`, `scheme`, `calibration`."""
        return self.preset.partition("/")[0]


@dataclass(frozen=True)
class Provenance:
    """What set a key: a line of a file, an override, or both when an override chose the file.

    Attributes:
        file: as messages call it, `recipes/w4a16_rtn.yaml`; empty when an override set the key itself.
        line: of the file, from 1; None for the file as a whole.
        override: the override as the user wrote it; empty when none was involved.
        origin: the preset that the file is.
    """

    file: str = ""
    line: int | None = None
    override: str = ""
    origin: Origin | None = None

    def __str__(self) -> str:
        if not self.file:
            return f"override {self.override}"
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{place} (override {self.override})" if self.override else place
