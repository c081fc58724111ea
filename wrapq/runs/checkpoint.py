"""Saving a converted model and loading it back: safetensors and JSON, nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from wrapq.errors import ModelError, SpecError, WrapqError, and_more, out_of_memory, reading, reason_of
from wrapq.paths import expand, refuse_devices
from wrapq.quant.spec import QuantSpec
from wrapq.resolve.model_class import auto_model
from wrapq.resolve.model_source import GENERATION, ModelSource, read_generation, reading_model
from wrapq.resolve.shards import Shards
from wrapq.runs.folder import FINISHED, MANIFEST, PLAN, RECIPE, WEIGHTS, RunFolder, remove
from wrapq.runs.run_record import RunRecord, read_json
from wrapq.runtime.choose import choose_kernels
from wrapq.runtime.graph_program import GraphProgram
from wrapq.runtime.kernel import REFERENCE
from wrapq.runtime.module import QuantizedModule, QuantizedWeight, new_quantized
from wrapq.runtime.prefix import keep_prefix, prefix_tokens
from wrapq.runtime.rotation import ONLINE, OnlineRotation
from wrapq.runtime.smoothing import SMOOTHING
from wrapq.wrappers.attention import Attention, use_attention_points
from wrapq.wrappers.experts import take_apart
from wrapq.wrappers.model import add_rotation, add_smoothing, empty_smoothing
from wrapq.wrappers.wrapper_registry import WRAPPERS

FORMAT = 1


class Saved(NamedTuple):
    """A saved checkpoint: the parameters of all points by full name, the digest of all tensors, and the digest of each
    quantized module, in the model's order."""

    qparams: Mapping[str, Tensor]
    digest: str
    modules: Mapping[str, str]


