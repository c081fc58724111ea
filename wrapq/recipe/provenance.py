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


@dataclass(frozen=True)
class Source:
    """What set a key: a line of a file, an override, or both when an override chose the file.

    Attributes:
        place: `recipes/w4a16_rtn.yaml:12`; empty when an override set the key itself.
        override: the override as the user wrote it; empty when none was involved.
        origin: the preset that the place is in.
    """

    place: str = ""
    override: str = ""
    origin: Origin | None = None

    def __str__(self) -> str:
        if not self.place:
            return f"override {self.override}"
        return f"{self.place} (override {self.override})" if self.override else self.place


DEFAULT = Source("default")
"""The source of a key that no file and no override names: the default of the schema."""
