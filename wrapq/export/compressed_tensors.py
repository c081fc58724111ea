"""The checkpoint format of compressed-tensors, which transformers and vLLM load.

`config.json` says under `quantization_config` how each layer is quantized, and the tensors lie in `model.safetensors`
under the names of the library. Embeddings and norms stay as they are.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, cast

import torch
from packaging.version import Version
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from wrapq.errors import ModelError, PlanError, Problem
from wrapq.export.checks import VLLM, Translation, translate
from wrapq.export.reload import DEQUANTIZED, FLOAT_CACHE, read
from wrapq.export.scheme import DENSE, MIXED, Args, Scheme
from wrapq.export.tensors import CACHE_NAMES, activation_tensors, linear_tensors
from wrapq.export.vllm import describe, linear_note, unequal_global_scales, words
from wrapq.resolve.exporter import EXPORTERS, Exporter, Folder, Reading
from wrapq.resolve.plan import Plan
from wrapq.runtime.module import QuantizedModule, QuantizedWeight

LIBRARY, OLDEST = "compressed-tensors", "0.15.0"
"""What transformers takes; up to 0.18 some formats do not load, which the comparison of every export shows."""
WEIGHTS, CONFIG = "model.safetensors", "config.json"
_ROUNDING = {"float32": 1e-5, "bfloat16": 3e-2, "float16": 1e-2}
_STEP = {"float32": 1e-2, "bfloat16": 5e-2, "float16": 5e-2}
"""With quantized activations of 8 bits: a number between two steps may fall to either side, and what follows shows it.

Half precision has many such numbers, since compressed-tensors computes dynamic scales in the model's dtype.
"""
_COARSE_STEP = 0.25
"""With fewer bits. Weights that are wrong altogether are off by more than one."""
_FINE_BITS = 8


_DEQUANTIZED = (
    "transformers with compressed-tensors {version} loads it with "
    "quantization_config=CompressedTensorsConfig(dequantize=True) only: since 0.18 they misread packed zero points, "
    "those that compressed-tensors itself writes included; 0.15 to 0.17 read them"
)
_FLOAT_CACHE = (
    "transformers {transformers} with compressed-tensors {version} leaves the cache of keys and values float: "
    "attention takes it under a name that compressed-tensors does not know; its scales are stored, and vLLM reads them"
)


class CompressedTensorsOptions(BaseModel):
    """Options of the format."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    reader: Literal["vllm", "transformers"] = Field(
        "vllm",
        description="vllm refuses what its kernels cannot run; transformers allows all that the format can say.",
    )


