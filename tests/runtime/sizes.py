"""What a quantized model should take, and what it takes: in its file, and in memory with everything it holds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

import wrapq
from wrapq.quant.affine import scale_shape
from wrapq.quant.spec import QuantSpec
from wrapq.runs.checkpoint import WEIGHTS, save_model
from wrapq.runs.folder import RunFolder
from wrapq.runtime.choose import tensor_bytes
from wrapq.runtime.kernel import KERNELS
from wrapq.runtime.module import QuantizedWeight

_FOLDER = Path(__file__).parents[2] / "conf" / "scheme"
SCHEMES = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(_FOLDER.glob("*.yaml"))}
WEIGHT_SCHEMES = [name for name, scheme in SCHEMES.items() if "weight" in scheme]
_ELSEWHERE = dict.fromkeys(("*_proj", "lm_head", "*embed_tokens", "*norm", "*.self_attn", "*.mlp", "*act_fn"))
_SCALE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8_e4m3": 1, "e8m0": 1}
_LEAVES = (type, FunctionType, ModuleType, str, bytes, int, float, torch.dtype, torch.device, type(None))


def converted(model: nn.Module, name: str, ids: Tensor) -> nn.Module:
    """`model` with the scheme `name` of the presets in the projections of its blocks, or in its attention."""
    scheme = SCHEMES[name]
    points = dict(scheme.get("points", {}))
    points |= {point: scheme[point] for point in ("weight", "input") if scheme.get(point, "float") != "float"}
    if everywhere := scheme.get("activations"):
        points |= {"input": everywhere, "output": everywhere}
    target = "*.self_attn" if "match" in scheme else "*_proj"
    prepared = wrapq.prepare(model, wrapq.PTQConfig(activation=None, overrides={**_ELSEWHERE, target: points}))
    prepared(ids)
    return wrapq.convert(prepared)


def bytes_on_kernels(model: nn.Module, ids: Tensor) -> dict[str, int]:
    """For each kernel that supports some module, what the model holds after a forward on it; then without kernels."""
    modules = [module for module in model.modules() if isinstance(module, QuantizedWeight)]
    sizes = {}
    for name in KERNELS:
        kernel = KERNELS.get(name)
        for module in modules:
            module.use_kernel(kernel if kernel.unsupported(module) is None else None)
        if any(module.kernel_type for module in modules):
            model(ids)
            sizes[name] = held_bytes(model) + sum(m._kernel.hidden_bytes for m in modules if m._kernel is not None)
            assert resident_bytes(model) == pytest.approx(sizes[name], rel=1e-3)
    for module in modules:
        module.use_kernel(None)
    return sizes


def resident_bytes(model: nn.Module) -> int:
    """Bytes of all tensors that `model` and the kernels made so far hold, shared ones once."""
    made = [m._kernel for m in model.modules() if isinstance(m, QuantizedWeight) and m._kernel is not None]
    held = (tensor for kernel in made for tensor in kernel.tensors())
    hidden = sum(kernel.hidden_bytes for kernel in made)
    return tensor_bytes([*model.parameters(), *model.buffers(), *held]) + hidden


def ideal_bytes(floats: nn.Module, quantized: nn.Module) -> float:
    """The float model's tensors, each once, but of quantized weights the bits, scales and zero points.

    Scales count at the dtype of their spec, zero points at the bits of the grid, a global scale as float32.
    """
    total: float = held_bytes([*floats.parameters(), *floats.buffers()])
    for name, module in quantized.named_modules():
        if isinstance(module, QuantizedWeight):
            weight, spec = floats.get_parameter(f"{name}.weight"), module.specs["weight"]
            total += weight_bytes(module.matrix_shape, spec) - weight.nbytes
    return total


def weight_bytes(shape: tuple[int, int], spec: QuantSpec) -> float:
    """Bytes of the codes of a weight [N, K], of its scales, its zero points and its global scale."""
    scales = math.prod(scale_shape(shape, spec))
    zero_points = 0 if spec.symmetric else scales * spec.dtype.bits / 8
    total = math.prod(shape) * spec.dtype.bits / 8 + scales * _SCALE_BYTES[spec.scale_dtype] + zero_points
    return total + 4 * spec.global_scale


def file_bytes(model: nn.Module, folder: Path) -> int:
    """Bytes of the tensors in `model.safetensors`: the file without its header."""
    save_model(model, RunFolder.create(folder, "sizes", 0))
    (path,) = folder.rglob(WEIGHTS)
    with path.open("rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")


def held_bytes(root: Any) -> int:
    """Bytes of all storages that are reached from `root` through attributes and containers, each once and whole."""
    storages: dict[object, int] = {}
    met: dict[int, Any] = {}
    stack = [root]
    while stack:
        item = stack.pop()
        if isinstance(item, _LEAVES) or id(item) in met:
            continue
        met[id(item)] = item
        if isinstance(item, Tensor):
            storages |= _storage(item)
        else:
            stack.extend(_parts(item))
    return sum(storages.values())


def _storage(tensor: Tensor) -> dict[object, int]:
    if tensor.layout != torch.strided:  # opaque: the layout of a library, as large as its elements
        return {id(tensor): tensor.numel() * tensor.element_size()}
    storage = tensor.untyped_storage()
    return {storage.data_ptr(): storage.nbytes()}


def _parts(item: Any) -> Iterable[Any]:
    if isinstance(item, Mapping):
        return item.values()
    if isinstance(item, (list, tuple, set, frozenset)):
        return item
    return getattr(item, "__dict__", {}).values()
