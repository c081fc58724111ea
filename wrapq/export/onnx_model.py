"""A model in ONNX that onnxruntime, OpenVINO and others run: token ids, attention mask and the keys and values kept of
the tokens before in, logits and the keys and values of all tokens out."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from keyword import iskeyword
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from wrapq.errors import ModelError, Problem, first_line
from wrapq.export import run_onnx
from wrapq.export.base import EXPORTERS, Folder
from wrapq.export.lowering import NEEDED, in_float32, lower
from wrapq.export.program import OPEN, Example, ProgramExporter, example_ids, traced
from wrapq.export.run_onnx import MODEL
from wrapq.export.stopwatch import LOGITS, OUTPUT, PAST, PRESENT
from wrapq.foreign import quiet
from wrapq.resolve.model_source import ModelSource
from wrapq.resolve.plan import Plan
from wrapq.runtime.prefix import CACHES

_LARGEST = 2**31 - 2**20
"""Bytes of weights that one file may hold: the format is a protocol buffer."""
_BEFORE = 3  # tokens that the example has a cache of
_UNPACKED = "session.disable_quant_qdq=1"
_LOUD = ("torch.onnx", "onnxscript", "onnx_ir")


class LogitsAndCache(nn.Module):
    """A language model as a function of token ids [B, T], the attention mask [B, P + T] and, in turn, keys and values
    [B, H, P, D] that each layer kept of P tokens before; its results are the logits and those of all tokens."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        accepted = inspect.signature(cast(Any, model).forward).parameters
        self.cache = next(name for name in CACHES if name in accepted or name == CACHES[-1])

    def forward(self, input_ids: Tensor, attention_mask: Tensor, past: Sequence[Tensor]) -> tuple[Tensor, ...]:
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        kept = {self.cache: cache, "use_cache": True}
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask, **kept).logits
        return logits, *(cast(Tensor, t) for layer in cast(Any, cache).layers for t in (layer.keys, layer.values))


@EXPORTERS.register("onnx")
class Onnx(ProgramExporter):
    """Exporter of ONNX models, which compute in float32."""

    weights: ClassVar[str] = f"{MODEL}*"
    extra: ClassVar[tuple[str, tuple[str, ...]]] = "onnx", (NEEDED, "onnxscript", "onnxruntime")
    runtime: ClassVar[tuple[str, str]] = "onnxruntime", run_onnx.__file__
    in_float32: ClassVar[bool] = True
    outright: ClassVar[bool] = True
    """See `onnx_model`."""

    def check(self, plan: Plan) -> Iterable[Problem]:
        yield from super().check(plan)
        if not _keeps_tokens(ModelSource(plan.recipe.model).hf_config):
            what = f"{plan.model.type} keeps more of tokens than keys and values, which this format hands over"
            yield Problem("", "export", what, (), "run with export=none, or export=torch_export")

    def write(self, model: nn.Module, folder: Folder) -> None:
        self.save(onnx_model(model, self.outright), folder)

    def write_module(self, model: nn.Module, example: Example, folder: Folder) -> None:
        program = example.traced(in_float32(lower(model)))
        outputs = [f"{OUTPUT}{i}" for i in range(len(program.graph_signature.user_outputs))]
        self.save(translated(program, [*example.inputs], outputs, self.outright), folder)

    def save(self, made: Any, folder: Folder) -> None:
        """Write an `onnx_ir.Model`."""
        folder.write_files(lambda path: save_onnx(made, path / MODEL))

    def layers(self, plan: Plan) -> Iterable[str]:
        yield f"{MODEL}: {len(plan.modules)} modules in QuantizeLinear, DequantizeLinear and MatMulNBits"

    def notes(self, plan: Plan) -> Iterable[str]:
        yield f"onnxruntime.InferenceSession('{MODEL}') takes input_ids, attention_mask and {PAST}.*, empty at first"
        if plan.model.dtype != "float32":
            yield f"{MODEL} computes in float32 and holds the rest in it, where the model is in {plan.model.dtype}"
        points = [point for module in plan.modules for point in module.points if point.role == "weight"]
        if any(point.quant_spec.dtype.kind == "float" for point in points):
            yield f"on a CPU onnxruntime unpacks fp8 weights at each product, and once in a session with {_UNPACKED}"


