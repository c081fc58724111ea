"""The factorization of a Hessian that rounding column by column works with."""

from __future__ import annotations

import torch
from torch import Tensor

_DAMP_TRIES = 8
_LEAF = 128  # columns that are factored, and of a triangle that is inverted, as a whole


class Factor:
    """The Cholesky factor U of the inverse of a damped Hessian: `H^-1 = U^T U`, U upper triangular [K, K].

    Attributes:
        upper: U, of the Hessian with its columns in `order`.
        order: int64 [K], the columns by falling diagonal, or None for their own order.
        dead: bool [K], in that order: columns that no data ever reached.
        damp: the damping it took, relative to the mean of the diagonal.
    """

    def __init__(self, upper: Tensor, order: Tensor | None, dead: Tensor, damp: float) -> None:
        self.upper, self.order, self.dead, self.damp = upper, order, dead, damp


def factorize(hessian: Tensor, damp: float, act_order: bool) -> Factor | None:
    """Factorize `hessian` [K, K]; the damping grows tenfold until the factorization succeeds. None when no damping up
    to `damp * 10^7` makes it positive definite.

    With the rows and columns of H reversed, `H = L L^T`, the reversed inverse of L is the upper factor of H^-1: one
    Cholesky and one triangular inverse, where the textbook way takes a Cholesky, an inverse and another Cholesky.
    """
    diagonal = hessian.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else None
    dead = diagonal == 0 if order is None else diagonal[order] == 0
    backwards = (torch.arange(len(hessian), device=hessian.device) if order is None else order).flip(0)
    damped = hessian.index_select(0, backwards).index_select(1, backwards)  # of several ways much the fastest on a CPU
    undamped, missing = damped.diagonal().clone(), dead.flip(0).to(damped.dtype)
    mean = diagonal.mean().clamp(min=torch.finfo(torch.float32).tiny)
    for attempt in range(_DAMP_TRIES):
        tried = damp * 10**attempt
        damped.diagonal().copy_(undamped + tried * mean + missing * mean)
        lower = damped.clone()
        if _factor(lower):
            return Factor(inverse_of_triangle(lower).flip(0, 1).float(), order, dead, tried)
    return None


def _factor(matrix: Tensor) -> bool:
    """Overwrite the lower triangle of a symmetric `matrix` [K, K] by its Cholesky factor; False where it has none. By
    halves, so that most of the work is products: LAPACK's reaches a sixth of their speed on a CPU."""
    size, half = len(matrix), len(matrix) // 2
    if size <= _LEAF or matrix.is_cuda:
        lower, info = torch.linalg.cholesky_ex(matrix)
        matrix.copy_(lower)
        return int(info) == 0
    first, below, second = matrix[:half, :half], matrix[half:, :half], matrix[half:, half:]
    if not _factor(first):
        return False
    below.copy_(torch.linalg.solve_triangular(first.mT, below, upper=True, left=False))
    second.addmm_(below, below.t(), alpha=-1)
    return _factor(second)


def inverse_of_triangle(lower: Tensor) -> Tensor:
    """The inverse of a lower triangular matrix [K, K], by halves: a solver that is given the identity does three times
    the work, as it does not know that half of it is zero."""
    inverse = torch.zeros_like(lower)
    _invert(lower, inverse)
    return inverse


def _invert(lower: Tensor, inverse: Tensor) -> None:
    size, half = len(lower), len(lower) // 2
    if size <= _LEAF:
        eye = torch.eye(size, dtype=lower.dtype, device=lower.device)
        inverse.copy_(torch.linalg.solve_triangular(lower, eye, upper=False))
        return
    first, second = inverse[:half, :half], inverse[half:, half:]
    _invert(lower[:half, :half], first)
    _invert(lower[half:, half:], second)
    torch.mm(second, lower[half:, :half] @ first, out=inverse[half:, :half]).neg_()
