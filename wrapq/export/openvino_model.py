"""A model that OpenVINO runs, on CPUs and on Intel's graphics and neural units: made of the ONNX model, with weights in
the bits that they have, and integer products where inputs have fixed ranges."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

from wrapq.errors import ModelError, first_line
from wrapq.export import run_openvino
from wrapq.export.base import EXPORTERS, Folder
from wrapq.export.onnx_model import Onnx, save_onnx
from wrapq.export.run_openvino import MODEL
from wrapq.export.stopwatch import PAST
from wrapq.quant.spec import QuantSpec
from wrapq.resolve.plan import ModulePlan, Plan

_STEP = 5e-2
"""It rounds the inputs of products with compressed weights to 8 bits in groups by itself."""


@EXPORTERS.register("openvino")
class OpenVino(Onnx):
    """Exporter of OpenVINO models, which compute in float32 but for products of integers."""

    weights: ClassVar[str] = f"{Path(MODEL).stem}.*"
    extra: ClassVar[tuple[str, tuple[str, ...]]] = "openvino", (*Onnx.extra[1], "openvino")
    runtime: ClassVar[tuple[str, str]] = "OpenVINO", run_openvino.__file__
    outright: ClassVar[bool] = False

    def inexpressible(self, spec: QuantSpec, weight: bool) -> str | None:
        if not weight and not spec.dynamic and not 4 < spec.dtype.bits <= 8:
            return "between operators OpenVINO has integers of 8 bits"
        return super().inexpressible(spec, weight)

    def save(self, made: Any, folder: Folder) -> None:
        import openvino

        with tempfile.TemporaryDirectory() as scratch:
            save_onnx(made, Path(scratch, "model.onnx"))
            try:
                converted = openvino.convert_model(Path(scratch, "model.onnx"))
            except RuntimeError as error:
                raise ModelError(f"OpenVINO does not take this model: {first_line(error)}") from error
            folder.write_files(lambda path: openvino.save_model(converted, path / MODEL, compress_to_fp16=False))

    def layers(self, plan: Plan) -> Iterable[str]:
        yield f"{MODEL}: {len(plan.modules)} modules"

    def notes(self, plan: Plan) -> Iterable[str]:
        yield f"openvino.Core().compile_model('{MODEL}') takes input_ids, attention_mask and {PAST}.*, empty at first"
        if plan.model.dtype != "float32":
            yield f"{MODEL} holds in float32 what is not quantized, where the model is in {plan.model.dtype}"

    def rounding(self, modules: Iterable[ModulePlan], dtype: str) -> float:
        return max(_STEP, super().rounding(modules, dtype))