def save_model(model: nn.Module, folder: RunFolder) -> Saved:
    """Write a converted transformers model into `folder`: weights, manifest and the model's configuration."""
    for module in model.modules():
        if isinstance(module, QuantizedWeight):
            module.forget_kernel()
    tensors, tied = unique_tensors(model)
    for old in weight_files(folder.path):  # of a run that was killed here and is resumed
        remove(old)
    folder.write(WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    return Saved(qparams_tensors(model), describe_model(model, tensors, tied, folder), module_digests(model))


def describe_model(model: nn.Module, tensors: Mapping[str, Tensor], tied: Mapping[str, str], folder: RunFolder) -> str:
    """Write the manifest and the configuration of a converted transformers model whose weights are in `folder`; returns
    the digest of its tensors.

    Of the model's tensors only the dtypes are looked at: `tensors` are what the weight files hold, `tied` names for
    each that they leave out the one that holds it.
    """
    # the dtype that the model computes in, which is not that of its scales: they are always float32
    rounded = (module.weight_dtype for module in model.modules() if isinstance(module, QuantizedWeight))
    kept = (p.dtype for name, p in model.named_parameters() if not name.endswith("_scale"))
    dtype = next(chain(rounded, kept), torch.float32)
    manifest = {
        "format": FORMAT,
        "dtype": str(dtype).removeprefix("torch."),
        "modules": {
            name: {point: str(spec) for point, spec in module.specs.items()}
            for name, module in model.named_modules()
            if isinstance(module, QuantizedModule)
        },
        "tied": dict(tied),
        "rotated": [name for name, module in model.named_modules() if ONLINE in module._modules],
        "smoothed": [name for name, module in model.named_modules() if SMOOTHING in module._modules],
        "float_prefix": prefix_tokens(model),
        "programs": {
            name: module.description for name, module in model.named_modules() if isinstance(module, GraphProgram)
        },
        "tensors": tensors_digest(tensors),
    }
    _save_code(model, folder)
    config = json.loads(cast(Any, model).config.to_json_string(use_diff=False))
    config.pop("_name_or_path", None)  # where the model lay: equal runs have equal files
    folder.write_text("config.json", json.dumps(config, indent=2) + "\n")
    if (generation := getattr(model, "generation_config", None)) is not None:
        folder.write_text(GENERATION, generation.to_json_string())
    folder.write_text(MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return str(manifest["tensors"])


def _save_code(model: Any, folder: RunFolder) -> None:
    """Copy the code that came with the model, where it has some, beside what cannot be loaded without it."""
    from transformers.dynamic_module_utils import custom_object_save

    for part in (model, model.config):
        if type(part).__module__.startswith("transformers_modules."):
            folder.write_files(partial(custom_object_save, part))
    if getattr(model.config, "auto_map", None):  # on the hub "REPOSITORY--file.Class", which is here now
        model.config.auto_map = {key: name.rpartition("--")[2] for key, name in model.config.auto_map.items()}


def name_files(folder: RunFolder, names: Iterable[str]) -> None:
    """Add the digests of those of the files `names` that are in `folder` to its manifest; see `changed_files`."""
    manifest = read_manifest(folder.path)
    code = (file.name for file in folder.path.glob("*.py"))
    there = [name for name in (*names, "config.json", GENERATION, *code) if (folder.path / name).is_file()]
    manifest["files"] = {name: _file_digest(folder.path / name) for name in there}
    folder.write_text(MANIFEST, json.dumps(manifest, indent=1) + "\n")


def changed_files(path: Path) -> Iterator[tuple[str, str, str]]:
    """The files in the folder `path` that are not those that its manifest names, each with the digest there and the one
    found. The weights are one of them; their digest is that of the tensors.

    Raises:
        ModelError: the folder is not that of a finished run.
    """
    manifest = read_manifest(path)
    for name, digest in manifest.get("files", {}).items():
        if (found := _file_digest(path / name)) != digest:
            yield name, digest, found
    try:
        found = tensors_digest(Shards(weight_files(path)))
    except ModelError as error:
        found = str(error)
    if found != manifest["tensors"]:
        yield WEIGHTS, manifest["tensors"], found


def manifest_digest(path: Path) -> str:
    """SHA-256, in hex, of what the manifest says; equal runs have equal ones, since the digests of the files that say
    where a recipe came from are left out."""
    manifest = read_manifest(path)
    files = {name: digest for name, digest in manifest.get("files", {}).items() if name not in (RECIPE, PLAN)}
    return hashlib.sha256(json.dumps(manifest | {"files": files}, sort_keys=True).encode()).hexdigest()


@contextmanager
def blaming_files(path: Path) -> Iterator[None]:
    """Raise what the block raises as a `ModelError` where it works on a run's model in the folder `path` and the files
    there are no longer those that the run left."""
    try:
        yield
    except Exception as error:
        is_run = not isinstance(error, WrapqError) and not out_of_memory(error) and RunRecord(path).has_model
        if is_run and (changed := [name for name, _, _ in changed_files(path)]):
            what = f"{and_more(changed)} changed since the run, and the model does not compute"
            raise ModelError(f"{path}: {what}: {reason_of(error)}") from error
        raise


def _file_digest(path: Path) -> str:
    """SHA-256, in hex, of the file `path`; why there is none where it cannot be read."""
    try:
        if path.exists() and not path.is_file():  # such as a device, which never ends
            return "no file"
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:  # the second of a name that no file has
        return getattr(error, "strerror", None) or "cannot be read"


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    runtime: str = REFERENCE,
    trust_remote_code: bool = False,
) -> nn.Module:
    """The quantized model that a run left in the folder `path`.

    Args:
        path: the folder of a finished run.
        device: where the model shall run.
        runtime: `reference` gives the outputs that were measured, to the bit; `auto` or the name of a kernel is faster
            and gives those of the kernels' arithmetic: see `wrapq.runtime.choose_kernels`.
        trust_remote_code: whether code that comes with the model, which its configuration names, may run.

    Raises:
        UnknownNameError: no kernel has the name `runtime`.
        ModelError: the folder is not that of a finished run, or its files do not belong together.
    """
    path = expand(path)
    manifest = read_manifest(path)
    tensors: dict[str, Tensor] = {}
    for file in weight_files(path) or [path / WEIGHTS]:
        with reading(f"{file} cannot be read", ModelError):
            tensors |= load_file(file)
    model = rebuild(path, manifest, tensors, device, trust_remote_code=trust_remote_code)
    if left := [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]:
        raise ModelError(f"{path / WEIGHTS} lacks {', '.join(left[:5])} ({len(left)} tensors in all)")
    model = model.eval().requires_grad_(False)
    if runtime != REFERENCE:
        choose_kernels(model, runtime)
    return model


def load_float(source: ModelSource, device: torch.device) -> nn.Module:
    """The float model of `source`, which may be that of a run that is taken apart; see `ModelSource.load`.

    Raises:
        ModelError: also of a run whose model is more than its weights.
    """
    if source.stored is None or source.stored.kind != "wrapq":
        return source.load(device)
    source.check_stored()
    model = load(source.path, "cpu", trust_remote_code=bool(source.options["trust_remote_code"]))
    tensors = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, GraphProgram):
            raise ModelError(f"{source.path} is no float model when it is taken apart: {name} is a graph of PT2E's")
        if ONLINE in module._modules:
            raise ModelError(f"{source.path} is no float model when it is taken apart: {name} turns what comes to it")
        if isinstance(module, QuantizedWeight):
            weight, a, b = (getattr(module, key, None) for key in ("weight", "weight_lora_a", "weight_lora_b"))
            if a is not None and b is not None:
                weight = module.wrapper.to_matrix(weight) + b @ a
                weight = module.wrapper.from_matrix(weight, module.weight_layout)
            tensors[f"{name}.weight"] = cast(Tensor, weight)
    return source.filled(tensors, device)


