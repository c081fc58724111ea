"""The lock of a run: its recipe with the digests of everything that decided the result, and of the result.

A lock says nothing of when or in which folder the run was made: equal runs have equal locks, byte for byte.
"""

from __future__ import annotations

import hashlib
import os
import platform
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from wrapq.errors import ModelError, RecipeError
from wrapq.recipe.dump import dump_data
from wrapq.recipe.provenance import Origin
from wrapq.recipe.schema import Recipe
from wrapq.recipe.yaml_reader import parse_document
from wrapq.registry import PLUGIN_GROUP
from wrapq.version import __version__

LIBRARIES = ("torch", "transformers", "hydra-core", "safetensors")
SEQUENCES = 2
_MAX_BYTES = 64 << 20


class Lock(BaseModel):
    """The contents of `recipe.lock.yaml`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: Recipe
    """The composed recipe."""
    presets: tuple[Origin, ...] = ()
    """The files it was composed of, with the packages they came from."""
    digests: dict[str, str]
    """SHA-256, in hex, of recipe, plan, model, data and code, of the quantization parameters, tensors and outputs."""
    environment: dict[str, str]
    """Versions of Python and of the packages that compute."""
    device: Annotated[str, Field(pattern=r"\S")]
    """The `device_class` that the run used."""
    metrics: dict[str, dict[str, float]] = {}
    """The metrics of each stage."""
    modules: dict[str, str] = {}
    """For each quantized module, in the model's order, the digest of its integers, scales and zero points."""
    sequences: int = 1
    """How text becomes sequences: since `SEQUENCES` 2 each begins with what the tokenizer puts before a text."""

    def to_yaml(self) -> str:
        """The lock as YAML."""
        return dump_data(self.model_dump(mode="json"))


def read_lock(path: Path) -> Lock:
    """The lock in the file `path`; raises `ModelError` when there is none or it does not hold what a lock holds."""
    try:
        if path.exists() and not path.is_file():
            raise ModelError(f"{path} is no file: a lock is recipe.lock.yaml in the folder of a run")
        with path.open("rb") as file:
            # read takes the memory for all that it may return, and nobody waits for 64 MiB of a few KiB
            size = os.fstat(file.fileno()).st_size
            raw = file.read(min(size, _MAX_BYTES) + 1)
        if len(raw) > _MAX_BYTES:
            raise ModelError(f"{path} is larger than {_MAX_BYTES >> 20} MiB, which no lock is")
        return Lock.model_validate(parse_document(raw.decode("utf-8"), str(path)).data)
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from error
    except RecipeError as error:
        raise ModelError(f"{path} is no lock of a run: {error.problems[0]}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ModelError(f"{path} is no lock of a run: {where}: {first['msg']}") from error


def environment() -> dict[str, str]:
    """Versions of Python, of the packages that compute and of those with plug-ins."""
    versions = {name: metadata.version(name) for name in LIBRARIES}
    return {"wrapq": __version__, "python": platform.python_version(), **versions, **_plugins()}


def device_class(device: torch.device) -> str:
    """The kind of device, its instruction set and threads: where equal, results are equal to the bit."""
    if device.type == "cuda":
        return f"cuda {torch.cuda.get_device_name(device)}"
    if device.type == "cpu":
        return f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()} {torch.get_num_threads()} threads"
    return device.type


@cache
def code_digest() -> str:
    """SHA-256, in hex, over the sources of the installed package."""
    sha, root = hashlib.sha256(), Path(__file__).parents[1]
    for file in sorted(root.rglob("*.py")):
        sha.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return sha.hexdigest()


@cache
def _plugins() -> dict[str, str]:
    found: list[Any] = [point.dist for point in metadata.entry_points(group=PLUGIN_GROUP) if point.dist is not None]
    return {dist.name: dist.version for dist in sorted(found, key=lambda dist: dist.name)}
