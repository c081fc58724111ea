"""One quantization point of one module, and its lifecycle."""

from __future__ import annotations

import enum
from collections.abc import Callable
from functools import partial
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from wrapq.errors import LifecycleError, SpecError
from wrapq.observers.base import InputConsumer, Observer, make_observer
from wrapq.observers.forward_context import forward_context
from wrapq.quant.affine import dynamic_fake_quantize
from wrapq.quant.qparams import QParams
from wrapq.quant.spec import QuantSpec
from wrapq.quant.straight_through import straight_through
from wrapq.runtime.prefix import current_prefix, outside_prefix


class State(enum.Enum):
    """Where a quantization point stands: it passes tensors on, it also observes them, or it quantizes them."""

    FLOAT = "float"
    OBSERVING = "observing"
    QUANTIZED = "quantized"


class Quantizer(nn.Module):
    """A quantization point: a spec, an observer while it observes, parameters once it is quantized.

    The parameters are persistent buffers: a state dict saved and loaded gives the same outputs to the bit.

    Attributes:
        spec: how the point is quantized.
        where: the point's full name in the model, for messages: `model.layers.0.mlp.down_proj.input`.
        consumer: what multiplies the tensor of the point; None where no weight does.
        enabled: False lets a quantized point pass its tensor on unchanged, to measure what it costs.
        report: what the observer had to say of its choice, by name; the error of each observer where several compete.
    """

    kept: ClassVar[tuple[str, ...]] = ("scale", "zero_point", "permutation", "global_scale", "dynamic")
    """The buffers; `dynamic` is true in a dynamic point that quantizes, which a state dict could not tell otherwise."""
    scale: Tensor | None
    zero_point: Tensor | None
    permutation: Tensor | None
    global_scale: Tensor | None
    dynamic: Tensor | None

    def __init__(self, spec: QuantSpec, where: str) -> None:
        super().__init__()
        self.spec, self.where, self.enabled = spec, where, True
        self.state = State.FLOAT
        self.observer: Observer | None = None
        self.consumer: InputConsumer | None = None
        self.report: dict[str, dict[str, float]] = {}
        for name in self.kept:
            self.register_buffer(name, None)

    @property
    def qparams(self) -> QParams:
        """The parameters; raises `LifecycleError` naming the point where there are none yet."""
        if self.scale is None:
            raise LifecycleError(f"{self.where} has no quantization parameters: it is {self.state.value}")
        return QParams(self.spec, self.scale, self.zero_point, self.permutation, self.global_scale)

    def observe(self) -> None:
        """Start anew: forget parameters and observations, and observe from here on."""
        for name in self.kept:
            setattr(self, name, None)
        self.observer = None if self.spec.dynamic else make_observer(self.spec)
        if self.observer is not None:
            self.observer.consumer = self.consumer
        self.state = State.OBSERVING

    def set_qparams(self, qparams: QParams) -> None:
        """Fix the parameters and quantize from here on."""
        self.scale, self.zero_point, self.permutation = qparams.scale, qparams.zero_point, qparams.permutation
        self.global_scale = qparams.global_scale
        if self.observer is not None and not self.observer.empty:
            self.report = self.observer.report()
        self.observer, self.state = None, State.QUANTIZED

    def check(self) -> None:
        """Raise `LifecycleError`, naming the point, unless `freeze` has what it needs."""
        if self.state is State.FLOAT:
            raise LifecycleError(f"{self.where} has not been observing: prepare the model first")
        if self.state is State.OBSERVING and self.observer is not None and self.observer.empty:
            remedy = "run calibration batches through the model before converting it, or leave the point out"
            raise LifecycleError(f"{self.where} ({self.spec}) saw no data: {remedy}")

    def freeze(self) -> None:
        """Turn what was observed into parameters and quantize from here on; raises `LifecycleError` as `check`, and
        `CalibrationError` when NaN or infinity was seen."""
        self.check()
        if self.state is State.OBSERVING and self.spec.dynamic:
            self.dynamic, self.state = torch.tensor(True), State.QUANTIZED
        elif self.state is State.OBSERVING:
            self.set_qparams(cast(Observer, self.observer).qparams(self.where))

    def forward(self, x: Tensor, token_dim: int = 1) -> Tensor:
        """`x` [..., K] observed or quantized, as the state says; tokens lie along `token_dim`. Raises `SpecError` for
        granularity head and a tensor whose heads do not lie before its tokens, [B, H, T, D]."""
        if self.spec.granularity == "head" and (x.dim() != 4 or token_dim != 2):
            raise SpecError(f"{self.where}: {self.spec} is for query, key, value, scores and probs of an attention")
        calibration = forward_context().calibration
        if self.state is State.OBSERVING and not self.spec.dynamic:
            real = real_tokens(x.detach(), token_dim)
            if calibration is None:
                observer = cast(Observer, self.observer)
                observer.update(real)
                observer.batch += 1
            else:
                calibration.on_activation(self, real)
        if self.state is not State.QUANTIZED or not self.enabled or not (calibration is None or calibration.quantizes):
            return x
        return straight_through(x, partial(outside_prefix, quantize=self._quantized, token_dim=token_dim))

    def _quantized(self, x: Tensor) -> Tensor:
        return dynamic_fake_quantize(x, self.spec) if self.spec.dynamic else self.qparams.fake_quantize(x)

    def extra_repr(self) -> str:
        return f"{self.spec}, {self.state.value}"

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        # buffers that are still None would be reported as unexpected keys
        for name in self.kept:
            if (saved := state_dict.get(prefix + name)) is not None and getattr(self, name) is None:
                setattr(self, name, torch.empty_like(saved))
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.scale is not None or self.dynamic is not None:
            self.observer, self.state = None, State.QUANTIZED


