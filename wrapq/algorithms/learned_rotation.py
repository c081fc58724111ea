"""A learned rotation of the residual stream: gradient descent over orthogonal matrices.

Liu et al., "SpinQuant: LLM Quantization with Learned Rotations", arXiv:2405.16406, section 3.3: the loss of the model
with weights and inputs quantized goes down by Cayley SGD (Li et al., "Efficient Riemannian Optimization on the Stiefel
Manifold via the Cayley Transform", arXiv:2002.01113). With the gradient G and `A = G Q^T - Q G^T`, which is skew,
`(I + a/2 A)^-1 (I - a/2 A) Q` is orthogonal again. The loss here is the divergence from the float model, so that few
texts are not learned by heart.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import kl_div
from torch.utils.checkpoint import checkpoint

from wrapq.errors import CalibrationError
from wrapq.graph.blocks import Batch, output_head, output_hidden_states
from wrapq.graph.dataflow import Consumer
from wrapq.graph.head import Head
from wrapq.graph.layers import LayerInfo
from wrapq.graph.rewriter import GraphRewriter
from wrapq.observers.base import observe_tensor
from wrapq.quant.affine import dynamic_fake_quantize
from wrapq.quant.spec import QuantSpec
from wrapq.statistics.transport import rotate_blocks
from wrapq.wrappers.model import Specs
from wrapq.wrappers.wrapper_registry import WRAPPERS

_LENGTH = 0.6  # of the first step, `a |A|`, which falls to zero: measured the best of 0.2, 0.6 and 2 over 50 steps
_JUDGING = 2  # batches by which start and end are compared


def learn_rotation(
    rewriter: GraphRewriter,
    writers: Mapping[str, LayerInfo],
    consumers: Sequence[Consumer],
    blocks: Tensor,
    start: Tensor,
    steps: int,
    keep_ones: bool = False,
) -> tuple[Tensor, Mapping[str, float]]:
    """The orthogonal matrix [D, D], float64, to rotate a residual stream by, and the loss before and after.

    Args:
        rewriter: with the float model, what will be quantized in it, and calibration data.
        writers: what writes the stream, where it is rotated there; without, the inputs of the consumers are, at each
            forward.
        consumers: what reads the stream; no weight of these is tied.
        blocks: int64 [B, D], the channels that are rotated together.
        start: [D, D], where the descent starts; it is the result where the descent ends no lower.
        steps: of the descent; each looks at one batch. Without any batch it raises `CalibrationError`.
        keep_ones: the matrix must leave the vector of ones as it is.
    """
    if not rewriter.batches:
        raise CalibrationError("a rotation is learned from calibration data, and there is none")
    task = _Task(rewriter, writers, consumers, blocks)
    start = rotation = start.to(next(rewriter.model.parameters()).device, torch.double)
    for step in range(steps):
        gradient = task.gradient(rotation, step % len(rewriter.batches))
        rotation = cayley_step(rotation, gradient, _LENGTH * (1 - step / steps), keep_ones)
    before, after = (task.judge(matrix) for matrix in (start, rotation))
    figures = {"loss_before": before, "loss_after": min(before, after)}
    return (rotation if after < before else start), figures


def cayley_step(rotation: Tensor, gradient: Tensor, length: float, keep_ones: bool = False) -> Tensor:
    """One step down `gradient` [D, D] from an orthogonal `rotation` [D, D], to another orthogonal matrix. Its `length`
    is `a |A|`, whatever the scale of the loss, as the sign of the gradient is to AutoRound."""
    eye = torch.eye(len(rotation), dtype=rotation.dtype, device=rotation.device)
    skew = gradient.to(rotation) @ rotation.t()
    skew = skew - skew.t()
    if keep_ones:  # a skew matrix that takes the ones to zero turns only what is orthogonal to them
        plain = eye - torch.full_like(eye, 1 / len(eye))
        skew = plain @ skew @ plain
    step = length / max(float(skew.norm()), torch.finfo(torch.float).tiny)
    return torch.linalg.solve(eye + step / 2 * skew, (eye - step / 2 * skew) @ rotation)


class _Task:
    """The loss of the quantized model with a rotated stream, as a function of the matrix."""

    def __init__(
        self, rewriter: GraphRewriter, writers: Mapping[str, LayerInfo], consumers: Sequence[Consumer], blocks: Tensor
    ) -> None:
        self.model, self.specs, self.batches, self.blocks = rewriter.model, rewriter.specs, rewriter.batches, blocks
        self._axes: list[tuple[str, str, int]] = []
        """Each parameter that the matrix rotates, and along which axis."""
        self._turned = () if writers else tuple(consumer.module for consumer in consumers)
        """The modules whose inputs the matrix rotates."""
        for name, layer in writers.items():
            if layer.produces is not None:
                self._axes += [(name, *output) for output in layer.produces.outputs(self.model.get_submodule(name))]
        for consumer in consumers:
            self._axes.append((consumer.module, consumer.layout.parameter, consumer.layout.in_axis))
        self._steps = _Steps(self.model, self.batches[0])
        with torch.no_grad():
            self._floats = {i: self._steps("hidden", batch) for i, batch in enumerate(self.batches[:_JUDGING])}

    @torch.no_grad()
    def judge(self, rotation: Tensor) -> float:
        """The mean loss of the first batches."""
        losses = [float(self._loss(i, rotation.float())) for i in range(len(self._floats))]
        return sum(losses) / len(losses)

    @torch.enable_grad()
    def gradient(self, rotation: Tensor, index: int) -> Tensor:
        """That of the loss of one batch, [D, D]."""
        matrix = rotation.float().requires_grad_()
        return torch.autograd.grad(self._loss(index, matrix), matrix)[0]

    def _loss(self, index: int, matrix: Tensor) -> Tensor:
        """The divergence of the quantized model from the float one, in nats per token."""
        batch, weights = self.batches[index], self._weights(matrix)
        with torch.no_grad():
            reference = self._floats[index] if index in self._floats else self._steps("hidden", batch)
        hidden = self._quantized(weights, matrix, "hidden", batch)

        def lost(part: slice) -> Tensor:
            with torch.no_grad():
                expected = self._steps("log_probabilities", reference, part)
            found = self._quantized(weights, matrix, "log_probabilities", hidden, part)
            divergence = kl_div(found, expected, log_target=True, reduction="none").sum(-1)
            return (divergence if batch.mask is None else divergence[batch.mask[:, part].bool()]).flatten()

        # logits are made again on the way back: those of all positions would be many times the model
        again = partial(checkpoint, lost, use_reentrant=False, preserve_rng_state=False)
        return torch.cat([again(part) for part in self._steps.parts(batch)]).mean()

    def _quantized(self, weights: Mapping[str, Tensor], matrix: Tensor, *args: Any) -> Any:
        """A step of the quantized model."""
        named = {f"model.{name}": weight for name, weight in weights.items()}
        with _rotated_inputs(self.model, self._turned, self.blocks, matrix), _rounded_inputs(self.model, self.specs):
            return functional_call(self._steps, named, args)

    def _weights(self, matrix: Tensor) -> dict[str, Tensor]:
        """Every rotated or quantized parameter for `matrix`, with straight-through gradients."""
        weights: dict[str, Tensor] = {}
        for name, parameter, axis in self._axes:
            held, key = self.model.get_submodule(name).get_parameter(parameter), f"{name}.{parameter}"
            weights[key] = rotate_blocks(weights.get(key, held.detach()), axis, self.blocks, matrix)
        for name, points in self.specs.items():
            module, spec = self.model.get_submodule(name), points.get("weight")
            wrapper = WRAPPERS.find(module)
            if spec is not None and wrapper is not None and wrapper.multiplies(module):
                weight = weights.get(f"{name}.weight", module._parameters["weight"].detach())  # type: ignore[union-attr]
                rounded = _straight_through(wrapper.to_matrix(weight), spec, name)
                weights[f"{name}.weight"] = wrapper.from_matrix(rounded, weight.shape)
        return weights


class _Steps(nn.Module):
    """A forward in two steps, so that the logits of a language model are made a part of the positions at a time."""

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        super().__init__()
        has_logits = output_head(model) is not None and "input_ids" in batch.inputs
        self.model, self._head = model, Head(model) if has_logits else None

    def forward(self, step: str, *args: Any) -> Any:
        return getattr(self, step)(*args)

    def parts(self, batch: Batch) -> Iterable[slice]:
        return [slice(None)] if self._head is None else self._head.parts(batch.inputs["input_ids"].shape)

    def hidden(self, batch: Batch) -> Any:
        if self._head is None:
            return self.model(**batch.inputs)
        return self._head.hidden(batch.inputs["input_ids"], batch.inputs.get("attention_mask"))

    def log_probabilities(self, hidden: Any, part: slice) -> Tensor:
        logits = output_hidden_states(hidden) if self._head is None else self._head.logits(hidden, part)
        return logits.float().log_softmax(-1)


@contextmanager
def _rotated_inputs(model: nn.Module, names: Sequence[str], blocks: Tensor, matrix: Tensor) -> Iterator[None]:
    """While this holds, the modules of `names` rotate their inputs."""

    def rotate_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (rotate_blocks(args[0], -1, blocks, matrix), *args[1:])

    with ExitStack() as hooks:
        for name in names:
            hooks.callback(model.get_submodule(name).register_forward_pre_hook(rotate_input).remove)
        yield


@contextmanager
def _rounded_inputs(model: nn.Module, specs: Specs) -> Iterator[None]:
    """While this holds, modules round their inputs, static ones to the range of the batch."""

    def round_input(spec: QuantSpec, name: str, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_straight_through(args[0], spec, name), *args[1:])

    with ExitStack() as hooks:
        for name, points in specs.items():
            if "input" in points:
                hook = partial(round_input, points["input"], name)
                hooks.callback(model.get_submodule(name).register_forward_pre_hook(hook).remove)
        yield


def _straight_through(x: Tensor, spec: QuantSpec, name: str) -> Tensor:
    """`x` on the grid of `spec`, with the gradient of `x`."""
    given = x.detach()
    qparams = None if spec.dynamic else observe_tensor(given, spec, name)
    return x + ((qparams.fake_quantize(given) if qparams else dynamic_fake_quantize(given, spec)) - given)
