"""Specs in the words of compressed-tensors: its `QuantizationArgs`, its formats, and the reason where it has no word.

The words and their meaning are those of compressed-tensors 0.19, `quantization/quant_args.py` and
`compressors/format.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from wrapq.errors import SpecError
from wrapq.quant.spec import QuantSpec

Args = dict[str, Any]
PACK, INT, FLOAT, NAIVE = "pack-quantized", "int-quantized", "float-quantized", "naive-quantized"
NVFP4, MXFP4, MXFP8 = "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"
MIXED, DENSE = "mixed-precision", "dense"
MOST_BITS = 8
_FLOATS = ("fp8_e4m3", "fp4_e2m1")
_NV_GROUP, _MX_GROUP = 16, 32
_BYTE_SCALES = {"e8m0": "torch.uint8", "fp8_e4m3": "torch.float8_e4m3fn"}


@dataclass(frozen=True)
class Scheme:
    """How one linear layer is written.

    Attributes:
        weights: the `QuantizationArgs` of the weight.
        inputs: those of the input, None where it stays float.
        format: the layout of its tensors.
    """

    weights: Args
    inputs: Args | None
    format: str

    @property
    def half_only(self) -> bool:
        """Whether the weight is microscaled, so that compressed-tensors unpacks it to bfloat16 in any model."""
        return self.format in (NVFP4, MXFP4, MXFP8)

    @property
    def key(self) -> str:
        """Equal for equal schemes."""
        return json.dumps([self.weights, self.inputs, self.format], sort_keys=True)

    def group(self, targets: list[str]) -> Args:
        """The entry of `config_groups` for the layers named or typed in `targets`."""
        arguments = {"weights": self.weights, "input_activations": self.inputs, "output_activations": None}
        return {"targets": targets, **arguments, "format": self.format}


def linear_scheme(specs: Mapping[str, QuantSpec]) -> Scheme:
    """The scheme of a linear layer whose points have `specs`; raises `SpecError`, naming the point, where
    compressed-tensors cannot say it."""
    if "output" in specs:
        raise SpecError("output: compressed-tensors' readers quantize weights and inputs only")
    if "weight" not in specs:
        raise SpecError("input: compressed-tensors stores no layer whose input is quantized and whose weight is not")
    weights = _named("weight", weight_args, specs["weight"])
    inputs = _named("input", input_args, specs["input"]) if "input" in specs else None
    form = _format(weights, inputs)
    if form == PACK and weights["strategy"] == "tensor":
        weights["strategy"] = "channel"  # packed zero points exist by channel and group; the scale is repeated
    return Scheme(weights, inputs, form)


def weight_args(spec: QuantSpec) -> Args:
    """`QuantizationArgs` of a weight; raises `SpecError` where there are none."""
    if spec.granularity == "head":
        raise SpecError(f"{spec}: a weight has no attention heads")
    if spec.granularity == "channel" and spec.axis not in (0, -2):
        raise SpecError(f"{spec}: compressed-tensors scales a weight's output channels (axis 0), not axis {spec.axis}")
    return _args(spec)


def input_args(spec: QuantSpec) -> Args:
    """`QuantizationArgs` of a linear layer's input; raises `SpecError` where there are none."""
    if spec.granularity == "channel":
        raise SpecError(f"{spec}: compressed-tensors has no scale per input channel; use tensor, or token with dyn")
    if spec.granularity == "group" and not spec.dynamic and not spec.local:
        raise SpecError(f"{spec}: compressed-tensors has no fixed ranges for groups of an input; add dyn")
    if spec.granularity in ("block", "head"):
        raise SpecError(f"{spec}: compressed-tensors scales an input by tensor, token or group, not {spec.granularity}")
    return _args(spec)


