"""Saving a converted model and loading it back: safetensors and JSON, nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from wrapq.engine.folder import STATUS_FILE, RunFolder
from wrapq.errors import ModelError, SpecError
from wrapq.quant.spec import QuantSpec
from wrapq.runtime.choose import choose_kernels
from wrapq.runtime.kernel import REFERENCE
from wrapq.runtime.module import QuantizedModule, QuantizedWeight, new_quantized
from wrapq.runtime.rotation import ONLINE, OnlineRotation
from wrapq.wrappers.attention import Attention, use_attention_points
from wrapq.wrappers.experts import take_apart
from wrapq.wrappers.model import add_rotation
from wrapq.wrappers.registry import WRAPPERS

WEIGHTS, MANIFEST, GENERATION = "model.safetensors", "manifest.json", "generation_config.json"
FORMAT = 1


class Saved(NamedTuple):
    """What was saved: the parameters of all points by their full names, the digest of all tensors, and that of each
    quantized module's own, in the model's order."""

    qparams: Mapping[str, Tensor]
    digest: str
    modules: Mapping[str, str]


def save_model(model: nn.Module, folder: RunFolder) -> Saved:
    """Write a converted transformers model into `folder`: weights, manifest and the model's configuration."""
    for module in model.modules():
        if isinstance(module, QuantizedWeight):
            module.forget_kernel()
    tensors, tied = unique_tensors(model)
    for old in weight_files(folder.path):  # of a run that was killed here and taken up again
        old.unlink()
    folder.write(WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    return Saved(qparams_tensors(model), describe_model(model, tensors, tied, folder), module_digests(model))


def describe_model(model: nn.Module, tensors: Mapping[str, Tensor], tied: Mapping[str, str], folder: RunFolder) -> str:
    """Write the manifest and the configuration of a converted transformers model whose weights are in `folder`; returns
    the digest of its tensors.

    Args:
        model: the model; of its tensors only the dtypes are looked at.
        tensors: what the weight files hold.
        tied: for each tensor that they leave out the name that holds it.
        folder: the run's folder.
    """
    manifest = {
        "format": FORMAT,
        "dtype": str(_float_dtype(model)).removeprefix("torch."),
        "modules": {
            name: {point: str(spec) for point, spec in module.specs.items()}
            for name, module in model.named_modules()
            if isinstance(module, QuantizedModule)
        },
        "tied": dict(tied),
        "rotated": [name for name, module in model.named_modules() if ONLINE in module._modules],
        "tensors": tensors_digest(tensors),
    }
    folder.write_text("config.json", cast(Any, model).config.to_json_string(use_diff=False))
    if (generation := getattr(model, "generation_config", None)) is not None:
        folder.write_text(GENERATION, generation.to_json_string())
    folder.write_text(MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return str(manifest["tensors"])


def load(path: str | Path, device: str | torch.device = "cpu", runtime: str = REFERENCE) -> nn.Module:
    """The quantized model that a run left in the folder `path`.

    Args:
        path: the folder of a finished run.
        device: where the model shall run.
        runtime: `reference` gives the outputs that were measured, to the bit; `auto` or the name of a kernel is faster
            and gives those of the kernels' arithmetic: see `wrapq.runtime.choose_kernels`.

    Raises:
        UnknownNameError: no kernel has the name `runtime`.
        ModelError: the folder is not that of a finished run, or its files do not belong together.
    """
    path = Path(path).expanduser()
    manifest = read_manifest(path)
    tensors: dict[str, Tensor] = {}
    for file in weight_files(path) or [path / WEIGHTS]:
        try:
            tensors |= load_file(file)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file} cannot be read: {error}") from error
    model = rebuild(path, manifest, tensors, device)
    if left := [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]:
        raise ModelError(f"{path / WEIGHTS} lacks {', '.join(left[:5])} ({len(left)} tensors in all)")
    model = model.eval().requires_grad_(False)
    if runtime != REFERENCE:
        choose_kernels(model, runtime)
    return model


def rebuild(
    path: Path,
    manifest: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    device: str | torch.device,
    wanted: Callable[[str], bool] = lambda name: True,
) -> nn.Module:
    """The model that `manifest` describes, with those of `tensors` whose name is `wanted`, on `device`.

    Raises:
        ModelError: the tensors are not those of the manifest, or do not belong to the model.
    """
    if tensors_digest(tensors) != manifest["tensors"]:
        raise ModelError(f"{path / WEIGHTS} is not what {MANIFEST} says: it was changed or damaged")
    try:
        model = _skeleton(path, manifest)
        for name in filter(wanted, tensors):
            assign(model, name, tensors[name].to(device))
        for name, source in manifest["tied"].items():
            if wanted(name):
                assign(model, name, tensor_named(model, source))
    except (AttributeError, KeyError, TypeError, SpecError) as error:
        raise ModelError(
            f"{path}: the manifest, the weights and config.json do not belong together: {error}"
        ) from error
    return model


def weight_files(path: Path) -> list[Path]:
    """The files that hold the weights of the model in the folder `path`: one, or several; none without a model."""
    return sorted([*path.glob(WEIGHTS), *path.glob("model-*-of-*.safetensors")])


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256, in hex, over names, dtypes, shapes and bytes, in order of name."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}\n".encode())
        sha.update(tensor.flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return sha.hexdigest()


def qparams_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The final parameters of every point: scales, zero points, permutations by their full names."""
    ends = ("_scale", "_zero_point", "_permutation")
    return {
        f"{name}.{key}".removeprefix("."): tensor.detach().contiguous()
        for name, module in model.named_modules()
        if isinstance(module, QuantizedModule)
        for key, tensor in (*module.named_buffers(recurse=False), *module.named_parameters(recurse=False))
        if key.endswith(ends)
    }


def module_digests(model: nn.Module) -> dict[str, str]:
    """For each quantized module that has its data, in the model's order, the digest of its tensors."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedModule):
            tensors = dict(chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False)))
            if not any(tensor.is_meta for tensor in tensors.values()):
                found[name] = tensors_digest(tensors)
    return found


