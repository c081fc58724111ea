"""The base of all wrappers: what a wrapper declares, and the module it becomes while it is calibrated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from wrapq.errors import LifecycleError
from wrapq.observers.forward_context import forward_context
from wrapq.quant.spec import QuantSpec
from wrapq.runtime.module import QuantizedModule, add_low_rank, added_bias, new_quantized
from wrapq.runtime.stand_in import WITHOUT, combined_class, shadow
from wrapq.wrappers.quantizer import Quantizer, State, WeightQuantizer


@dataclass(frozen=True)
class Point:
    """A quantization point that a wrapper declares: a named tensor, a `weight` or an `activation`.

    Attributes:
        fixed_axes: of an activation, the axes, counted from the end, whose sizes the model fixes and the data does not;
            -3 are attention heads. None where it depends on the model, as for convolutions.
    """

    name: str
    role: Literal["weight", "activation"] = "activation"
    fixed_axes: tuple[int, ...] | None = (-1,)


WEIGHT = Point("weight", "weight")
INPUT, OUTPUT = Point("input"), Point("output")


class Wrapper(nn.Module):
    """How one kind of module looks with quantization points: subclass it to support a new one.

        @WRAPPERS.register("torch.nn.modules.linear.Linear")
        class Linear(Wrapper):
            points = (WEIGHT, INPUT, OUTPUT)

            def forward(self, x):
                return self.q("output", super().forward(self.q("input", x)))

    A wrapper's class is put in front of the original module's: `super().forward` is the original's forward, which reads
    the quantized weight as `self.weight`. The same forward runs while calibrating, when fake-quantized and after
    conversion; only what `q` does differs. Without any spec it must compute exactly what the module computed.
    """

    points: ClassVar[tuple[Point, ...]] = ()
    forward: Callable[..., Any]
    kind: ClassVar[str] = ""
    """The name that a rule's `type` may use for every class this wrapper stands in for."""
    replaces_forward: ClassVar[bool] = False
    """The wrapper computes the module's function itself instead of calling `super().forward`."""
    beneath: ClassVar[type[nn.Module] | None] = None
    """A class that replaces a forward of torch's, which that of a module's own class may call; see `combined_class`."""
    matches: ClassVar[Callable[[nn.Module], bool] | None] = None
    """Whether an unregistered module is of this kind, by looking at it."""

    def q(self, point: str, x: Tensor, token_dim: int = 1) -> Tensor:
        """`x` [..., K] as the point called `point` lets it through; tokens lie along `token_dim`."""
        raise NotImplementedError

    def on_weight_input(self, raw: Tensor, x: Tensor) -> Tensor:
        """Announce that the weight is about to multiply `x`, which is `raw` after quantization; returns `x`."""
        return x

    def repaired(self, x: Tensor, y: Tensor) -> Tensor:
        """`y`, what the weight made of `x`, with what a low-rank correction of the weight makes of it."""
        return y

    @classmethod
    def multiplies(cls, module: nn.Module) -> bool:
        """Whether the weight of `module` multiplies a matrix, `input_matrix(x)`, so that it has a Hessian."""
        return False

    @classmethod
    def operands(cls, module: nn.Module) -> tuple[str, ...]:
        """The points whose tensors the weight of `module` multiplies as a matrix: what `activation` of a rule means."""
        return ("input",) if cls.multiplies(module) else ()

    @classmethod
    def groups(cls, module: nn.Module) -> int:
        """How many groups of as many rows of the weight multiply inputs of their own, `input_matrix(x)` [G, M, K]; each
        has a Hessian. 1 where all of them multiply the same, [M, K]."""
        return 1

    @classmethod
    def reads(cls, module: nn.Module) -> tuple[object, ...]:
        """What, beside its input, decides `input_matrix` of `module`: modules alike in it share statistics."""
        return ()

    @classmethod
    def width(cls, module: nn.Module, point: str) -> int | None:
        """The size of the last axis of what comes to an activation point of `module`; None where it is not known."""
        return None

    @classmethod
    def fixed_axes(cls, module: nn.Module, point: Point) -> tuple[int, ...] | None:
        """`Point.fixed_axes` of a point of this very `module`; None where it is not known."""
        return point.fixed_axes

    @staticmethod
    def to_matrix(weight: Tensor) -> Tensor:
        """The weight as the matrix [N, K] that specs and algorithms speak of: N outputs, K inputs."""
        return weight.flatten(1) if weight.dim() > 1 else weight[None]

    @staticmethod
    def from_matrix(matrix: Tensor, layout: torch.Size) -> Tensor:
        """The inverse of `to_matrix`, for a weight of shape `layout`."""
        return matrix if matrix.shape == layout else matrix.reshape(layout)


