"""Writing a composed recipe as one file that composes to the same recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from wrapq.errors import OutputError
from wrapq.paths import expand
from wrapq.recipe.schema import Recipe
from wrapq.recipe.yaml_reader import plain_value

_GROUPS = ("model", "calibration", "evaluation", "export")
_HEADER = """\
# wrapq run recipe=THIS_FILE
# @package _global_
defaults: # everything is written below; nothing is taken from the presets
{lines}
  - _self_

"""


def to_yaml(recipe: Recipe) -> str:
    """The recipe as the text of a recipe file, complete, so that later changes of presets do not change it."""
    header = _HEADER.format(lines="\n".join(f"  - override /{group}: null" for group in _GROUPS))
    data = recipe.model_dump()
    data["rules"] = {name: rule.model_dump(exclude_defaults=True) for name, rule in recipe.rules.items()}
    return header + dump_data(data)


def dump_data(data: dict[str, Any]) -> str:
    """Plain data as YAML that `parse_document` reads back unchanged."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def write_new(path: Path, text: str) -> None:
    """Write `text` as the new file `path`; raises `OutputError` when it is there already or cannot be written."""
    try:
        with expand(path).open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise OutputError(f"{path} is there already; nothing was overwritten") from error
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    # quoted where the reader would take it for a number, a boolean or null
    style = None if isinstance(plain_value(text), str) else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
