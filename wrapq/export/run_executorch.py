"""Running a program of ExecuTorch as its users will: in a fresh process, with nothing of wrapq imported.

As a script, `run_executorch.py FOLDER IDS LOGITS DEVICE`, as `wrapq.export.reload`; the device is a CPU.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

MODEL, METHOD = "model.pte", "forward"
"""The file of a program, and its method."""


def main(folder: str, ids: str, logits: str, device: str) -> None:
    """See the module."""
    from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
    from executorch.runtime import Runtime

    _unsafe_reset_threadpool(int(os.environ.get("OMP_NUM_THREADS", "1")))  # the one way to say how many
    program = Runtime.get().load_program(Path(folder, MODEL))
    method: Any = program.load_method(METHOD)
    given, stopwatch = load_file(ids), runpy.run_path(str(Path(__file__).with_name("stopwatch.py")))
    if "ids" not in given:
        made = stopwatch["called"](lambda inputs: [each.numpy().copy() for each in method.execute(inputs)], given)
        Path(logits).write_bytes(save({name: torch.from_numpy(array) for name, array in made.items()}))
        return
    tokens = given["ids"]
    output = torch.cat([method.execute([row])[0].clone() for row in tokens.split(1)])
    _, longest = method.metadata.input_tensor_meta(0).sizes()
    run = lambda ids: method.execute([torch.from_numpy(ids)])[0].numpy()  # noqa: E731
    measured = stopwatch["measured_anew"](run, tokens[:1].numpy(), longest)
    written = {stopwatch["LOGITS"]: output, **{name: torch.from_numpy(t) for name, t in measured.items()}}
    Path(logits).write_bytes(save(written))


if __name__ == "__main__":
    main(*sys.argv[1:])
