"""What calibration leaves behind of the input of a weight: sums over the rows that it multiplies."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from wrapq.errors import CalibrationError
from wrapq.half_products import use_matrix_units
from wrapq.observers.base import keep_rows, numbered
from wrapq.statistics.cholesky import Factor, factorize

_LEAST_BLOCK, _BLOCKS = 128, 8


class UnusableStatisticsError(CalibrationError):
    """No data reached a weight, or no damping makes its Hessian usable: it can still be rounded to nearest."""


class Part(NamedTuple):
    """One sum over rows: what adds to it, of rows and of what the float model's are more, and how those of several
    processes become one."""

    dims: Literal[1, 2]
    add: Callable[[Tensor, Tensor, Any], object]
    reduce: Literal["sum", "max", "min", "rows"] = "sum"
    start: float = 0.0
    rows: int = 0  # where rows themselves are kept: how many, with the number by which they are in the last column
    weighs: bool = False  # whether a row may count more than once, and how often is a weight


def _add_gram(held: Tensor, x: Tensor, moved: Tensor | None) -> None:
    """Above the diagonal only, block by block, where that is less work; `_mirror` does the rest."""
    if x.dim() == 3:
        held.baddbmm_(x.mT, x)
        return
    if x.dtype != held.dtype and x.is_cuda:
        held.add_(torch.mm(x.t(), x, out_dtype=held.dtype))
        return
    if x.dtype != held.dtype:
        matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        before = matmul.fp32_precision
        matmul.fp32_precision = "bf16"  # which of these numbers takes nothing away
        try:
            _add_gram(held, x.to(held.dtype), moved)
        finally:
            matmul.fp32_precision = before
        return
    width = _block(held)
    for start in range(0, len(held), width):
        held[start : start + width, start:].addmm_(x[:, start : start + width].t(), x[:, start:])


def _sums_halves(x: Tensor) -> bool:
    """Whether what is in 16 bits is multiplied as it is, and the products summed in float32, in which each is exact."""
    return (
        x.dtype in (torch.bfloat16, torch.float16)
        and (x.is_cuda or use_matrix_units())
        and _has_units(x.device, x.dtype)
    )


@cache
def _has_units(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `device` can do that: a GPU's tensor cores do, many times faster than float32, a CPU's twice as fast.
    Which versions of torch do is not to be asked."""
    capabilities: Mapping[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    if device.type == "cpu" and (dtype != torch.bfloat16 or not capabilities.get("amx_bf16")):
        return False
    x = torch.randn(2048, 64, generator=torch.Generator(device).manual_seed(0), device=device).to(dtype)
    gram = torch.zeros(64, 64, device=device)
    try:
        _add_gram(gram, x, None)
    except (AttributeError, TypeError, RuntimeError):
        return False
    _mirror(gram)
    exact = x.double().t() @ x.double()
    return bool((gram - exact).abs().max() < 1e-5 * exact.abs().max())


def _mirror(held: Tensor) -> None:
    width = _block(held)
    for start in range(0, len(held), width):
        stop = start + width
        held[stop:, start:stop] = held[start:stop, stop:].t()


def quadratic(rows: Tensor, hessian: Tensor) -> Tensor:
    """`d H d^T` [N] of each row d of a matrix [N, K], for a symmetric `hessian` [K, K], of which half is read; or for
    those [G, K, K] of G groups of rows, which may be [G, N / G, K] as well."""
    if hessian.dim() == 3:
        by_group = rows.reshape(len(hessian), -1, rows.shape[-1])
        return (by_group @ hessian).mul_(by_group).sum(-1).reshape(rows.shape[:-1])
    if (width := _block(hessian)) >= len(hessian):
        return (rows @ hessian).mul_(rows).sum(1)
    total = rows.new_zeros(len(rows))
    for start in range(0, len(hessian), width):
        part, rest = rows[:, start : start + width], slice(start + width, None)
        product = part @ hessian[start : start + width, start : start + width]
        product.addmm_(rows[:, rest], hessian[rest, start : start + width], alpha=2)
        total += product.mul_(part).sum(1)
    return total


def _block(held: Tensor) -> int:
    """Columns of a Hessian [K, K] that are worked on at a time: measured on CPUs, a third less time than all at once;
    a GPU is busier with one product."""
    return len(held) if held.is_cuda else max(_LEAST_BLOCK, -(-len(held) // _BLOCKS))


def _add_cross(held: Tensor, x: Tensor, moved: Tensor) -> None:
    add = held.addmm_ if x.dim() == 2 else held.baddbmm_
    add(moved.mT, x)


def _add_rows(held: Tensor, x: Tensor, _: object) -> None:
    count = held.shape[-2]
    held.copy_(keep_rows(torch.cat([held, keep_rows(x, count)], -2), count))


PARTS: dict[str, Part] = {
    "hessian": Part(2, _add_gram, weighs=True),
    "cross": Part(2, _add_cross, weighs=True),
    "mean_shift": Part(1, lambda held, x, moved: held.add_(moved.sum(-2))),
    "mean": Part(1, lambda held, x, _: held.add_(x.sum(-2))),
    "mean_square": Part(1, lambda held, x, _: held.add_(x.square().sum(-2))),
    "mean_abs": Part(1, lambda held, x, _: held.add_(x.abs().sum(-2))),
    "absmax": Part(1, lambda held, x, _: held.copy_(torch.maximum(held, x.abs().amax(-2))), "max"),
    "least": Part(1, lambda held, x, _: held.copy_(torch.minimum(held, x.amin(-2))), "min", torch.inf),
    "greatest": Part(1, lambda held, x, _: held.copy_(torch.maximum(held, x.amax(-2))), "max", -torch.inf),
    "sample": Part(2, _add_rows, "rows", rows=512),
}
"""What an algorithm may declare that it needs of a weight's input."""

AGAINST_FLOAT = frozenset({"cross", "mean_shift"})
"""Those for which the float model runs beside the quantized one."""

MODES = frozenset({"float64", "gradient"})
"""What it may declare besides: that sums are kept in float64, not float32; that in products rows count by how much the
model's loss depends on them."""


class InputStatistics:
    """Sums over the rows of every matrix X [M, K] that a weight is multiplied with; weights with one input share them.

    A weight whose rows fall into G groups, each with an input of its own, has X [G, M, K]: the sums, and what `get`
    gives, then have G in front.

    Args:
        needs: what is gathered, and nothing else: `hessian`, `X^T X` [K, K]; `cross`, `(F - X)^T X` [K, K], F being the
            rows that the float model has where the quantized one has X; `mean_shift` [K], the mean of F - X; of each
            channel [K] `absmax`, its largest magnitude, `least` and `greatest`, its extreme values, `mean`, and
            `mean_square` and `mean_abs`, those of its square and magnitude; `sample`, at most 512 rows drawn at random.
            With `float64` in that precision; with `gradient` rows of `hessian` and `cross` count by the weights that
            come with them.

    Attributes:
        rows: how many rows were seen.
        complete: whether it is what all processes saw.
        factorize: what factorizes the Hessian; another one may know factors of earlier runs.
    """

    def __init__(self, needs: Collection[str] = ("hessian",)) -> None:
        self.needs = frozenset(needs)
        self.dtype = torch.float64 if "float64" in self.needs else torch.float32
        self.rows = 0
        self.complete = False
        self.factorize: Callable[[Tensor, float, bool], Factor | None] = factorize
        self._sums: dict[str, Tensor] = {}
        self._half = False
        self._factors: dict[tuple[float, bool], Factor] = {}

    @property
    def sums(self) -> dict[str, Tensor]:
        """What was gathered, by part; means are not yet divided by the rows."""
        if self._half:
            _mirror(self._sums["hessian"])
            self._half = False
        return self._sums

    def add(self, x: Tensor, reference: Tensor | None = None, batch: int = 0, weights: Tensor | None = None) -> None:
        """Add the rows of `x` [M, K], or [G, M, K], which `batch` brings, and of the float model's `reference`, of the
        same shape, where the cross term is asked for. In products of rows each counts `weights` [M] times."""
        self.start(x.shape[-1], x.device, len(x) if x.dim() == 3 else 1)
        self._factors.clear()
        self.rows += x.shape[-2]
        as_they_are = x.dim() == 2 and self.dtype == torch.float32 and weights is None and _sums_halves(x)
        wide = x if as_they_are and self._sums.keys() == {"hessian"} else x.to(self.dtype)
        moved = None if reference is None or not AGAINST_FLOAT & self.needs else reference.to(self.dtype) - wide
        weighted = wide, moved
        if weights is not None:  # products are of two rows, of which each has the root
            root = weights.to(wide)[:, None].sqrt()
            weighted = wide * root, None if moved is None else moved * root
        for name in self._sums if x.shape[-2] else ():
            if moved is not None or name not in AGAINST_FLOAT:
                given = x if as_they_are and name == "hessian" else wide
                if weights is not None and PARTS[name].weighs:
                    PARTS[name].add(self._sums[name], *weighted)
                else:
                    PARTS[name].add(self._sums[name], numbered(given, batch) if PARTS[name].rows else given, moved)
        self._half |= "hessian" in self._sums and x.dim() == 2

    def start(self, columns: int, device: torch.device, groups: int = 1) -> None:
        """Make the sums, of K `columns` for each of the `groups`, unless they are there."""
        several = (groups,) if groups > 1 else ()
        for name in sorted(self.needs - MODES) if not self._sums else ():  # all processes in one order
            rows, start = PARTS[name].rows, PARTS[name].start
            shape = (*several, *((rows, columns + 1) if rows else (columns,) * PARTS[name].dims))
            self._sums[name] = torch.full(shape, start, dtype=self.dtype, device=device)

    @property
    def groups(self) -> int:
        """How many groups of rows of the weight have an input of their own."""
        return next((len(held) for name, held in self._sums.items() if held.dim() > PARTS[name].dims), 1)

    def group(self, index: int) -> InputStatistics:
        """What was gathered for one of the `groups`, in the same memory."""
        group = InputStatistics(self.needs)  # factors of a group are not kept: a depthwise convolution has thousands
        group.rows, group.complete = self.rows, self.complete
        group._sums = {name: held[index] for name, held in self._sums.items()}
        return group

    def get(self, part: str, where: str) -> Tensor:
        """One of the statistics that were asked for; the Hessian and the cross term as sums, which no M divides.

        Raises `UnusableStatisticsError`, naming the point, where no row was seen, `CalibrationError` for NaN and inf.
        """
        if not self.rows:
            raise UnusableStatisticsError(f"{where}: no calibration token reached this weight")
        value = self.sums[part]
        if PARTS[part].rows:
            value = value[..., : self.rows, :-1]
        if not bool(torch.isfinite(value.sum())):
            raise CalibrationError(f"{where}: the data holds NaN or inf, so its {part} is not finite")
        return value / self.rows if part.startswith("mean") else value

    def factor(self, damp: float, act_order: bool, where: str) -> Factor:
        """The Hessian's factor for one damping and order, computed once for all weights that share the input. Raises
        what `get` does, and `UnusableStatisticsError` when no damping makes it positive definite."""
        key = (damp, act_order)
        if key not in self._factors:
            factor = self.factorize(self.get("hessian", where), damp, act_order)
            if factor is None:
                raise UnusableStatisticsError(f"{where}: its Hessian is not positive definite whatever the damping")
            self._factors[key] = factor
        return self._factors[key]

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """What was gathered, each part by itself with the number of rows."""
        rows = torch.tensor(self.rows)
        return {name: {name: value, "rows": rows} for name, value in self.sums.items()}

    def load(self, parts: Mapping[str, Mapping[str, Tensor]], device: torch.device) -> None:
        """Replace what was gathered by `parts`, as all processes together saw it."""
        self._sums = {name: tensors[name].to(device) for name, tensors in parts.items()}
        self._half = False
        self.rows, self.complete = int(next(iter(parts.values()))["rows"]), True
        self._factors.clear()
