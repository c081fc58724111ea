"""Low-rank repair: two thin matrices beside a rounded weight, which make good the part of its error that costs most.

Liu et al., "EoRA: Fine-tuning-free Compensation for Compressed LLM with Eigenspace Low-Rank Approximation",
arXiv:2410.21271; LQER, arXiv:2402.02446, does the same with the diagonal of H alone. Of all `B A` of rank r it is the
one with the least `|(E - B A) X|^2 = tr((E - B A) H (E - B A)^T)`: with U the first r eigenvectors of `E H E^T`,
`B = U` and `A = U^T E`. The papers' form, the singular vectors of `E Q L^1/2` for `H = Q L Q^T`, gives the same product
and needs the inverse of `L^1/2` besides.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from wrapq.algorithms.base import ALGORITHMS, Correction, Corrector
from wrapq.registry import Options
from wrapq.statistics.input import InputStatistics, quadratic


class LowRankOptions(Options):
    """Options of the repair."""

    rank: int = Field(32, ge=1, description="Of the product; it costs rank * (N + K) numbers for a weight [N, K].")


@ALGORITHMS.register("low_rank")
class LowRank(Corrector):
    """The best repair of a rank in the eyes of the Hessian, for linear layers."""

    adds = "low_rank"
    needs = ("hessian",)
    Options = LowRankOptions
    options: LowRankOptions

    def takes(self, wrapper: str) -> bool:
        return wrapper in ("Linear", "Conv1D")

    def correct(self, weight: Tensor, error: Tensor, where: str, statistics: InputStatistics) -> Correction:
        hessian = statistics.get("hessian", where).double()
        a, b = low_rank(error.double(), hessian, self.options.rank)
        left = error.double() - b @ a
        lost, there = (quadratic(part, hessian).sum() for part in (left, weight.double()))
        report = {"repaired_error": float(lost / there) if there else 0.0}
        return Correction(a=a.float(), b=b.float(), report=report)

    def added_elements(self, shape: tuple[int, int]) -> int:
        return min(self.options.rank, *shape) * sum(shape)


def low_rank(error: Tensor, hessian: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`A` [r, K] and `B` [N, r] with the least `tr((E - B A) H (E - B A)^T)` for `error` E [N, K], `hessian` H [K, K];
    the eigenvectors are those of the smaller of `E H E^T` [N, N] and `R^T E^T E R` [K, K], for `H = R R^T`."""
    rows, columns = error.shape
    rank = min(rank, rows, columns)
    if rows <= columns:
        b = torch.linalg.eigh(error @ hessian @ error.t()).eigenvectors[:, -rank:].flip(1)
    else:
        values, vectors = torch.linalg.eigh(hessian)
        seen = error @ (vectors * values.clamp(min=0).sqrt())  # E R
        right = torch.linalg.eigh(seen.t() @ seen).eigenvectors[:, -rank:].flip(1)
        b = torch.linalg.qr(seen @ right).Q
    return (b.t() @ error).contiguous(), b.contiguous()
