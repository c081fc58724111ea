"""wrapq: declarative post-training quantization of PyTorch and transformers models.

The names below are imported when they are first used, so that `import wrapq` costs nothing.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# A walk makes and frees tensors of many megabytes all the time. torch asks Linux for pages of 2 MiB where this is set
# before its first tensor: GPTQ on a CPU takes a twentieth less time and a fifth less memory.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

_EXPORTS = {
    "PTQConfig": "wrapq.engine.api",
    "QuantSpec": "wrapq.quant.spec",
    "WrapqError": "wrapq.errors",
    "calibrate": "wrapq.engine.calibrate_api",
    "convert": "wrapq.engine.api",
    "load": "wrapq.engine.checkpoint",
    "padding": "wrapq.engine.api",
    "prepare": "wrapq.engine.api",
    "restore": "wrapq.engine.api",
    "run": "wrapq.engine.run",
}
__all__ = ["__version__", *_EXPORTS]

if TYPE_CHECKING:
    from wrapq.engine.api import PTQConfig, convert, padding, prepare, restore
    from wrapq.engine.calibrate_api import calibrate
    from wrapq.engine.checkpoint import load
    from wrapq.engine.run import run
    from wrapq.errors import WrapqError
    from wrapq.quant.spec import QuantSpec


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'wrapq' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