@dataclass(frozen=True)
class ModuleConsumer:
    """What the weights of wrapped modules with one input multiply."""

    modules: tuple[QuantModuleBase, ...]

    def matrix(self, x: Tensor) -> Tensor:
        """`x` as rows [M, K], or [G, M, K]."""
        return self.modules[0].input_matrix(x)

    def weight(self) -> Tensor:
        """The float weights one below the other, [N, K], or [G, N, K]."""
        weight = torch.cat([module.float_matrix() for module in self.modules])
        groups = self.modules[0].wrapper.groups(self.modules[0])
        return weight if groups == 1 else weight.unflatten(0, (groups, -1))


class QuantModuleBase(nn.Module):
    """A wrapped module: the wrapper's forward over the module's own parameters, with a `Quantizer` at each point.

    Its points go from float to observing to quantized, and each step checks that the one before was done. The float
    weight stays what it was until `converted()` builds the module that holds integers only.
    """

    wrapper: type[Wrapper]
    original: nn.Module
    quantizers: nn.ModuleDict
    input_matrix: Callable[[Tensor], Tensor]

    @classmethod
    def wrap(cls, module: nn.Module, wrapper: type[Wrapper], specs: Mapping[str, QuantSpec], name: str) -> Any:
        """A stand-in for `module` with a quantizer for each entry of `specs`; the module itself is not changed."""
        names = [point.name for point in wrapper.points]
        if unknown := sorted(set(specs) - set(names)):
            where = f"{name} ({type(module).__name__})"
            raise LifecycleError(f"{where} has no point {unknown[0]!r}; it has: {', '.join(names)}")
        new = shadow(module, combined_class("Quant", cls, wrapper, type(module), beneath=wrapper.beneath))
        # not in the table of children, where it would appear in the state dict a second time
        new.__dict__["original"], new.__dict__["wrapper"] = module, wrapper
        make = {"weight": WeightQuantizer, "activation": Quantizer}
        new.quantizers = nn.ModuleDict(
            {p.name: make[p.role](specs[p.name], f"{name}.{p.name}") for p in wrapper.points if p.name in specs}
        )
        for point in set(wrapper.operands(module)) & set(specs):
            new.point_quantizers()[point].consumer = ModuleConsumer((new,))
        return new

    def point_quantizers(self) -> dict[str, Quantizer]:
        """The quantizer of each point that has one, by the point's name."""
        return cast(dict[str, Quantizer], dict(self.quantizers.items()))

    def activation_quantizers(self) -> Iterator[Quantizer]:
        """The points that are not the weight."""
        return (q for q in self.point_quantizers().values() if not isinstance(q, WeightQuantizer))

    @property
    def weight_quantizer(self) -> WeightQuantizer | None:
        """The weight's point, or None where the weight is left alone."""
        return cast("WeightQuantizer | None", self.point_quantizers().get("weight"))

    @property
    def weight(self) -> Tensor:
        """The weight to compute with: dequantized once it is rounded, the float one until then."""
        weight = cast(Tensor, super().__getattr__("weight"))
        if (quantizer := self._weight_in_force()) is None:
            return weight
        if WITHOUT in self.__dict__:
            return torch.empty(weight.shape, dtype=weight.dtype, device="meta")
        return self.wrapper.from_matrix(quantizer.matrix(weight.dtype), weight.shape)

    def weight_rows(self, ids: Tensor) -> Tensor | None:
        """The rows [M, K] of the weight to compute with for `ids` [M], to the bit; None where it is the float one."""
        quantizer = self._weight_in_force()
        return None if quantizer is None else quantizer.rows(ids, self.float_weight().dtype)

    @property
    def bias(self) -> Tensor | None:
        """The bias to compute with: with what a correction of the rounded weight adds."""
        if "bias" in self.__dict__:  # not a tensor at all
            return cast(Any, self.__dict__["bias"])
        bias = cast("Tensor | None", super().__getattr__("bias"))
        quantizer = self._weight_in_force()
        return bias if quantizer is None or quantizer.bias is None else added_bias(bias, quantizer.bias, self.weight)

    def repaired(self, x: Tensor, y: Tensor) -> Tensor:
        """The output `y` of the input `x` with what a low-rank correction of the rounded weight adds."""
        quantizer = self._weight_in_force()
        if quantizer is None or quantizer.lora_a is None or quantizer.lora_b is None:
            return y
        return add_low_rank(x, y, quantizer.lora_a.to(y.dtype), quantizer.lora_b.to(y.dtype))

    def _weight_in_force(self) -> WeightQuantizer | None:
        """The weight's point, where the weight that is computed with is the quantized one."""
        quantizer, calibration = self.weight_quantizer, forward_context().calibration
        if quantizer is None or quantizer.state is not State.QUANTIZED or not quantizer.enabled:
            return None
        return quantizer if calibration is None or calibration.quantizes else None

    def float_matrix(self) -> Tensor:
        """The float weight as a matrix [N, K]."""
        return self.wrapper.to_matrix(self.float_weight().detach())

    def float_weight(self) -> nn.Parameter:
        """The float weight itself, in the module's own layout."""
        return cast(nn.Parameter, self._parameters["weight"])

    def q(self, point: str, x: Tensor, token_dim: int = 1) -> Tensor:
        """`x` as the point lets it through; a point without a spec lets it through unchanged."""
        return self.quantizers[point](x, token_dim) if point in self.quantizers else x

    def on_weight_input(self, raw: Tensor, x: Tensor) -> Tensor:
        quantizer, calibration = self.weight_quantizer, forward_context().calibration
        if quantizer is not None and quantizer.state is State.OBSERVING and calibration is not None:
            calibration.on_weight_input(self, raw, x)
        return x

    def free_weight(self) -> None:
        """Let go of the weight, rounded and float, which has been `converted`; the module computes no more."""
        quantizer, weight = cast(WeightQuantizer, self.weight_quantizer), self.float_weight()
        quantizer.integers = quantizer.dequantized = None
        weight.data = weight.new_zeros(()).expand(weight.shape)  # of the same shape, and four bytes

    def converted(self, tied: QuantizedModule | None = None) -> QuantizedModule:
        """The module that holds integers and parameters instead of float weights, with the same outputs; the very ones
        of `tied` where that has this weight. Raises `LifecycleError` naming a point that is not quantized."""
        quantizers = self.point_quantizers()
        for quantizer in quantizers.values():
            quantizer.freeze()
        new = new_quantized(self.original, self.wrapper, {name: q.spec for name, q in quantizers.items()})
        new.__dict__["_modules"] = {k: v for k, v in self._modules.items() if k != "quantizers"}
        for name, quantizer in quantizers.items():
            if isinstance(quantizer, WeightQuantizer):
                if tied is None:
                    new.set_weight(quantizer.integers, quantizer.qparams)
                else:
                    new.share_weight(tied)
                new.set_correction(quantizer.bias, quantizer.lora_a, quantizer.lora_b)
            elif not quantizer.spec.dynamic:
                new.set_qparams(name, quantizer.qparams)
        return new
