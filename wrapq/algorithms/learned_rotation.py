"""A rotation of the residual stream that is learned: gradient descent over orthogonal matrices.

Liu et al., "SpinQuant: LLM Quantization with Learned Rotations", arXiv:2405.16406, section 3.3: the loss of the model
with weights and inputs quantized goes down by Cayley SGD (Li et al., "Efficient Riemannian Optimization on the Stiefel
Manifold via the Cayley Transform", arXiv:2002.01113). With the gradient G and `A = G Q^T - Q G^T`, which is skew,
`(I + a/2 A)^-1 (I - a/2 A) Q` is orthogonal again. The loss here is the divergence from the float model, so that few
texts are not learned by heart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import kl_div

from wrapq.calibration.blockwise import leaving
from wrapq.calibration.forward import Batch
from wrapq.calibration.graph import Stream
from wrapq.calibration.surgery import Surgeon
from wrapq.calibration.transport import turned
from wrapq.errors import CalibrationError
from wrapq.observers.base import observe_tensor
from wrapq.quant.affine import dynamic_fake_quantize
from wrapq.quant.spec import QuantSpec
from wrapq.wrappers.model import Specs
from wrapq.wrappers.registry import WRAPPERS

_LENGTH = 0.6  # of the first step, `a |A|`, which falls to zero: measured the best of 0.2, 0.6 and 2 over 50 steps
_JUDGING = 2  # batches by which start and end are compared


def learn_rotation(
    surgeon: Surgeon, stream: Stream, blocks: Tensor, start: Tensor, keep_ones: bool, steps: int
) -> tuple[Tensor, Mapping[str, float]]:
    """The orthogonal matrix [D, D], float64, that a stream is turned by, and the loss before and after.

    Args:
        surgeon: with the float model, what will be quantized in it, and calibration data.
        stream: whose writers and readers it turns; their weights are their own.
        blocks: int64 [B, D], the channels that are turned together.
        start: [D, D], where the descent starts; it is the result where the descent ends no lower.
        keep_ones: the matrix must leave the vector of ones as it is.
        steps: of the descent; each looks at one batch.

    Raises:
        CalibrationError: there is no data to learn from.
    """
    if not surgeon.batches:
        raise CalibrationError("a rotation is learned from calibration data, and there is none")
    task = _Task(surgeon, stream, blocks)
    start = rotation = start.to(next(surgeon.model.parameters()).device, torch.double)
    for step in range(steps):
        gradient = task.gradient(rotation, step % len(surgeon.batches))
        rotation = cayley_step(rotation, gradient, _LENGTH * (1 - step / steps), keep_ones)
    before, after = (task.judge(matrix) for matrix in (start, rotation))
    figures = {"loss_before": before, "loss_after": min(before, after)}
    return (rotation if after < before else start), figures


def cayley_step(rotation: Tensor, gradient: Tensor, length: float, keep_ones: bool = False) -> Tensor:
    """One step down `gradient` [D, D] from an orthogonal `rotation` [D, D], to another orthogonal matrix.

    Its `length` is `a |A|`, whatever the scale of the loss, as the sign of the gradient is to AutoRound.
    """
    eye = torch.eye(len(rotation), dtype=rotation.dtype, device=rotation.device)
    skew = gradient.to(rotation) @ rotation.t()
    skew = skew - skew.t()
    if keep_ones:  # a skew matrix that takes the ones to zero turns only what is orthogonal to them
        plain = eye - torch.full_like(eye, 1 / len(eye))
        skew = plain @ skew @ plain
    step = length / max(float(skew.norm()), torch.finfo(torch.float).tiny)
    return torch.linalg.solve(eye + step / 2 * skew, (eye - step / 2 * skew) @ rotation)


class _Task:
    """The model with a turned stream, quantized, as a function of the matrix."""

    def __init__(self, surgeon: Surgeon, stream: Stream, blocks: Tensor) -> None:
        self.model, self.specs, self.batches, self.blocks = surgeon.model, surgeon.specs, surgeon.batches, blocks
        self._axes: list[tuple[str, str, int]] = []
        """Each parameter that the matrix turns, and along which axis."""
        for name, leaf in zip(stream.writers, stream.leaves, strict=True):
            if leaf.writes is not None:
                self._axes += [(name, leaf.writes.parameter, leaf.writes.rows), (name, str(leaf.writes.bias), -1)]
        for reader in (r for norm in stream.norms for r in surgeon.graph.by_producer[norm].readers):
            if reader.leaf.reads is not None:
                self._axes.append((reader.module, reader.leaf.reads.parameter, int(reader.leaf.reads.columns or 0)))
        with torch.no_grad():
            self._floats = {i: self._log_probabilities(b, {}) for i, b in enumerate(self.batches[:_JUDGING])}

    @torch.no_grad()
    def judge(self, rotation: Tensor) -> float:
        """The mean loss of the first batches."""
        weights = self._weights(rotation.float())
        losses = [float(self._loss(i, weights)) for i in range(len(self._floats))]
        return sum(losses) / len(losses)

    @torch.enable_grad()
    def gradient(self, rotation: Tensor, index: int) -> Tensor:
        """That of the loss of one batch, [D, D]."""
        matrix = rotation.float().requires_grad_()
        return torch.autograd.grad(self._loss(index, self._weights(matrix)), matrix)[0]

    def _loss(self, index: int, weights: dict[str, Tensor]) -> Tensor:
        """The divergence of the quantized model from the float one, in nats per token."""
        batch, kept = self.batches[index], self._floats.get(index)
        with torch.no_grad():
            reference = self._log_probabilities(batch, {}) if kept is None else kept
        with _rounded_inputs(self.model, self.specs):
            ours = self._log_probabilities(batch, weights)
        divergence = kl_div(ours, reference, log_target=True, reduction="none").sum(-1)
        return divergence.mean() if batch.mask is None else divergence[batch.mask.bool()].mean()

    def _log_probabilities(self, batch: Batch, weights: dict[str, Tensor]) -> Tensor:
        return leaving(functional_call(self.model, weights, (), dict(batch.inputs))).float().log_softmax(-1)

    def _weights(self, matrix: Tensor) -> dict[str, Tensor]:
        """Every parameter that is turned or quantized, as it then is; gradients pass straight through rounding."""
        found: dict[str, Tensor] = {}
        for name, parameter, axis in self._axes:
            held, key = self.model.get_submodule(name)._parameters.get(parameter), f"{name}.{parameter}"
            if held is not None:
                found[key] = turned(found.get(key, held.detach()), axis, self.blocks, matrix)
        for name, points in self.specs.items():
            module, spec = self.model.get_submodule(name), points.get("weight")
            wrapper = WRAPPERS.find(module)
            if spec is not None and wrapper is not None and wrapper.multiplies(module):
                weight = found.get(f"{name}.weight", module._parameters["weight"].detach())  # type: ignore[union-attr]
                rounded = _straight(wrapper.to_matrix(weight), spec, name)
                found[f"{name}.weight"] = wrapper.from_matrix(rounded, weight.shape)
        return found


@contextmanager
def _rounded_inputs(model: nn.Module, specs: Specs) -> Iterator[None]:
    """While this holds, modules round their inputs, static ones to the range of the batch."""
    inputs = {name: points["input"] for name, points in specs.items() if "input" in points}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(partial(_round_input, spec, name))
        for name, spec in inputs.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _round_input(spec: QuantSpec, name: str, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (_straight(args[0], spec, name), *args[1:])


def _straight(x: Tensor, spec: QuantSpec, name: str) -> Tensor:
    """`x` on the grid of `spec`, with the gradient of `x`."""
    given = x.detach()
    if spec.dynamic:
        return x + (dynamic_fake_quantize(given, spec) - given)
    return x + (observe_tensor(given, spec, name).fake_quantize(given) - given)
