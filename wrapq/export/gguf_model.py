"""A GGUF file, which llama.cpp and what is built on it run: the integers of weights as they are, in ggml's types."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from wrapq.errors import ModelError, PlanError, Problem
from wrapq.export import run_gguf
from wrapq.export.additions import refuse_corrections, refuse_online
from wrapq.export.base import EXPORTERS, Exporter, Folder, Reading, Refusals
from wrapq.export.gguf.architectures import ARCHITECTURES, context_length, why_not
from wrapq.export.gguf.ggml_types import NEAREST, nearest_type, type_of
from wrapq.export.gguf.vocabulary import vocabulary
from wrapq.export.gguf.writer import write_gguf
from wrapq.export.program import run_script
from wrapq.export.run_gguf import MODEL
from wrapq.resolve.model_source import ModelSource
from wrapq.resolve.plan import Plan

_MATRICES = ("Linear", "Conv1D", "Embedding")
_ANOTHER = "run with export=none, or export=onnx"
_ROUNDED = 5e-2
"""It rounds the inputs of products to 8 bits and keys and values to half precision."""


@EXPORTERS.register("gguf")
class Gguf(Exporter):
    """Exporter of GGUF files."""

    weights: ClassVar[str] = MODEL
    extra: ClassVar[tuple[str, tuple[str, ...]]] = "gguf", ("gguf", "llama-cpp-python")

    def check(self, plan: Plan) -> Iterable[Problem]:
        source = ModelSource(plan.recipe.model)
        yield from _refused(plan, source.hf_config, source.tokenizer())
        yield from self.missing_packages()

    def export(self, model: nn.Module, plan: Plan, folder: Folder) -> None:
        from transformers import AutoTokenizer

        config: Any = model.config
        tokenizer = AutoTokenizer.from_pretrained(folder.path, trust_remote_code=False)
        if problems := list(_refused(plan, config, tokenizer)):
            raise PlanError(problems)
        dtype = getattr(torch, plan.model.dtype)
        folder.write(MODEL, lambda path: write_gguf(model, tokenizer, path, plan.recipe.name, dtype))

    def read(self, folder: Path, ids: Tensor, device: str) -> Reading:
        return run_script("llama.cpp", run_gguf.__file__, folder, ids, device)

    def layers(self, plan: Plan) -> Iterable[str]:
        found = Counter((type_of(p.quant_spec), p.spec) for module in plan.modules for p in module.points)
        for (name, spec), count in found.items():
            yield f"{name}: {count} weights in {spec}"

    def notes(self, plan: Plan) -> Iterable[str]:
        yield f"llama-cli -m {MODEL} runs it; llama.cpp rounds the inputs of products to 8 bits by itself"
        specs = [point.quant_spec for module in plan.modules for point in module.points]
        if any(spec.scale_dtype == "float32" for spec in specs):
            yield "scales are rounded to half precision; scale=float16 in a spec calibrates with such ones"
        if any(not spec.symmetric and spec.zero_point != "min" for spec in specs):
            yield "the least number of each group is rounded to half precision, where wrapq has a zero point"
        config, architecture = ModelSource(plan.recipe.model).hf_config, ARCHITECTURES[plan.model.type]
        if (length := context_length(config, architecture)) < config.max_position_embeddings:
            what = f"llama.cpp's {architecture.name} has no layers that look back over a window only"
            yield f"its context is {length} tokens, the window of attention: {what}"

    def tolerance(self, plan: Plan) -> float:
        return _ROUNDED


def _refused(plan: Plan, config: Any, tokenizer: Any) -> Iterator[Problem]:
    """What of a plan for a model with this configuration and tokenizer llama.cpp does not run."""
    refusals = Refusals()
    for module in plan.modules:
        for point in module.points:
            spec = point.quant_spec
            if point.role == "activation":
                what = f"{point.name} in {point.spec}: llama.cpp rounds what it multiplies and keeps by itself"
                refusals.refuse(module, what, "leave it float, as the schemes w4a16 and w8a16 do")
            elif module.wrapper not in _MATRICES:
                refusals.refuse(module, f"llama.cpp quantizes matrices, not {module.type}", "leave it float")
            elif type_of(spec) is None:
                name = nearest_type(spec)
                what = f"{point.name} in {point.spec}: no type of ggml that wrapq writes holds its codes"
                refusals.refuse(module, what, f"the nearest that it has is {NEAREST[name]} ({name})")
    if plan.recipe.float_prefix:
        what = "llama.cpp has no word for first tokens that stay float"
        refusals.refused["", what, "run with float_prefix=0, or with export=none"] = ["float_prefix"]
    refuse_corrections(plan, refusals, "llama.cpp")
    refuse_online(plan, refusals)
    yield from refusals.problems
    if (architecture := ARCHITECTURES.get(plan.model.type)) is None:
        what = f"wrapq writes no {plan.model.type} for llama.cpp, but {', '.join(ARCHITECTURES)}"
        yield Problem("", "export.gguf", what, (), _ANOTHER)
        return
    for reason in why_not(config, architecture):
        yield Problem("", "export.gguf", reason, (), _ANOTHER)
    try:
        vocabulary(tokenizer)
    except ModelError as error:
        yield Problem("", "export.gguf", str(error), (), _ANOTHER)
