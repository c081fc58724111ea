"""Quantized weights in ggml's k-quants, super-blocks of 256 weights whose scales are integers too.

The layouts are those of `block_q4_K`, `block_q5_K` and `block_q6_K` in llama.cpp's `ggml/src/ggml-common.h`.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from torch import Tensor

from wrapq.quant.dtypes import SUPER_BLOCK
from wrapq.quant.qparams import QParams
from wrapq.quant.super_blocks import taken_apart

TYPES = {(4, 32): "q4_k", (5, 32): "q5_k", (6, 16): "q6_k"}
"""The type of so many bits, in groups of so many weights."""


def super_blocks(levels: Tensor, qparams: QParams) -> list[np.ndarray]:
    """The parts of each super-block, uint8 [N, S, bytes], of a weight's levels from zero, uint8 [N, K]."""
    blocks = levels.unflatten(1, (-1, SUPER_BLOCK)).cpu().numpy()
    scales, steps = _apart(qparams.scale, qparams)
    if qparams.spec.symmetric:
        halves = blocks.reshape(*blocks.shape[:2], 2, 4, 32)  # of 128 weights, in quarters
        low, high = halves & np.uint8(15), halves >> 4
        ql = low[..., :2, :] | (low[..., 2:, :] << np.uint8(4))
        return [_flat(ql), _flat(_bits(high, 2)), scales.astype(np.int8).view(np.uint8), steps]
    minima, minimum_steps = _apart(cast(Tensor, qparams.zero_point), qparams)
    groups = blocks.reshape(*blocks.shape[:2], 8, 32)
    low = groups & np.uint8(15)
    fifth = [_bits(groups >> 4, 1)] if qparams.spec.dtype.bits == 5 else []
    nibbles = low[..., 0::2, :] | (low[..., 1::2, :] << np.uint8(4))
    return [steps, minimum_steps, _six_bits(scales, minima), *fifth, _flat(nibbles)]


def _apart(values: Tensor, qparams: QParams) -> tuple[np.ndarray, np.ndarray]:
    """Integers [N, S, groups], int32, and the bytes [N, S, 2] of what they are multiplied with, in half precision."""
    codes, steps = taken_apart(values, qparams.spec)
    codes = codes.unflatten(-1, (-1, qparams.spec.groups_at_once))
    return codes.cpu().numpy(), steps[..., None].contiguous().cpu().view(torch.uint8).numpy()


def _bits(parts: np.ndarray, width: int) -> np.ndarray:
    """Numbers of `width` bits [..., P, n] in bytes [..., n], the first part in the lowest bits."""
    shifts = (np.arange(parts.shape[-2], dtype=np.uint8) * np.uint8(width))[:, None]
    packed: np.ndarray = np.bitwise_or.reduce(parts << shifts, axis=-2)
    return packed


def _six_bits(scales: np.ndarray, minima: np.ndarray) -> np.ndarray:
    """Eight scales and eight minima of 6 bits in 12 bytes: the last four's upper bits lie above the first four."""
    scales, minima = scales.astype(np.uint8), minima.astype(np.uint8)
    first = [kind[..., :4] | (kind[..., 4:] >> 4 << np.uint8(6)) for kind in (scales, minima)]
    last = (scales[..., 4:] & np.uint8(15)) | (minima[..., 4:] << np.uint8(4))
    return np.concatenate([*first, last], axis=-1)


def _flat(parts: np.ndarray) -> np.ndarray:
    """[N, S, ...] as [N, S, bytes]."""
    return parts.reshape(*parts.shape[:2], -1)
