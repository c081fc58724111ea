"""Running an ONNX model as its users will: by onnxruntime in a fresh process, with nothing of wrapq imported.

As a script, `run_onnx.py FOLDER IDS LOGITS DEVICE`, as `wrapq.export.reload`.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save

MODEL = "model.onnx"
"""The file of a model."""


def main(folder: str, ids: str, logits: str, device: str) -> None:
    """See the module."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", "0"))
    providers = ["CUDAExecutionProvider"] * device.startswith("cuda") + ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(str(Path(folder, MODEL)), options, providers=providers)
    given, names = load_file(ids), [each.name for each in session.get_outputs()]
    stopwatch = runpy.run_path(str(Path(__file__).with_name("stopwatch.py")))
    if "ids" not in given:
        inputs = [each.name for each in session.get_inputs()]
        made = stopwatch["called"](lambda arrays: session.run(names, dict(zip(inputs, arrays, strict=True))), given)
        Path(logits).write_bytes(save(made))
        return
    tokens = given["ids"]

    def run(given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(names, session.run(names, given), strict=True))

    def generate(prompt: np.ndarray, count: int) -> Any:
        return stopwatch["greedy"](run, prompt, nothing_before(session, len(prompt)), count)

    values = run(stopwatch["inputs"](tokens, nothing_before(session, len(tokens))))[stopwatch["LOGITS"]]
    measured = stopwatch["measured"](generate, tokens[:1])
    Path(logits).write_bytes(save({stopwatch["LOGITS"]: values, **measured}))


def nothing_before(session: Any, batch: int) -> dict[str, np.ndarray]:
    """Keys and values of no tokens, for each layer that keeps some."""
    kept = [each for each in session.get_inputs() if len(each.shape) == 4]
    return {each.name: np.zeros((batch, each.shape[1], 0, each.shape[3]), np.float32) for each in kept}


if __name__ == "__main__":
    main(*sys.argv[1:])
