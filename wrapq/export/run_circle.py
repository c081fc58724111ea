"""Running a Circle model in tico's reference runtime, in a fresh process, with nothing of wrapq imported.

As a script, `run_circle.py FOLDER IDS LOGITS DEVICE`, as `wrapq.export.reload`; the device is a CPU.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save

MODEL = "model.circle"
"""The file of a model."""


def main(folder: str, ids: str, logits: str, device: str) -> None:
    """See the module."""
    from tico.circle.runtime import CircleReferenceRuntime, ExecutionMode

    model = CircleReferenceRuntime(Path(folder, MODEL).read_bytes())
    given, stopwatch = load_file(ids), runpy.run_path(str(Path(__file__).with_name("stopwatch.py")))
    if "ids" not in given:
        made = stopwatch["called"](lambda arrays: model.run(arrays, mode=ExecutionMode.FAKE_QUANTIZE).outputs, given)
        Path(logits).write_bytes(save(made))
        return
    tokens, length = given["ids"], model.input_tensors[0].shape[1]
    if tokens.shape[1] > length:
        sys.exit(f"{MODEL} takes {length} tokens, not {tokens.shape[1]}")

    def run(row: np.ndarray) -> np.ndarray:
        padded = np.pad(row, ((0, 0), (0, length - row.shape[1])))  # no token sees those after it
        return model.run([padded], mode=ExecutionMode.FAKE_QUANTIZE).outputs[0][:, : row.shape[1]]

    output = np.concatenate([run(row[None]) for row in tokens])
    measured = stopwatch["measured_anew"](run, tokens[:1], length)
    Path(logits).write_bytes(save({stopwatch["LOGITS"]: np.ascontiguousarray(output), **measured}))


if __name__ == "__main__":
    main(*sys.argv[1:])