def _float_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that a converted model computes in: not that of its scales, which are always float32."""
    rounded = (module.weight_dtype for module in model.modules() if isinstance(module, QuantizedWeight))
    kept = (p.dtype for name, p in model.named_parameters() if not name.endswith("_scale"))
    return next(chain(rounded, kept), torch.float32)


def unique_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every parameter and buffer once, and for the names left out the name that holds theirs.

    Buffers that a state dict leaves out, such as rotary frequencies, are kept too: a model built without data lacks
    them. What has no data itself is left out.
    """
    first: dict[tuple[int, torch.Size], str] = {}
    tensors, tied = {}, {}
    parameters = model.named_parameters(remove_duplicate=False)
    for name, tensor in (*parameters, *model.named_buffers(remove_duplicate=False)):
        key = (tensor.data_ptr(), tensor.shape)
        if tensor.is_meta:
            continue
        if tensor.numel() and key in first:
            tied[name] = first[key]
        else:
            first[key] = name
            tensors[name] = tensor.detach().contiguous()
    return tensors, tied


def assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put `tensor` in the place `name` of a converted model; raises `KeyError` where its shape is another."""
    parent, _, key = name.rpartition(".")
    module = model.get_submodule(parent)
    place = module._parameters.get(key, module._buffers.get(key))
    if place is not None and place.shape != tensor.shape:
        raise KeyError(f"{name} is {tuple(tensor.shape)}, not {tuple(place.shape)}")
    if tensor.is_floating_point() and key not in module._buffers:
        module._parameters[key] = (
            tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
        )
    else:
        module._buffers[key] = tensor


def tensor_named(model: nn.Module, name: str) -> Tensor:
    """The parameter or buffer `name` of `model`."""
    parent, _, key = name.rpartition(".")
    module = model.get_submodule(parent)
    return cast(Tensor, module._parameters.get(key, module._buffers.get(key)))


def read_manifest(path: Path) -> dict[str, Any]:
    """What the folder says of its model; raises `ModelError` when it is not that of a finished run."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} holds no quantized model: {_run_status(path) or error}") from error
    found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
    if found != FORMAT:
        raise ModelError(f"{path / MANIFEST} has format {found}; this version reads {FORMAT}")
    if lacks := sorted({"dtype", "modules", "tied", "tensors"} - set(manifest)):
        raise ModelError(f"{path / MANIFEST} lacks {', '.join(lacks)}: it was changed or damaged")
    return manifest


def _run_status(path: Path) -> str:
    try:
        status = json.loads((path / STATUS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    return f"the run is {status.get('status')}" + (f": {status['reason']}" if status.get("reason") else "")


def _skeleton(path: Path, manifest: Mapping[str, Any]) -> nn.Module:
    """The model of the manifest on the meta device: right modules, right shapes, no data."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{path / 'config.json'} cannot be read: {reason}") from error
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, manifest["dtype"]))
    take_apart(model, manifest["modules"])
    for name in manifest.get("rotated", ()):  # before what stands in for the module takes its parts over
        add_rotation(model.get_submodule(name), OnlineRotation())
    for name in sorted(manifest["modules"], key=lambda n: n.count(".")):
        specs = {point: QuantSpec.parse(text) for point, text in manifest["modules"][name].items()}
        module = model.get_submodule(name)
        if (wrapper := WRAPPERS.find(module)) is None:
            raise ModelError(f"{path / MANIFEST} quantizes {name}, but {type(module).__name__} has no wrapper here")
        quantized = new_quantized(module, wrapper, specs)
        parent, _, child = name.rpartition(".")
        model.get_submodule(parent)._modules[child] = quantized
        if isinstance(quantized, Attention):
            use_attention_points(quantized.config)
    return model
