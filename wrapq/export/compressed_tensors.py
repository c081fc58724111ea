"""The checkpoint format of compressed-tensors, which transformers and vLLM load.

`config.json` says under `quantization_config` how each layer is quantized, and the tensors lie in `model.safetensors`
under the names of the library. Embeddings and norms stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import ClassVar, Literal

import torch
from packaging.version import Version
from pydantic import Field
from torch import Tensor, nn

from wrapq.errors import ModelError, PlanError, Problem
from wrapq.export.base import EXPORTERS, Exporter, Folder, Reading
from wrapq.export.checkpoint_names import CheckpointNames, checkpoint_names
from wrapq.export.checks import VLLM, Translation, translate
from wrapq.export.folder_checkpoint import all_tensors, read_checkpoint, write_checkpoint
from wrapq.export.reload import CONVERTED, DEQUANTIZED, FLOAT_CACHE, TRANSFORMED, Answer
from wrapq.export.scheme import DENSE, MIXED, Args, Scheme
from wrapq.export.tensors import CACHE_NAMES, activation_tensors, linear_tensors
from wrapq.export.transform_config import rotated_layers, rotation_notes, transform_config
from wrapq.export.vllm import describe, linear_note, unequal_global_scales, words
from wrapq.graph.mixtures import EXPERT_NAME
from wrapq.registry import Options
from wrapq.resolve.plan import Plan
from wrapq.runtime.module import QuantizedModule, QuantizedWeight
from wrapq.runtime.rotation import ONLINE

LIBRARY, OLDEST = "compressed-tensors", "0.15.0"
"""What transformers takes; up to 0.18 some formats do not load, which the comparison of every export shows."""
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
_TRANSFORMED = (
    "transformers {transformers} leaves the rotations at each forward out, so that what it loads is wrong until "
    "compressed_tensors.transform.apply_transform_config has put them in, with the matrices of the checkpoint; vLLM "
    "reads them"
)
_CONVERTED = (
    "transformers {transformers} does not know how to put these experts together: it loads them once "
    "register_checkpoint_conversion_mapping has told it, as docs/deploy.md shows"
)


class CompressedTensorsOptions(Options):
    """Options of the format."""

    reader: Literal["vllm", "transformers"] = Field(
        "vllm",
        description="vllm refuses what its kernels cannot run; transformers allows all that the format can say.",
    )


@EXPORTERS.register("compressed_tensors")
class CompressedTensors(Exporter):
    """Exporter of compressed-tensors checkpoints."""

    extra: ClassVar[tuple[str, tuple[str, ...]]] = "export", (LIBRARY,)
    Options = CompressedTensorsOptions
    options: CompressedTensorsOptions

    def check(self, plan: Plan) -> Iterable[Problem]:
        found = _version()
        if found is None or Version(found) < Version(OLDEST):
            what = f"the export is loaded by transformers to check it, which needs {LIBRARY} {OLDEST} or newer"
            here = "is not installed" if found is None else f"is {found} here"
            yield Problem("", "export.compressed_tensors", f"{what}; it {here}", (), "pip install 'wrapq[export]'")
        yield from self._translate(plan).problems

    def export(self, model: nn.Module, plan: Plan, folder: Folder) -> None:
        translation = self._translate(plan)
        if translation.problems:
            raise PlanError(translation.problems)
        dtype = getattr(torch, plan.model.dtype)
        tensors = all_tensors(model, _packed(model, translation.schemes, dtype))
        rotations = transform_config(model, rotated_layers(plan), dtype)
        tensors = {name: tensor for name, tensor in tensors.items() if f".{ONLINE}." not in name} | rotations.tensors
        if self.options.reader == VLLM and (wrong := next(unequal_global_scales(tensors), None)):
            raise ModelError(
                f"{wrong}: run the recipe again, or give vLLM up with export.compressed_tensors.reader=transformers"
            )
        names = checkpoint_names(plan.model.type) or CheckpointNames({})
        modules = model.named_modules(remove_duplicate=False)  # those whose tensors are tied to another's too
        linear = [name for name, module in modules if isinstance(module, nn.Linear)]
        linear += [name for name in translation.floats if name not in linear]  # experts within one tensor
        section = quantization_config(translation, linear, names.of_module) if plan.modules else {}
        section |= {"transform_config": rotations.section} if rotations.section else {}
        tensors = {names.of(name): tensor for name, tensor in tensors.items()}
        write_checkpoint(folder, model, plan.model.dtype, tensors, {}, section)

    def read(self, folder: Path, ids: Tensor, device: str) -> Reading:
        return reading(read_checkpoint(folder, ids, device))

    def layers(self, plan: Plan) -> Iterable[str]:
        translation = self._translate(plan)
        for scheme, names in translation.layers_by_scheme():
            yield f"{scheme.format}: {len(names)} layers, {describe(scheme).removeprefix('is ')}"
        if translation.cache is not None:
            yield f"kv_cache_scheme: {words(translation.cache)}"

    def notes(self, plan: Plan) -> Iterable[str]:
        dtype, specs = plan.model.dtype, [spec for points in plan.specs().values() for spec in points.values()]
        if self.options.reader == VLLM:
            yield from dict.fromkeys(filter(None, map(linear_note, self._translate(plan).schemes.values())))
            yield from rotation_notes(plan)
        if dtype != "float32" and any(spec.scale_dtype == "float32" and not spec.dynamic for spec in specs):
            yield f"scales are rounded to {dtype}, the model's dtype; scale={dtype} in a spec calibrates with such ones"

    def tolerance(self, plan: Plan) -> float:
        dtype = plan.model.dtype
        points = [point for module in plan.modules for point in module.points if point.role == "activation"]
        if not points:
            return _ROUNDING[dtype]
        fine = all(point.quant_spec.dtype.bits >= _FINE_BITS for point in points)
        return _STEP[dtype] if fine else _COARSE_STEP

    def _translate(self, plan: Plan) -> Translation:
        return translate(plan, self.options.reader)


def reading(answer: Answer) -> Reading:
    """What `reload` found, with how it had to load."""
    ((how, values),) = answer.logits.items()
    remarks = {DEQUANTIZED: _DEQUANTIZED, FLOAT_CACHE: _FLOAT_CACHE, TRANSFORMED: _TRANSFORMED, CONVERTED: _CONVERTED}
    versions = {"version": _version(), "transformers": version("transformers")}
    notes = tuple(note.format(**versions) for word, note in remarks.items() if word in how)
    left_float = frozenset(CACHE_NAMES if FLOAT_CACHE in how else ())
    return Reading(values, answer.measured, answer.tokens, notes, left_float)


def quantization_config(
    translation: Translation, layers: Iterable[str], named: Callable[[str], str] = lambda name: name
) -> Args:
    """The section of `config.json`; `layers` are all linear layers of the model, which the checkpoint calls as `named`
    does."""

    def both(names: Iterable[str]) -> list[str]:  # transformers looks for its modules, vLLM for those of the checkpoint
        return list(dict.fromkeys(each for name in names for each in (name, named(name))))

    found = translation.layers_by_scheme()
    if len(found) == 1:
        found = [(found[0][0], ["Linear", *translation.outside])]  # vLLM's output layer has another class
    # of several, transformers takes the first for that of experts
    found.sort(key=lambda each: not any(map(EXPERT_NAME.fullmatch, each[1])))
    groups = {f"group_{i}": scheme.group(both(names)) for i, (scheme, names) in enumerate(found)}
    formats = sorted({scheme.format for scheme, _ in found})
    return {
        "quant_method": LIBRARY,
        "version": _version(),
        "format": formats[0] if len(formats) == 1 else MIXED if formats else DENSE,
        "quantization_status": "compressed",  # without it readers take the packed weights for missing ones
        "config_groups": groups,
        "ignore": both(name for name in layers if name not in translation.schemes),
        "kv_cache_scheme": translation.cache,
        "global_compression_ratio": None,
    }


def _packed(model: nn.Module, schemes: Mapping[str, Scheme], dtype: torch.dtype) -> dict[str, dict[str, Tensor]]:
    """For each quantized module what the library stores for it: packed layers, and the scales of the cache."""
    packed: dict[str, dict[str, Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedWeight):
            packed[name] = linear_tensors(module, schemes[name], name)
        elif isinstance(module, QuantizedModule):
            made = [activation_tensors(key, module.qparams(point), dtype) for point, key in CACHE_NAMES.items()]
            packed[name] = {key: tensor for part in made for key, tensor in part.items()}
    return packed


def _version() -> str | None:
    try:
        return version(LIBRARY)
    except PackageNotFoundError:
        return None
