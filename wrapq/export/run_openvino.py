"""Running an OpenVINO model as its users will: in a fresh process, with nothing of wrapq imported.

As a script, `run_openvino.py FOLDER IDS LOGITS DEVICE`, as `wrapq.export.reload`; the device is a CPU.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save

MODEL = "openvino_model.xml"
"""The file of a model, as optimum names it."""


def main(folder: str, ids: str, logits: str, device: str) -> None:
    """See the module."""
    import openvino

    threads = int(os.environ.get("OMP_NUM_THREADS", "0"))
    wanted: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    model: Any = openvino.Core().compile_model(str(Path(folder, MODEL)), "CPU", wanted)
    given, stopwatch = load_file(ids), runpy.run_path(str(Path(__file__).with_name("stopwatch.py")))
    if "ids" not in given:

        def call(arrays: list[np.ndarray]) -> list[np.ndarray]:
            done = model(arrays)
            return [done[each].copy() for each in model.outputs]

        Path(logits).write_bytes(save(stopwatch["called"](call, given)))
        return
    tokens = given["ids"]
    kept = {each.any_name: each.partial_shape for each in model.inputs if len(each.partial_shape) == 4}

    def nothing_before(batch: int) -> dict[str, np.ndarray]:
        sizes = {name: (batch, shape[1].get_length(), 0, shape[3].get_length()) for name, shape in kept.items()}
        return {name: np.zeros(size, np.float32) for name, size in sizes.items()}

    def run(given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        done = model(given)
        return {each.any_name: done[each].copy() for each in model.outputs}

    def generate(prompt: np.ndarray, count: int) -> Any:
        return stopwatch["greedy"](run, prompt, nothing_before(len(prompt)), count)

    values = run(stopwatch["inputs"](tokens, nothing_before(len(tokens))))[stopwatch["LOGITS"]]
    measured = stopwatch["measured"](generate, tokens[:1])
    Path(logits).write_bytes(save({stopwatch["LOGITS"]: values, **measured}))


if __name__ == "__main__":
    main(*sys.argv[1:])
