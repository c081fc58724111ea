"""Ranges chosen by the error they cause in the layer's output.

For an error `D = Q(W) - W` and the Hessian `H = X^T X` of what the weight is multiplied with, the squared error of the
output is `tr(D H D^T)`, so that candidates are compared without running the model. The candidates are those of SeqMSE
as in AIMET: the whole range of the weights, shrunk step by step.
"""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from wrapq.calibration.algorithm import ALGORITHMS, Rounded, Rounder
from wrapq.calibration.hessian import Hessian
from wrapq.errors import CalibrationError
from wrapq.observers.base import checked_qparams
from wrapq.quant.affine import reduce_range, split_groups
from wrapq.quant.qparams import QParams
from wrapq.quant.spec import QuantSpec


class SeqMSEOptions(BaseModel):
    """Options of SeqMSE."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    candidates: int = Field(20, ge=1, description="How many ranges are tried.")
    smallest: float = Field(0.4, gt=0, le=1, description="The smallest one, relative to the range of the weights.")


@ALGORITHMS.register("seqmse")
class SeqMSE(Rounder):
    """Rounding to nearest in the ranges that cost the layer's output least."""

    Options = SeqMSEOptions
    options: SeqMSEOptions

    @property
    def needs(self) -> tuple[str, ...]:
        """See `Algorithm.needs`."""
        return ("hessian",)

    def round(self, weight: Tensor, spec: QuantSpec, where: str, hessian: Hessian | None = None) -> Rounded:
        """See `Rounder.round`."""
        matrix = (hessian or Hessian()).check(where)
        qparams = search_ranges(weight, spec, matrix, where, self.options.candidates, self.options.smallest)
        return Rounded(qparams.quantize(weight), qparams)


def search_ranges(
    weight: Tensor, spec: QuantSpec, hessian: Tensor, where: str, candidates: int = 20, smallest: float = 0.4
) -> QParams:
    """For each scale of `weight` [N, K] the range, among `candidates`, with the least output error under `hessian`
    [K, K].

    Groups are judged one by one, by their own block of the Hessian.

    Raises:
        CalibrationError: NaN or infinity in the weight, or a granularity other than tensor, channel of axis 0 or group.
    """
    if spec.granularity not in ("tensor", "channel", "group") or spec.axis not in (None, 0):
        raise CalibrationError(f"{where}: {spec} has no ranges of its own that a Hessian could judge")
    low, high = reduce_range(weight, spec)
    best = checked_qparams(low, high, spec, where)
    least = output_error(best.fake_quantize(weight) - weight, hessian, spec)
    chosen = torch.ones_like(low)
    for factor in torch.linspace(1, smallest, candidates)[1:].tolist():
        tried = checked_qparams(low * factor, high * factor, spec, where)
        error = output_error(tried.fake_quantize(weight) - weight, hessian, spec)
        better = error < least
        least, chosen = torch.where(better, error, least), torch.where(better, factor, chosen)
    return checked_qparams(low * chosen, high * chosen, spec, where)


def output_error(difference: Tensor, hessian: Tensor, spec: QuantSpec) -> Tensor:
    """`d H d^T` of each scale's part of `difference` [N, K], shaped like the scale."""
    if spec.granularity != "group":
        rows = ((difference @ hessian) * difference).sum(1, keepdim=True)
        return rows if spec.granularity == "channel" else rows.sum().reshape(1)
    parts = split_groups(difference, spec).transpose(0, 1)  # [G, N, g]
    groups, size = len(parts), parts.shape[-1]
    blocks = hessian.unflatten(0, (groups, size)).unflatten(2, (groups, size)).diagonal(dim1=0, dim2=2)  # [g, g, G]
    return ((parts @ blocks.permute(2, 0, 1)) * parts).sum(-1).t()