_ROUNDED = ("integers", "bias", "lora_a", "lora_b")


class WeightQuantizer(Quantizer):
    """The weight point: holds the integers that a rounding algorithm chose, beside the float weight it leaves alone.

    Attributes:
        integers: [N, K], once it is rounded.
        bias: [N], what a correction adds to the module's bias; None without one.
        lora_a, lora_b: the factors [r, K] and [N, r] of what a correction adds to the weight; None without one.
        dequantized: the weight [N, K] they stand for, while it is kept.
    """

    kept = (*Quantizer.kept, *_ROUNDED)
    integers: Tensor | None
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None

    def __init__(self, spec: QuantSpec, where: str) -> None:
        super().__init__(spec, where)
        self.dequantized: Tensor | None = None

    def observe(self) -> None:
        super().observe()
        self.observer = self.dequantized = None

    def freeze(self) -> None:
        self.check()

    def set_rounded(self, integers: Tensor, qparams: QParams) -> None:
        """Take `integers` [N, K] in the grid of `qparams` as the quantized weight."""
        self.integers, self.dequantized = integers, None
        self.set_qparams(qparams)

    def correct(self, bias: Tensor | None, a: Tensor | None, b: Tensor | None) -> None:
        """Add to the module's output `bias` [N], and `x A^T B^T` for `a` [r, K] and `b` [N, r], where given."""
        self.bias = bias if bias is not None else self.bias
        self.lora_a, self.lora_b = (a, b) if a is not None else (self.lora_a, self.lora_b)

    def repaired_matrix(self) -> Tensor:
        """What the input is multiplied with in all, float32 [N, K]: the dequantized weight and its low-rank repair."""
        matrix = self.qparams.dequantize(cast(Tensor, self.integers), torch.float32)
        return matrix if self.lora_a is None or self.lora_b is None else matrix + self.lora_b @ self.lora_a

    def check(self) -> None:
        if self.integers is None:
            where = f"{self.where} ({self.spec})"
            raise LifecycleError(f"{where} has not been rounded: the stack needs a rounding algorithm")

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The dequantized weight [N, K], kept until the integers change."""
        if self.dequantized is None or self.dequantized.dtype != dtype:
            self.dequantized = self.qparams.dequantize(cast(Tensor, self.integers), dtype)
        return self.dequantized

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows [M, K] of the dequantized weight for `ids`, int64 [M], to the bit."""
        return self.qparams.of_rows(ids).dequantize(cast(Tensor, self.integers).index_select(0, ids), dtype)

    def release(self) -> None:
        """Forget the dequantized weight until it is asked for again."""
        self.dequantized = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WeightQuantizer:
        self.dequantized = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        self.dequantized = None
        for name in _ROUNDED:
            if state_dict.get(prefix + name) is not None:
                setattr(self, name, None)  # whatever its size
        super()._load_from_state_dict(state_dict, prefix, *args)


def real_tokens(x: Tensor, token_dim: int) -> Tensor:
    """The part of `x` that belongs to real tokens and no float prefix: nothing else enters a statistic.

    Batch is dimension 0 and tokens are `token_dim`, or both are one in a matrix [B * T, K]. A tensor that all of the
    batch share, as they share positions, has a real token where any of them has. One of any other shape is left whole.
    Batch and tokens become one dimension, where the tokens were: of [B, H, T, D] what is left is [H, tokens, D]. Of
    attention scores [B, H, T, S] it is those that are not masked, [H, scores, 1].
    """
    mask, visible = _counting(), forward_context().visible
    if visible is not None:
        if mask is not None and mask.shape == visible.shape[:2]:
            visible = visible & mask[..., None]
        return x.transpose(0, 1)[:, visible, None]
    if mask is None:
        return x
    if x.dim() == 2 and x.shape[0] == mask.numel():
        return x[mask.flatten()]
    if x.shape[:1] == (1,):
        mask = mask.any(0, keepdim=True)
    if x.dim() <= token_dim or (x.shape[0], x.shape[token_dim]) != tuple(mask.shape):
        return x
    return x.movedim(token_dim, 1)[mask].movedim(0, token_dim - 1)


def _counting() -> Tensor | None:
    """The mask [B, T] of the tokens that enter a statistic; None for all."""
    mask, prefix = forward_context().padding, current_prefix()
    if prefix is None:
        return mask
    rest = ~prefix.positions[:, -prefix.length :]
    return rest if mask is None else mask.bool() & rest
