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

MODEL, LOGITS, PAST, PRESENT = "model.onnx", "logits", "past_key_values", "present"
"""The file of a model; what its logits, and the keys and values of tokens before and of all, are called."""


def main(folder: str, ids: str, logits: str, device: str) -> None:
    """See the module."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", "0"))
    providers = ["CUDAExecutionProvider"] * device.startswith("cuda") + ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(str(Path(folder, MODEL)), options, providers=providers)
    tokens = load_file(ids)["ids"]
    given = {"input_ids": tokens, "attention_mask": np.ones_like(tokens), **nothing_before(session, len(tokens))}
    values = session.run([LOGITS], given)[0].astype(np.float32)
    names = [each.name for each in session.get_outputs()]

    def generate(prompt: np.ndarray, count: int) -> np.ndarray:
        past, found, length = nothing_before(session, len(prompt)), [prompt], 0
        for _ in range(count):
            length += found[-1].shape[1]
            mask = np.ones((len(prompt), length), np.int64)
            given = {"input_ids": found[-1], "attention_mask": mask, **past}
            done = dict(zip(names, session.run(names, given), strict=True))
            found.append(done.pop(LOGITS)[:, -1:].argmax(-1))
            past = {name.replace(PRESENT, PAST): kept for name, kept in done.items()}
        return np.concatenate(found[1:], 1)

    stopwatch = runpy.run_path(str(Path(__file__).with_name("stopwatch.py")))
    Path(logits).write_bytes(save({LOGITS: values, **stopwatch["measured"](generate, tokens[:1])}))


def nothing_before(session: Any, batch: int) -> dict[str, np.ndarray]:
    """Keys and values of no tokens, for each layer that keeps some."""
    kept = [each for each in session.get_inputs() if each.name.startswith(PAST)]
    return {each.name: np.zeros((batch, each.shape[1], 0, each.shape[3]), np.float32) for each in kept}


if __name__ == "__main__":
    main(*sys.argv[1:])