def save_onnx(model: Any, path: Path) -> None:
    """Write an `onnx_ir.Model` to `path`, and what is too large for one file beside it."""
    import onnx_ir

    size = sum(tensor.const_value.nbytes for tensor in model.graph.initializers.values())
    onnx_ir.save(model, path, format="protobuf", external_data=f"{path.name}.data" if size > _LARGEST else None)


def onnx_model(model: nn.Module, outright: bool = True) -> Any:
    """The converted language `model` in ONNX, an `onnx_ir.Model` of what `LogitsAndCache` computes, in float32.

    Args:
        model: the converted one.
        outright: say that integers are multiplied where ranges are found as tokens come, too; a runtime that is not
            onnxruntime may see better how itself.

    Raises:
        ModelError: it keeps more than keys and values, or torch.export or torch.onnx does not take it.
    """
    function, ids = LogitsAndCache(in_float32(lower(model))).eval(), example_ids(model, 2, 5)
    if not _keeps_tokens(cast(Any, model).config):
        raise ModelError(f"{type(model).__name__} keeps more of tokens than keys and values")
    with torch.no_grad():
        _, *kept = function(ids, torch.ones_like(ids), [])
    past = [torch.zeros(*each.shape[:2], _BEFORE, each.shape[3], device=ids.device) for each in kept]
    mask = torch.ones(len(ids), _BEFORE + ids.shape[1], dtype=ids.dtype, device=ids.device)
    open_axes = {"input_ids": (OPEN, OPEN), "attention_mask": (OPEN, OPEN), "past": [{0: OPEN, 2: OPEN} for _ in past]}
    given = {"input_ids": ids, "attention_mask": mask, "past": past}
    kept = [f"{i // 2}.{('key', 'value')[i % 2]}" for i in range(len(past))]
    names = [*given][:2] + [f"{PAST}.{name}" for name in kept], [LOGITS, *(f"{PRESENT}.{name}" for name in kept)]
    return translated(traced(function, given, open_axes), *names, outright)


def _keeps_tokens(config: Any) -> bool:
    """Whether what a language model of `config` keeps of tokens are keys and values, no state that takes them in."""
    from transformers import DynamicCache

    cache: Any = DynamicCache(config=config.get_text_config(decoder=True))
    return all(hasattr(layer, "keys") for layer in cache.layers)


def translated(program: Any, inputs: Sequence[str], outputs: Sequence[str], outright: bool) -> Any:
    """The program in ONNX, with names for its inputs and outputs; see `onnx_model`."""
    from wrapq.export.onnx.integer_products import separate
    from wrapq.export.onnx.packed_weights import pack
    from wrapq.export.onnx.translations import OPSET, TRANSLATIONS

    try:
        with quiet(*_LOUD):
            made: Any = torch.onnx.export(
                program,
                input_names=[*inputs],
                output_names=[*outputs],
                opset_version=OPSET,
                custom_translation_table=TRANSLATIONS,
                verbose=False,
            )
    except Exception as error:  # of what the exporter met in somebody else's code, there is no list
        raise ModelError(f"torch.onnx does not take this model: {_cause(error, program)}") from error
    pack(made.model)
    separate(made.model, outright)
    return made.model


def _cause(error: BaseException, program: Any) -> str:
    """What torch.onnx met, in a line; what it says itself, in colours, is at which step."""
    while error.__cause__ is not None:
        error = error.__cause__
    words = [word for name in program.state_dict for word in name.split(".") if iskeyword(word)]
    if isinstance(error, SyntaxError) and words:  # it writes modules out as a program
        return f"a module in it is called {words[0]!r}, a word that Python keeps for itself"
    return first_line(error)
