"""The range whose quantized histogram tells most of the float one."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from wrapq.observers.base import OBSERVERS, scale_rows
from wrapq.observers.histogram import HistogramObserver, HistogramOptions
from wrapq.quant.affine import reduce_range, scale_shape
from wrapq.quant.spec import QuantSpec

_CHUNK = 4096
"""Rows of a tensor at hand that are searched at once: their histograms fill memory before their elements do."""


class EntropyOptions(HistogramOptions):
    """Options of `entropy`: so many `candidates` are tried between the number of codes and the whole range."""

    candidates: int = Field(128, ge=2, strict=True, description="at least 2")


@OBSERVERS.register("entropy")
class Entropy(HistogramObserver):
    """The range `[-t, t]`, cut to the data's, that minimises the Kullback-Leibler divergence of TensorRT's calibration.

    Migacz, "8-bit Inference with TensorRT", GTC 2017; onnxruntime's entropy calibration does the same. For each
    threshold t the reference P is the histogram up to t with all that lies beyond in its end bins; Q is the histogram
    up to t merged into as many equal parts as the dtype has codes, each part spread evenly over its bins that are not
    empty. The least KL(P || Q) wins, the widest of equals. With more codes than bins Q is P and nothing is cut.

    Meant for activations of 8 bits whose tail does not matter, as those of convolutional networks. The few large
    activations of language models do matter, and it cuts them: there, and on weights, `mse` is the better choice.
    """

    Options = EntropyOptions
    options: EntropyOptions

    def chosen(self, counts: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
        low, high = self.bounds()
        threshold = best_threshold(counts, 1 << self.spec.dtype.bits, self.options.candidates)
        limit = (threshold * width.squeeze(-1)).reshape(low.shape)
        return low.clamp(-limit, limit), high.clamp(-limit, limit)

    def tensor_range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows, shape = scale_rows(x, self.spec), scale_shape(x.shape, self.spec)
        if not bool(torch.isfinite(rows).all()):
            return reduce_range(x, self.spec)
        plain = QuantSpec(self.spec.dtype, "channel", symmetric=self.spec.symmetric)
        options, found = self.options.model_copy(update={"bins": self.bins}), []
        for part in rows.split(_CHUNK):
            observer = Entropy(plain, options)
            observer.update(part)
            found.append(torch.stack(observer.range()))
        low, high = torch.cat(found, dim=1)
        return low.reshape(shape), high.reshape(shape)


def best_threshold(counts: Tensor, levels: int, candidates: int) -> Tensor:
    """For each row of counts [R, 2n - 1] the threshold, in bin widths, with the least divergence."""
    bins = (counts.shape[-1] + 1) // 2
    first = (levels + 2) // 2  # the fewest bins to a side that are more than the codes
    best = torch.full((counts.shape[0],), float(bins), device=counts.device)
    if first >= bins:
        return best
    least = divergence(counts, bins, levels)
    for side in sorted({round(v) for v in torch.linspace(first, bins, candidates).tolist()} - {bins}, reverse=True):
        found = divergence(counts, side, levels)
        best, least = torch.where(found < least, float(side), best), torch.minimum(found, least)
    return best


def divergence(counts: Tensor, side: int, levels: int) -> Tensor:
    """KL(P || Q) of each row [R] of counts [R, 2n - 1] for the threshold of `side` bin widths."""
    bins = (counts.shape[-1] + 1) // 2
    kept = counts[:, bins - side : bins + side - 1].float()
    reference = kept.clone()
    reference[:, 0] += counts[:, : bins - side].sum(-1)
    reference[:, -1] += counts[:, bins + side - 1 :].sum(-1)
    part = torch.arange(kept.shape[1], device=counts.device) * levels // kept.shape[1]
    filled = (reference > 0).float()  # an end bin that only the tail fills has its share of Q
    sums, sizes = (
        torch.zeros(len(counts), levels, device=counts.device).index_add_(1, part, v) for v in (kept, filled)
    )
    spread = (sums / sizes.clamp(min=1))[:, part] * filled
    p = reference / reference.sum(-1, keepdim=True)
    q = spread / spread.sum(-1, keepdim=True).clamp(min=1e-30)
    # an end bin whose part of Q is empty would make the divergence infinite: this, as onnxruntime, smooths such bins
    return (p * (p.clamp(min=1e-30) / q.clamp(min=1e-9)).log()).sum(-1)
