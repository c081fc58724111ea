"""Coordinate descent over the codes of a weight that is rounded already.

Behdin et al., "QuantEase: Optimization-Based Quantization for Language Models", arXiv:2309.01885, section 3: with the
others as they are, `d H d^T` for the error d of a row is least where `q_j` is the grid point nearest to
`q_j - (d H)_j / H_jj`. It goes on from GPTQ's codes, which were chosen in one pass, and never loses more than they do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wrapq.algorithms.columns import by_run
from wrapq.algorithms.seqmse import tile
from wrapq.quant.affine import quantize_elements, round_to_grid
from wrapq.quant.dtypes import DType
from wrapq.quant.qparams import QParams

_BLOCK = 128  # columns that are gone through before the others hear of it, in one product


def descend(weight: Tensor, codes: Tensor, qparams: QParams, hessian: Tensor, sweeps: int) -> Tensor:
    """The codes [N, K], `codes` at first, in the grid of `qparams`, that lose less of `weight` [N, K] where they can.

    Args:
        hessian: positive definite, [K, K], or those [G, K, K] of G groups of rows.
        sweeps: how often all columns are gone through.
    """
    (rows, columns), spec = weight.shape, qparams.spec
    run = torch.arange(columns, device=weight.device) // tile((rows, columns), spec)[1]
    lines = lambda value: by_run(value, rows, columns, spec)[run]  # noqa: E731
    scale, zero = lines(qparams.effective_scale), None  # [K, N], as all that follows
    if (zeros := qparams.zero_in_steps) is not None:
        zero = lines(zeros.float())
    values, target = qparams.dequantize(codes, torch.float32).t().contiguous(), weight.float().t()
    of_groups = hessian[None] if hessian.dim() == 2 else hessian
    size = rows // len(of_groups)
    for number, own in enumerate(of_groups):
        part = slice(number * size, (number + 1) * size)
        zeros = None if zero is None else zero[:, part]
        values[:, part] = _descended(values[:, part], target[:, part], scale[:, part], zeros, own, sweeps, spec.dtype)
    steps = values.div_(scale)
    return quantize_elements(steps, steps.new_ones(1), zero, spec.dtype).t().contiguous()


def _descended(
    values: Tensor, target: Tensor, scale: Tensor, zero: Tensor | None, hessian: Tensor, sweeps: int, dtype: DType
) -> Tensor:
    """The numbers [K, N] that stand for the codes of the rows under one `hessian` [K, K]."""
    slope = hessian @ (values - target)
    for start in [*range(0, len(values), _BLOCK)] * sweeps:
        part = slice(start, start + _BLOCK)
        here, own, moved = slope[part].clone(), hessian[part, part], torch.zeros_like(slope[part])
        for i, value in enumerate(values[part]):
            column = start + i
            steps = (value - here[i] / own[i, i]).div_(scale[column])
            rounded = round_to_grid(steps, None if zero is None else zero[column], dtype)
            moved[i] = rounded * scale[column] - value
            here.addr_(own[:, i], moved[i])
        values[part] += moved
        slope.addmm_(hessian[:, part], moved)
    return values
