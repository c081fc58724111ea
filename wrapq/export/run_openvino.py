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

MODEL, LOGITS, PAST, PRESENT = "openvino_model.xml", "logits", "past_key_values", "present"
"""The file of a model, as optimum names it; the rest as in `run_onnx`, from which it is made."""


def main(folder: str, ids: str, logits: str, device: str) -> None:
    """See the module."""
    import openvino

    threads = int(os.environ.get("OMP_NUM_THREADS", "0"))
    wanted: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    model: Any = openvino.Core().compile_model(str(Path(folder, MODEL)), "CPU", wanted)
    kept = {each.any_name: each.partial_shape for each in model.inputs if each.any_name.startswith(PAST)}

    def nothing_before(batch: int) -> dict[str, np.ndarray]:
        sizes = {name: (batch, shape[1].get_length(), 0, shape[3].get_length()) for name, shape in kept.items()}
        return {name: np.zeros(size, np.float32) for name, size in sizes.items()}

    def run(tokens: np.ndarray, length: int, past: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        mask = np.ones((len(tokens), length), np.int64)
        done = model({"input_ids": tokens, "attention_mask": mask, **past})
        return {each.any_name: done[each].copy() for each in model.outputs}

    def generate(prompt: np.ndarray, count: int) -> np.ndarray:
        past, found, length = nothing_before(len(prompt)), [prompt], 0
        for _ in range(count):
            length += found[-1].shape[1]
            done = run(found[-1], length, past)
            found.append(done.pop(LOGITS)[:, -1:].argmax(-1))
            past = {name.replace(PRESENT, PAST): value for name, value in done.items()}
        return np.concatenate(found[1:], 1)

    tokens = load_file(ids)["ids"]
    values = run(tokens, tokens.shape[1], nothing_before(len(tokens)))[LOGITS]
    measured = runpy.run_path(str(Path(__file__).with_name("stopwatch.py")))["measured"](generate, tokens[:1])
    Path(logits).write_bytes(save({LOGITS: values, **measured}))


if __name__ == "__main__":
    main(*sys.argv[1:])
