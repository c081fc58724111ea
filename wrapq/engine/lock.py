"""The lock of a run: its recipe with the digests of everything that decided the result, and of the result."""

from __future__ import annotations

import hashlib
import platform
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

import wrapq

LIBRARIES = ("torch", "transformers", "hydra-core", "safetensors")


def lock_text(recipe: dict[str, Any], digests: dict[str, str], device: torch.device) -> str:
    """The lock as YAML.

    Args:
        recipe: the composed recipe.
        digests: of model, data, plan and results.
        device: the device that computed.
    """
    lock = {
        "recipe": recipe,
        "digests": digests | {"code": code_digest()},
        "environment": environment(),
        "device": device_class(device),
    }
    return yaml.safe_dump(lock, sort_keys=False, allow_unicode=True, width=120)


def environment() -> dict[str, str]:
    """The versions of what computes."""
    versions = {name: metadata.version(name) for name in LIBRARIES}
    return {"wrapq": wrapq.__version__, "python": platform.python_version(), **versions}


def device_class(device: torch.device) -> str:
    """What must be equal for results to be equal to the bit: the kind of device and the instructions it has."""
    if device.type == "cuda":
        return f"cuda {torch.cuda.get_device_name(device)}"
    if device.type == "cpu":
        return f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()} {torch.get_num_threads()} threads"
    return device.type


@cache
def code_digest() -> str:
    """SHA-256, in hex, over the sources of the installed package."""
    sha, root = hashlib.sha256(), Path(wrapq.__file__).parent
    for file in sorted(root.rglob("*.py")):
        sha.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return sha.hexdigest()
