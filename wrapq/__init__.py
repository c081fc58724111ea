"""wrapq: declarative post-training quantization of PyTorch and transformers models.

The names below are imported when they are first used, so that `import wrapq` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "PTQConfig": "wrapq.api",
    "QuantSpec": "wrapq.quant.spec",
    "WrapqError": "wrapq.errors",
    "calibrate": "wrapq.api",
    "convert": "wrapq.api",
    "export_module": "wrapq.engine.export_module",
    "load": "wrapq.engine.registered",
    "padding": "wrapq.api",
    "prepare": "wrapq.api",
    "quantize": "wrapq.engine.quantize_module",
    "restore": "wrapq.api",
    "run": "wrapq.engine.run",
    "__version__": "wrapq.version",
}
__all__ = [*_EXPORTS]

if TYPE_CHECKING:
    from wrapq.api import PTQConfig, calibrate, convert, padding, prepare, restore
    from wrapq.engine.export_module import export_module
    from wrapq.engine.quantize_module import quantize
    from wrapq.engine.registered import load
    from wrapq.engine.run import run
    from wrapq.errors import WrapqError
    from wrapq.quant.spec import QuantSpec
    from wrapq.version import __version__


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'wrapq' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
