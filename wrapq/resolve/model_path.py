"""Where the model of a recipe lies: a folder, a GGUF file, the model that ships with wrapq, or a name on the hub."""

from __future__ import annotations

import re
from importlib import resources

from wrapq.errors import PlanError, Problem, WrapqError, alike
from wrapq.paths import expand, refuse_devices
from wrapq.resolve.stored import GGUF

PACKAGED = "wrapq://"
ANY_MODULE = "from Python wrapq.quantize(module, recipe, batches) takes any module"
"""What to do with a model that `wrapq run` does not take."""
_SHOWN = 80
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def locate(path: str) -> str:
    """The folder or hub name that `path` means."""
    if path.startswith(PACKAGED):
        assets, name = resources.files("wrapq") / "assets", path.removeprefix(PACKAGED)
        if not (assets / name).is_dir():
            raise _no_model(path, [f"{PACKAGED}{close}" for close in alike(name, [f.name for f in assets.iterdir()])])
        return str(assets / name)
    try:
        folder = expand(path)
        folder.lstat()
    except FileNotFoundError:
        pass
    except (OSError, WrapqError) as error:  # the first of a path that is too long
        shown = path if len(path) <= _SHOWN else f"{path[:_SHOWN]}..."
        what = f"cannot be a folder: {shown!r} ({getattr(error, 'strerror', None) or error})"
        raise PlanError([Problem("", "model.path", what)]) from None
    if folder.is_file() and path.endswith(GGUF):
        return str(folder)
    if folder.is_dir():
        packed = sorted(folder.glob(f"*{GGUF}"))
        if packed and not (folder / "config.json").is_file():
            if len(packed) > 1:
                what = f"{path} holds {len(packed)} GGUF files and no config.json"
                raise PlanError([Problem("", "model.path", what, tuple(map(str, packed)), "name one of them")])
            return str(packed[0])
        if not (folder / "config.json").is_file():
            what = f"{path} holds no config.json, so it is no language model"
            raise PlanError([Problem("", "model.path", what, (), f"wrapq run takes these alone; {ANY_MODULE}")])
        refuse_devices(folder)
        return str(folder)
    if _HUB_NAME.fullmatch(path) and not path.startswith((".", "~")) and not folder.parent.is_dir():
        return path
    siblings = [f.name for f in folder.parent.iterdir() if f.is_dir()] if folder.parent.is_dir() else []
    raise _no_model(path, [str(folder.parent / close) for close in alike(folder.name, siblings)])


def _no_model(path: str, close: list[str]) -> PlanError:
    remedy = "give a folder with config.json and weights, or a hub name"
    return PlanError([Problem("", "model.path", f"no such folder: {path}", tuple(close), remedy)])