def cache_args(key: QuantSpec | None, value: QuantSpec | None) -> Args:
    """`kv_cache_scheme` of a model whose keys and values have these specs; raises `SpecError` where there is none."""
    if key is None or value is None:
        raise SpecError("compressed-tensors quantizes keys and values together; quantize both or neither")
    if moving := [spec for spec in (key, value) if spec.dynamic or spec.local]:
        raise SpecError(f"{moving[0]}: compressed-tensors takes one range over all tokens, so a cache needs fixed ones")
    if key.granularity not in _CACHE:
        raise SpecError(f"{key}: compressed-tensors scales a cache by {' or '.join(_CACHE)}, not by {key.granularity}")
    arguments, other = _args(key), _args(value)
    if arguments != other:
        raise SpecError(f"compressed-tensors has one scheme for keys and values, but key is {key} and value is {value}")
    return arguments


_CACHE = {"tensor": "tensor", "head": "attn_head"}


def _named(point: str, arguments: Callable[[QuantSpec], Args], spec: QuantSpec) -> Args:
    try:
        return arguments(spec)
    except SpecError as error:
        raise SpecError(f"{point}: {error}") from None


def _args(spec: QuantSpec) -> Args:
    dtype = spec.dtype
    if dtype.kind != "int" and dtype.name not in _FLOATS:
        raise SpecError(f"{spec}: compressed-tensors knows the floats {' and '.join(_FLOATS)}, not {dtype}")
    if spec.zero_point != "int":
        raise SpecError(f"{spec}: compressed-tensors' zero points are integers")
    if dtype.bits > MOST_BITS:
        raise SpecError(f"{spec}: compressed-tensors' readers hold numbers of at most {MOST_BITS} bits")
    arguments: Args = {"num_bits": dtype.bits, "type": dtype.kind, "symmetric": spec.symmetric}
    arguments |= {"strategy": _CACHE.get(spec.granularity, spec.granularity), "dynamic": spec.dynamic}
    if spec.granularity == "group":
        arguments["group_size"] = spec.group_size
    if spec.granularity == "block":
        arguments["block_structure"] = list(spec.block_size or ())
    return arguments | _byte_scales(spec)


def _byte_scales(spec: QuantSpec) -> Args:
    """What is said of scales of one byte; a fixed scale of another dtype is stored as the number that it is."""
    if spec.global_scale:
        if (spec.dtype.name, spec.group_size) != ("fp4_e2m1", _NV_GROUP):
            raise SpecError(f"{spec}: compressed-tensors has global scales for nvfp4 only: fp4_e2m1 by g{_NV_GROUP}")
        dynamic = "local" if spec.local else spec.dynamic
        return {"strategy": "tensor_group", "scale_dtype": _BYTE_SCALES["fp8_e4m3"], "dynamic": dynamic}
    if spec.scale_dtype == "e8m0" and spec.dtype.kind == "float":
        if spec.group_size != _MX_GROUP:
            raise SpecError(f"{spec}: compressed-tensors has e8m0 scales for groups of {_MX_GROUP}")
        return {"scale_dtype": _BYTE_SCALES["e8m0"]}
    if spec.dtype.name == "fp4_e2m1":
        raise SpecError(f"{spec}: compressed-tensors has fp4_e2m1 as nvfp4 and as mxfp4, with their scales")
    if spec.scale_dtype != "float32" and spec.dynamic:
        raise SpecError(f"{spec}: compressed-tensors does not round dynamic scales to {spec.scale_dtype}")
    return {}


def _format(weights: Args, inputs: Args | None) -> str:
    """The layout that vLLM reads for the scheme; where it reads several, the first of `COMPRESSION_FORMAT_PRIORITY`."""
    if weights["type"] == "int":
        # a byte for each weight is what int-quantized stores, and vLLM's kernels for fewer bits do not read
        narrow = weights["num_bits"] < MOST_BITS and weights["symmetric"]
        return PACK if inputs is None or (narrow and inputs["dynamic"]) else INT
    if weights["num_bits"] == 4:
        return NVFP4 if weights["strategy"] == "tensor_group" else MXFP4
    if weights.get("scale_dtype") == _BYTE_SCALES["e8m0"]:
        return MXFP8
    return NAIVE if inputs is None else FLOAT
