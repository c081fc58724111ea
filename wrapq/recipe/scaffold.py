"""A new package of presets: a scheme, a recipe that uses it, and a test that resolves every recipe."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

from wrapq.errors import OutputError, Problem, RecipeError

_NAME = re.compile(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*")
_LONGEST = 60

_TEMPLATES = resources.files("wrapq.recipe") / "new_package"
"""The files of a package, each with `.txt` after its name; MODULE in a name and {module} and {name} in a text vary."""


def new_package(name: str, parent: Path) -> list[Path]:
    """Write a package of presets into the new folder `name` of `parent`; the files.

    Raises:
        RecipeError: `name` is no name for a package.
        OutputError: the folder is there already, or cannot be written.
    """
    if not _NAME.fullmatch(name) or len(name) > _LONGEST or name.replace("_", "-").split("-")[0] == "wrapq":
        what = f"{name[:_LONGEST]!r} cannot be the name of a package of presets"
        remedy = "use small letters, digits, - and _, beginning with a letter, and not with wrapq"
        raise RecipeError([Problem("", "", what, remedy=remedy)])
    words = {"name": name.replace("_", "-"), "module": name.replace("-", "_")}
    folder = parent / name
    try:
        folder.mkdir()
        files = []
        with resources.as_file(_TEMPLATES) as templates:
            for template in sorted(templates.rglob("*.txt")):
                name = str(template.relative_to(templates).with_suffix("")).replace("MODULE", words["module"])
                files.append(folder / name)
                files[-1].parent.mkdir(parents=True, exist_ok=True)
                files[-1].write_text(template.read_text(encoding="utf-8").format(**words), encoding="utf-8")
        return files
    except FileExistsError as error:
        raise OutputError(f"{folder} is there already; nothing was written") from error
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror}") from error
