"""Rounding by ggml itself, with or without llama.cpp's importance matrix."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from torch import Tensor


@cache
def _quantize_chunk() -> Callable[..., int]:
    library = next(Path(llama_cpp.__file__).parent.glob("lib/*ggml-base.*"))
    found: Any = ctypes.CDLL(str(library)).ggml_quantize_chunk
    found.restype = ctypes.c_size_t
    numbers = ctypes.POINTER(ctypes.c_float)
    found.argtypes = [ctypes.c_int, numbers, ctypes.c_void_p, *[ctypes.c_int64] * 3, numbers]
    return found


def rounded_by_ggml(weight: Tensor, kind: str, importance: Tensor | None = None) -> np.ndarray:
    """The blocks, uint8 [N, bytes], that ggml makes of `weight` [N, K] in a type, columns counted by `importance` [K]
    where it is given."""
    numbers = np.ascontiguousarray(weight.float().numpy())
    number = gguf.GGMLQuantizationType[kind.upper()]
    blocks = np.empty(gguf.quants.quant_shape_to_byte_shape(numbers.shape, number), np.uint8)
    given = None if importance is None else np.ascontiguousarray(importance.float().numpy())
    pointer = ctypes.POINTER(ctypes.c_float)
    arguments = numbers.ctypes.data_as(pointer), blocks.ctypes.data, 0, *numbers.shape
    written = _quantize_chunk()(number, *arguments, None if given is None else given.ctypes.data_as(pointer))
    assert written == blocks.nbytes
    return blocks