@EXPORTERS.register("compressed_tensors")
class CompressedTensors(Exporter):
    """Exporter of compressed-tensors checkpoints."""

    Options = CompressedTensorsOptions
    options: CompressedTensorsOptions

    def check(self, plan: Plan) -> Iterable[Problem]:
        """See `Exporter.check`."""
        found = _version()
        if found is None or Version(found) < Version(OLDEST):
            what = f"the export is loaded by transformers to check it, which needs {LIBRARY} {OLDEST} or newer"
            here = "is not installed" if found is None else f"is {found} here"
            yield Problem("export.format", f"{what}; it {here}", (), "pip install 'wrapq[export]'")
        yield from self._translate(plan).problems

    def export(self, model: nn.Module, plan: Plan, folder: Folder) -> None:
        """See `Exporter.export`."""
        from safetensors.torch import save_file

        said = self._translate(plan)
        if said.problems:
            raise PlanError(said.problems)
        tensors = _tensors(model, said.schemes, getattr(torch, plan.recipe.model.dtype))
        if self.options.reader == VLLM and (wrong := next(unequal_global_scales(tensors), None)):
            raise ModelError(f"{wrong}: run the recipe again, or give vLLM up with export.reader=transformers")
        folder.write(WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
        config = json.loads(cast(Any, model).config.to_json_string())
        config.pop("_name_or_path", None)  # where the float model lay on this machine
        config["dtype"] = plan.recipe.model.dtype
        config["quantization_config"] = quantization_config(said, linear_layers(model))
        folder.write_text(CONFIG, json.dumps(config, indent=2) + "\n")

    def read(self, folder: Path, ids: Tensor, device: str) -> Reading:
        """See `Exporter.read`."""
        logits, reason = read(folder, ids, device)
        if not logits:
            raise ModelError(f"transformers does not load the export: {reason}")
        return reading(logits)

    def layers(self, plan: Plan) -> Iterable[str]:
        """See `Exporter.layers`."""
        said = self._translate(plan)
        schemes = {scheme.key: scheme for scheme in said.schemes.values()}
        counts = Counter(scheme.key for scheme in said.schemes.values())
        for key, scheme in schemes.items():
            yield f"{scheme.format}: {counts[key]} layers, {describe(scheme).removeprefix('is ')}"
        if said.cache is not None:
            yield f"kv_cache_scheme: {words(said.cache)}"

    def notes(self, plan: Plan) -> Iterable[str]:
        """See `Exporter.notes`."""
        dtype, specs = plan.recipe.model.dtype, [spec for points in plan.specs().values() for spec in points.values()]
        if self.options.reader == VLLM:
            yield from dict.fromkeys(filter(None, map(linear_note, self._translate(plan).schemes.values())))
        if dtype != "float32" and any(spec.scale_dtype == "float32" and not spec.dynamic for spec in specs):
            yield f"scales are rounded to {dtype}, the model's dtype; scale={dtype} in a spec calibrates with such ones"

    def tolerance(self, plan: Plan) -> float:
        """See `Exporter.tolerance`."""
        dtype = plan.recipe.model.dtype
        points = [point for module in plan.modules for point in module.points if point.role == "activation"]
        if not points:
            return _ROUNDING[dtype]
        fine = all(point.quant_spec.dtype.bits >= _FINE_BITS for point in points)
        return _STEP[dtype] if fine else _COARSE_STEP

    def _translate(self, plan: Plan) -> Translation:
        return translate(plan, self.options.reader)


def reading(logits: Mapping[str, Tensor]) -> Reading:
    """What `reload` found, with how it had to load."""
    ((how, values),) = logits.items()
    said = {DEQUANTIZED: _DEQUANTIZED, FLOAT_CACHE: _FLOAT_CACHE}
    versions = {"version": _version(), "transformers": version("transformers")}
    notes = tuple(note.format(**versions) for word, note in said.items() if word in how)
    return Reading(values, notes, frozenset(CACHE_NAMES if FLOAT_CACHE in how else ()))


def quantization_config(said: Translation, layers: Iterable[str]) -> Args:
    """The section of `config.json`; `layers` are all linear layers of the model."""
    targets: dict[str, list[str]] = {}
    for name, scheme in said.schemes.items():
        targets.setdefault(scheme.key, []).append(name)
    schemes = {scheme.key: scheme for scheme in said.schemes.values()}
    one = len(schemes) == 1
    everything = ["Linear", *said.outside]  # vLLM's output layer has another class
    groups = {
        f"group_{i}": schemes[key].group(everything if one else names) for i, (key, names) in enumerate(targets.items())
    }
    formats = sorted({scheme.format for scheme in schemes.values()})
    return {
        "quant_method": LIBRARY,
        "version": _version(),
        "format": formats[0] if len(formats) == 1 else MIXED if formats else DENSE,
        "quantization_status": "compressed",  # without it readers take the packed weights for missing ones
        "config_groups": groups,
        "ignore": [name for name in layers if name not in said.schemes],
        "kv_cache_scheme": said.cache,
        "global_compression_ratio": None,
    }


def linear_layers(model: nn.Module) -> list[str]:
    """The names of all linear layers, those whose tensors are tied to another's included."""
    modules = model.named_modules(remove_duplicate=False)
    return [name for name, module in modules if isinstance(module, nn.Linear)]


def _tensors(model: nn.Module, schemes: Mapping[str, Scheme], dtype: torch.dtype) -> dict[str, Tensor]:
    """Everything that the checkpoint holds: packed layers, cache scales, the rest as it is, tied tensors once."""
    quantized = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedModule)}
    own = {f"{name}.{key}" for name, module in quantized.items() for key in _stored(module)}
    tensors: dict[str, Tensor] = {}
    seen: set[tuple[int, torch.Size]] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        place = (tensor.data_ptr(), tensor.shape)
        if name not in own and not (tensor.numel() and place in seen):
            seen.add(place)
            tensors[name] = tensor
    for name, module in quantized.items():
        if isinstance(module, QuantizedWeight):
            made = linear_tensors(module, schemes[name], name)
        else:
            made = _cache_tensors(module, dtype)
        tensors |= {f"{name}.{key}": tensor for key, tensor in made.items()}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _stored(module: QuantizedModule) -> list[str]:
    """The tensors that the module holds for its points."""
    table = {**module._parameters, **module._buffers}
    return [key for key in table if any(key.startswith(f"{point}_") for point in module.specs)]


def _cache_tensors(module: QuantizedModule, dtype: torch.dtype) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for point, name in CACHE_NAMES.items():
        tensors |= activation_tensors(name, module.qparams(point), dtype)
    return tensors


def _version() -> str | None:
    try:
        return version(LIBRARY)
    except PackageNotFoundError:
        return None
