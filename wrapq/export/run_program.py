"""Running a program of `torch.export`, or what AOTInductor made of it, as its users will: in a fresh process, with
nothing of wrapq imported.

As a script, `run_program.py FOLDER IDS LOGITS DEVICE`, as `wrapq.export.reload`.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save

PROGRAM, COMPILED, LOGITS = "model.pt2", "compiled.pt2", "logits"
"""The file of a program, that of a compiled one, and what the logits are called."""


def main(folder: str, ids: str, logits: str, device: str) -> None:
    """See the module."""
    program = _program(Path(folder), device)
    given, stopwatch = load_file(ids, device), runpy.run_path(str(Path(__file__).with_name("stopwatch.py")))
    if "ids" not in given:
        made = stopwatch["called"](lambda inputs: _called(program, inputs), given)
        Path(logits).write_bytes(save({name: torch.from_numpy(array) for name, array in made.items()}))
        return
    tokens = given["ids"]

    @torch.no_grad()
    def run(ids: torch.Tensor) -> torch.Tensor:
        return program(input_ids=ids, attention_mask=torch.ones_like(ids)).float().cpu().contiguous()

    again = lambda ids: run(torch.from_numpy(ids).to(device)).numpy()  # noqa: E731
    measured = stopwatch["measured_anew"](again, tokens[:1].cpu().numpy())
    Path(logits).write_bytes(save({LOGITS: run(tokens), **{name: torch.from_numpy(t) for name, t in measured.items()}}))


@torch.no_grad()
def _called(program: Any, inputs: list[torch.Tensor]) -> list[np.ndarray]:
    return [each.float().cpu().numpy() for each in program(*inputs)]


def _program(folder: Path, device: str) -> Any:
    if (compiled := folder / COMPILED).is_file():  # for the device of the model it was made of
        return torch._inductor.aoti_load_package(str(compiled))
    import torchao  # noqa: F401 - which registers the operators

    return torch.export.load(folder / PROGRAM).module().to(device)


if __name__ == "__main__":
    main(*sys.argv[1:])
