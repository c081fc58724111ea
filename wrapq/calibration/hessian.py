"""The second moment of what a weight is multiplied with."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from wrapq.errors import CalibrationError

_DAMP_TRIES = 8


class UnusableHessianError(CalibrationError):
    """A Hessian that no damping makes usable, or that no data reached: the weight can still be rounded to nearest."""


class Hessian:
    """`X^T X` [K, K] over the rows of every matrix X [M, K] a weight meets; weights with one input share one.

    Args:
        needs: `hessian`; `float64` sums in that precision instead of float32; `cross` gathers the cross term too.

    Attributes:
        matrix: the sum; the scale of the loss does not matter to those who use it, so it is not divided by M.
        cross: `(F - X)^T X` [K, K], F being the rows that the float model has where the quantized one has X.
        rows: how many rows were summed.
        complete: whether it is the sum over all processes.
    """

    def __init__(self, needs: Collection[str] = ("hessian",)) -> None:
        self.needs = frozenset(needs)
        self.dtype = torch.float64 if "float64" in self.needs else torch.float32
        self.matrix: Tensor | None = None
        self.cross: Tensor | None = None
        self.rows = 0
        self.complete = False
        self._factors: dict[tuple[float, bool], Factor] = {}

    def add(self, x: Tensor, reference: Tensor | None = None) -> None:
        """Add the rows of `x` [M, K], and of the float model's `reference` [M, K] where the cross term is asked for."""
        x = x.to(self.dtype)
        if self.matrix is None:
            self.matrix = torch.zeros(x.shape[1], x.shape[1], dtype=self.dtype, device=x.device)
            self.cross = torch.zeros_like(self.matrix) if "cross" in self.needs else None
        self.matrix.addmm_(x.t(), x)
        if self.cross is not None and reference is not None:
            self.cross.addmm_((reference.to(self.dtype) - x).t(), x)
        self.rows += len(x)
        self._factors.clear()

    def check(self, where: str) -> Tensor:
        """The matrix.

        Raises:
            UnusableHessianError: nothing was added; the message names the point.
            CalibrationError: it holds NaN or infinity.
        """
        if self.matrix is None or not self.rows:
            raise UnusableHessianError(f"{where}: no calibration token reached this weight, so it has no Hessian")
        if not bool(torch.isfinite(self.matrix.sum())):
            raise CalibrationError(f"{where}: the data holds NaN or inf, so its Hessian is not finite")
        return self.matrix

    def factor(self, damp: float, act_order: bool, where: str) -> Factor:
        """The factor for one damping and order, computed once for all weights that share the input."""
        key = (damp, act_order)
        if key not in self._factors:
            self._factors[key] = factorize(self.check(where), damp, act_order, where)
        return self._factors[key]

    def state_dict(self) -> dict[str, Tensor]:
        """What was gathered, by name."""
        held = {"matrix": self.matrix, "cross": self.cross, "rows": torch.tensor(self.rows)}
        return {name: tensor for name, tensor in held.items() if tensor is not None}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace what was gathered by `state`."""
        self.matrix, self.cross, self.rows = state.get("matrix"), state.get("cross"), int(state["rows"])
        self._factors.clear()


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


def factorize(hessian: Tensor, damp: float, act_order: bool, where: str) -> Factor:
    """Factorize `hessian` [K, K]; the damping grows tenfold until the factorization succeeds.

    With the rows and columns of H reversed, `H = L L^T`, the reversed inverse of L is the upper factor of H^-1: one
    Cholesky and one triangular inverse, where the textbook way takes a Cholesky, an inverse and another Cholesky.

    Raises:
        UnusableHessianError: when no damping up to `damp * 10^7` makes it positive definite.
    """
    diagonal = hessian.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else None
    matrix = hessian if order is None else hessian[order][:, order]
    dead = matrix.diagonal() == 0
    mean = diagonal.mean().clamp(min=torch.finfo(torch.float32).tiny)
    for attempt in range(_DAMP_TRIES):
        tried = damp * 10**attempt
        damped = matrix.flip(0, 1)
        damped.diagonal().add_(tried * mean)
        damped.diagonal().add_(dead.flip(0).to(damped.dtype) * mean)
        lower, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            eye = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
            upper = torch.linalg.solve_triangular(lower, eye, upper=False).flip(0, 1).float()
            return Factor(upper, order, dead, tried)
    raise UnusableHessianError(f"{where}: its Hessian is not positive definite even with damping {tried:g}")
