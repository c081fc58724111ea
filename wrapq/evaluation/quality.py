"""How good a quantized model is: perplexity, divergence from the float model, agreement, error per layer.

Everything is accumulated in float64 tensors on the device of the inputs: nothing waits for the device before `result`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from wrapq.errors import CalibrationError
from wrapq.metrics import SQNR_CEILING, metrics

PIECE = {"cpu": 1 << 18}  # logits worked on at once
GPU_PIECE = 1 << 25


class QualityMeter:
    """Quality over batches of logits. The method is next-token prediction inside each window: in a window of T tokens,
    tokens 2 to T are each predicted from the ones before them in that window, T-1 predictions in all.

    Args:
        rows: how many positions are worked on at once; float32 memory is about 4 * rows * vocabulary * 4 bytes. The
            default keeps a piece within a CPU's cache (measured three times faster than large ones), and fills a GPU.
    """

    def __init__(self, rows: int | None = None) -> None:
        self.rows = rows
        self._sums: Tensor | None = None  # float64 [4]: nll, predictions, kl, agreements
        self._reference: bool | None = None

    @torch.no_grad()
    def update(self, reference: Tensor | None, logits: Tensor, input_ids: Tensor, mask: Tensor | None = None) -> None:
        """Add one batch.

        Args:
            reference: logits of the float model [B, T, V], or None when there is nothing to compare with.
            logits: logits of the model to judge [B, T, V].
            input_ids: [B, T].
            mask: bool [B, T], True where the prediction made there counts; None: everywhere.

        Raises:
            ValueError: the shapes do not belong together, or only some batches have a reference.
        """
        if logits.shape[:2] != input_ids.shape or (reference is not None and reference.shape != logits.shape):
            raise ValueError(f"logits {tuple(logits.shape)} do not belong to input_ids {tuple(input_ids.shape)}")
        if self._reference not in (None, reference is not None):
            raise ValueError("either every batch has reference logits or none has")
        self._reference = reference is not None
        if self._sums is None:
            self._sums = torch.zeros(4, dtype=torch.float64, device=logits.device)
        rows = self.rows or max(1, PIECE.get(logits.device.type, GPU_PIECE) // logits.shape[-1])
        count, length = input_ids.shape
        for row, start in product(range(count), range(0, length - 1, rows)):
            part = slice(start, min(start + rows, length - 1))
            after = slice(part.start + 1, part.stop + 1)
            real = None if mask is None else mask[row, part].bool()
            target = input_ids[row, after].to(logits.device)
            self._sums += _sums(None if reference is None else reference[row, part], logits[row, part], target, real)

    def result(self) -> dict[str, float]:
        """`perplexity`, `nll` (nats per token), `tokens` (predictions), and with a reference `kl` and `top1_agreement`.

        `kl` is the mean over predictions of KL(reference || model) in nats. Raises `CalibrationError` when no token
        was predicted.
        """
        nll, count, kl, agreed = [0.0] * 4 if self._sums is None else self._sums.tolist()
        if not count:
            raise CalibrationError("evaluation: no token to predict (empty text, or all of it padding)")
        mean = nll / count
        perplexity = math.exp(mean) if mean < 700 else math.nan if math.isnan(mean) else math.inf
        found = {"perplexity": perplexity, "nll": mean, "tokens": count}
        return found | {"kl": kl / count, "top1_agreement": agreed / count} if self._reference else found


class StageMeter:
    """All metrics of `wrapq.metrics` that are measured on logits, those of plug-ins included; `against_float` where
    there are logits of the float model to compare with."""

    def __init__(self, against_float: bool) -> None:
        rows = [metric for metric in metrics() if against_float or not metric.against_float]
        self._meters = [make() for make in dict.fromkeys(metric.meter for metric in rows) if make]

    @torch.no_grad()
    def update(self, reference: Tensor | None, logits: Tensor, input_ids: Tensor, mask: Tensor | None = None) -> None:
        for meter in self._meters:
            meter.update(reference, logits, input_ids, mask)

    def result(self) -> dict[str, float]:
        return {name: float(value) for meter in self._meters for name, value in meter.result().items()}


@dataclass(frozen=True)
class LayerError:
    """How far a layer's output is from the float model's.

    Attributes:
        relative_error: |reference - x| / |reference|, 2-norms over everything seen.
        sqnr_db: signal to quantization noise, 10 log10(|reference|^2 / |reference - x|^2); inf when equal.
        cosine: of the angle between the two, 1 when parallel.
    """

    relative_error: float
    sqnr_db: float
    cosine: float


class LayerErrorMeter:
    """Error per layer over batches; layers keep the order in which they were first seen."""

    def __init__(self) -> None:
        self._sums: dict[Hashable, Tensor] = {}

    @torch.no_grad()
    def update(self, layer: Hashable, reference: Tensor, x: Tensor, mask: Tensor | None = None) -> None:
        """Add one batch of outputs [B, T, ...] of `layer`; positions where `mask` [B, T] is False do not count."""
        sums = _error_sums(reference, x, mask)
        self._sums[layer] = self._sums[layer] + sums if layer in self._sums else sums

    def result(self) -> dict[Hashable, LayerError]:
        """The error of each layer."""
        return {layer: _layer_error(*sums.tolist()) for layer, sums in self._sums.items()}

    def curves(self, prefix: str = "") -> dict[str, list[float]]:
        """The same as three curves over the layers, for a tracker: sqnr_db is kept within +-`SQNR_CEILING`."""
        rows = list(self.result().values())
        return {
            f"{prefix}relative_error": [row.relative_error for row in rows],
            f"{prefix}sqnr_db": [max(-SQNR_CEILING, min(SQNR_CEILING, row.sqnr_db)) for row in rows],
            f"{prefix}cosine": [row.cosine for row in rows],
        }


def _sums(reference: Tensor | None, logits: Tensor, target: Tensor, real: Tensor | None) -> Tensor:
    """float64 [4] of logits [R, V] and targets [R]: nll, predictions, KL and agreements summed over real rows."""
    log_q = logits.float().log_softmax(-1)
    nll = -log_q.gather(-1, target[:, None])[:, 0]
    kl = agreed = torch.zeros_like(nll)
    if reference is not None:
        log_p = reference.to(logits.device).float().log_softmax(-1)
        agreed = (log_p.argmax(-1) == log_q.argmax(-1)).float()
        p = log_p.exp()
        kl = (p * log_p.sub_(log_q).masked_fill_(p == 0, 0)).sum(-1)  # a word of probability 0 adds 0, not nan
    columns = torch.stack([nll, torch.ones_like(nll), kl, agreed])  # [4, R]
    if real is not None:
        columns = torch.where(real.to(logits.device), columns, 0)
    return columns.sum(-1, dtype=torch.float64)


def _error_sums(reference: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
    """float64 [4]: |reference|^2, |reference - x|^2, |x|^2 and their inner product."""
    if reference.shape != x.shape:
        raise ValueError(f"reference {tuple(reference.shape)} and x {tuple(x.shape)} differ in shape")
    ref, got = reference.detach().float(), x.detach().to(reference.device).float()
    if mask is not None:
        real = mask.bool().to(ref.device).reshape(*mask.shape, *[1] * (ref.dim() - mask.dim()))
        ref, got = torch.where(real, ref, 0), torch.where(real, got, 0)
    noise = ref - got
    pairs = (ref, ref), (noise, noise), (got, got), (ref, got)
    return torch.stack([(a * b).sum(dtype=torch.float64) for a, b in pairs])


def _layer_error(signal: float, noise: float, power: float, inner: float) -> LayerError:
    if math.isnan(noise) or math.isnan(signal):
        return LayerError(math.nan, math.nan, math.nan)
    if noise == 0:
        return LayerError(0.0, math.inf, 1.0)
    if signal == 0:
        return LayerError(math.inf, -math.inf, 0.0)
    cosine = inner / math.sqrt(signal * power) if power else 0.0
    return LayerError(math.sqrt(noise / signal), 10 * math.log10(signal / noise), cosine)
