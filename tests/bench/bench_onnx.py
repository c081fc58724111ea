"""The same bits in onnxruntime, by wrapq and by onnxruntime's own quantizers: what they keep, and what they cost there.

    python -m tests.bench.bench_onnx [--model FOLDER] [--samples 64]

The shipped model, or a checkpoint in float32; calibrated on the same tokens, judged on the same 16 x 128 held-out ones
against the float model in onnxruntime. The head stays float with all of them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

import wrapq
from tests.exports import export_of
from wrapq.data.samples import build_samples
from wrapq.data.sources.base import make_source
from wrapq.evaluation.quality import QualityMeter
from wrapq.export.onnx_model import onnx_model
from wrapq.export.run_onnx import MODEL, nothing_before
from wrapq.export.stopwatch import LOGITS
from wrapq.recipe.compose import compose
from wrapq.resolve.model_source import ModelSource

WINDOWS, LENGTH, CALIBRATED = 16, 128, 256
RECIPES = {"W4 g128": "onnx_w4a16", "W8A8 static": "onnx_w8a8"}


def given(session: Any, ids: np.ndarray) -> dict[str, np.ndarray]:
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), **nothing_before(session, len(ids))}


class Tokens(CalibrationDataReader):
    """The calibration tokens, a sequence at a time."""

    def __init__(self, session: Any, ids: Tensor) -> None:
        self.batches: Iterator[dict[str, np.ndarray]] = iter([given(session, part.numpy()) for part in ids.split(1)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)


def heads(path: Path) -> list[str]:
    """The nodes that make the logits."""
    graph = onnx.load(path).graph
    return [node.name for node in graph.node if LOGITS in node.output]


def theirs(scheme: str, floating: Path, ids: Tensor, folder: Path) -> dict[str, Path]:
    """onnxruntime's own quantizers on the float model."""
    ready = folder / "ready.onnx"
    quant_pre_process(str(floating), str(ready), skip_symbolic_shape=True)
    made: dict[str, Path] = {}
    if scheme == "W4 g128":
        quantizer = MatMulNBitsQuantizer(
            onnx.load(ready), block_size=128, is_symmetric=True, nodes_to_exclude=heads(ready)
        )
        quantizer.process()
        made["onnxruntime, MatMulNBitsQuantizer"] = folder / "nbits.onnx"
        quantizer.model.save_model_to_file(str(folder / "nbits.onnx"))
        return made
    session = onnxruntime.InferenceSession(floating)
    out = folder / "static.onnx"
    quantize_static(
        str(ready), str(out), Tokens(session, ids), quant_format=QuantFormat.QDQ, op_types_to_quantize=["MatMul"],
        per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, nodes_to_exclude=heads(ready),
        extra_options={"MatMulConstBOnly": True},
    )  # fmt: skip
    made["onnxruntime, quantize_static"] = out
    return made


def measured(path: Path, reference: Path, ids: Tensor) -> dict[str, float]:
    """What a model keeps of the float one, and its times in ms for 128 tokens and for one more."""
    meter, sessions = QualityMeter(), [onnxruntime.InferenceSession(each) for each in (reference, path)]
    for part in ids.split(4):
        found = [torch.from_numpy(s.run([LOGITS], given(s, part.numpy()))[0]) for s in sessions]
        meter.update(found[0], found[1], part)
    session, prompt = sessions[1], ids[:1].numpy()
    times = []
    for _ in range(9):
        start = time.perf_counter()
        session.run(None, given(session, prompt))
        times.append(1000 * (time.perf_counter() - start))
    size = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*")) / 1e6
    return row(meter, size, sorted(times)[4])


def row(meter: QualityMeter, megabytes: float, milliseconds: float) -> dict[str, float]:
    """What is printed of a model."""
    result = meter.result()
    figures = {"kl": round(result["kl"], 5), "top1": round(result["top1_agreement"], 4)}
    return figures | {"mb": round(megabytes, 2), "ms": round(milliseconds, 2)}


def asked(description: str | None) -> tuple[list[str], int]:
    """The overrides that choose the model, and how many sequences calibrate it, from the command line."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="")
    options.add_argument("--samples", type=int, default=64)
    chosen = options.parse_args()
    return [f"model.path={chosen.model}", "model=hf"] if chosen.model else [], chosen.samples


@torch.no_grad()
def main() -> None:
    words, samples = asked(__doc__)
    disable_progress_bar()
    source = ModelSource(compose(["recipe=onnx_w4a16", *words]).recipe.model)
    tokenizer = source.tokenizer()
    texts = {name: make_source("demo", {"split": name}) for name in ("calib", "heldout")}
    calibration = build_samples(texts["calib"], tokenizer, samples, CALIBRATED, 0).input_ids
    evaluated = build_samples(texts["heldout"], tokenizer, WINDOWS, LENGTH, None).input_ids
    with tempfile.TemporaryDirectory() as scratch:
        floating = Path(scratch, "float.onnx")
        onnx_ir.save(onnx_model(source.load(torch.device("cpu"))), floating)
        print(json.dumps({"by": "float"} | measured(floating, floating, evaluated)), flush=True)
        for scheme, recipe in RECIPES.items():
            more = [f"calibration.samples={samples}", "tracking=none", "runtime.kernels=reference"]
            run = wrapq.run(recipe, [*words, *more, "evaluation.tokens=512", f"paths.outputs={scratch}/{recipe}"])
            models = {"wrapq": export_of(run).path / MODEL, **theirs(scheme, floating, calibration, Path(scratch))}
            for by, path in models.items():
                print(json.dumps({"scheme": scheme, "by": by} | measured(path, floating, evaluated)), flush=True)


if __name__ == "__main__":
    main()