def rebuild(
    path: Path,
    manifest: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    device: str | torch.device,
    wanted: Callable[[str], bool] = lambda name: True,
    trust_remote_code: bool = False,
) -> nn.Module:
    """The model that `manifest` describes, with those of `tensors` whose name is `wanted`, on `device`; see `load`.

    Raises:
        ModelError: the tensors are not those of the manifest, or do not belong to the model.
    """
    if tensors_digest(tensors) != manifest["tensors"]:
        raise ModelError(f"{path / WEIGHTS} is not what {MANIFEST} says: it was changed or damaged")
    try:
        model = _skeleton(path, manifest, trust_remote_code)
        for name in filter(wanted, tensors):
            assign(model, name, tensors[name].to(device))
        for name, source in manifest["tied"].items():
            if wanted(name):
                assign(model, name, tensor_named(model, source))
    except (AttributeError, KeyError, TypeError, SpecError) as error:
        raise ModelError(
            f"{path}: the manifest, the weights and config.json do not belong together: {error}"
        ) from error
    read_generation(model, path)
    return model


def weight_files(path: Path) -> list[Path]:
    """The files that hold the weights of the model in the folder `path`: one, or several; none without a model."""
    return sorted([*path.glob(WEIGHTS), *path.glob("model-*-of-*.safetensors")])


def weight_bytes(path: Path) -> int:
    """The size of the files that `weight_files` finds."""
    return sum(file.stat().st_size for file in weight_files(path))


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256, in hex, over names, dtypes, shapes and bytes, in order of name."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}\n".encode())
        sha.update(tensor.flatten().view(torch.uint8).numpy().data if tensor.numel() else b"")
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
    """Read the manifest of a checkpoint; raises `ModelError` when the folder is not that of a finished run."""
    try:
        manifest = read_json(path / MANIFEST)
    except ModelError as error:
        run = RunRecord(path)
        reason = run.facts.get("reason") if run.readable else None
        end = f"the run is {run.status}" + (f": {reason}" if reason else "")
        end = str(error) if run.status in ("", FINISHED) else end
        raise ModelError(f"{path} holds no quantized model: {end}") from error
    if (found := manifest.get("format")) != FORMAT:
        raise ModelError(f"{path / MANIFEST} has format {found}; this version reads {FORMAT}")
    if not isinstance(manifest.get("files", {}), dict):
        raise ModelError(f"{path / MANIFEST} has files that are no digests by name: it was changed or damaged")
    if lacks := sorted({"dtype", "modules", "tied", "tensors"} - set(manifest)):
        raise ModelError(f"{path / MANIFEST} lacks {', '.join(lacks)}: it was changed or damaged")
    return manifest


def _skeleton(path: Path, manifest: Mapping[str, Any], trust: bool) -> nn.Module:
    """The model of the manifest on the meta device: right modules, right shapes, no data."""
    from transformers import AutoConfig

    dtype = getattr(torch, manifest["dtype"])
    refuse_devices(path)
    with reading_model(f"{path / 'config.json'} cannot be read"), torch.device("meta"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust)
        model = auto_model(config).from_config(config, dtype=dtype, trust_remote_code=trust)
    take_apart(model, manifest["modules"])
    for name in manifest.get("rotated", ()):  # before what stands in for the module takes its parts over
        add_rotation(model.get_submodule(name), OnlineRotation())
    for name in manifest.get("smoothed", ()):
        add_smoothing(model.get_submodule(name), empty_smoothing(model.get_submodule(name)))
    for name in sorted(manifest["modules"], key=lambda n: n.count(".")):
        specs = {point: QuantSpec.parse(text) for point, text in manifest["modules"][name].items()}
        module = model.get_submodule(name)
        if (wrapper := WRAPPERS.find(module)) is None:
            raise ModelError(f"{path / MANIFEST} quantizes {name}, but {type(module).__name__} has no wrapper here")
        quantized = new_quantized(module, wrapper, specs)
        model.set_submodule(name, quantized)
        if isinstance(quantized, Attention):
            use_attention_points(quantized.config)
    for name, description in manifest.get("programs", {}).items():
        model.set_submodule(name, GraphProgram(description))
    if tokens := manifest.get("float_prefix", 0):
        keep_prefix(model, tokens)
    return model
