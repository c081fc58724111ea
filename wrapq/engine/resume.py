"""Putting a run aside after every block, and taking it up where it was killed, with the same bits.

In the run's folder, `resume/` holds one file with the points that each finished block decided, one with the hidden
states
between the last finished block and the next, and `state.json`, whose replacement makes a block count: whenever the run
dies, what `state.json` names is whole. The hidden states are kept as they were, not computed again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from wrapq.calibration.border import Border
from wrapq.calibration.walker import Walker
from wrapq.engine.folder import STATUS_FILE, RunFolder
from wrapq.errors import ModelError
from wrapq.wrappers.quantizer import Quantizer, State

STATE = "state.json"


class ChangedError(ModelError):
    """A run that cannot be taken up, since something that decides its result is no longer what it was."""


class Keeper:
    """Keeps a walk's progress in the folder of its run.

    Args:
        folder: the run's folder.
        fingerprint: digests of everything that decides the result; taking up needs every one of them equal.
    """

    def __init__(self, folder: RunFolder, fingerprint: Mapping[str, str]) -> None:
        self.path, self.fingerprint = folder.path / "resume", dict(fingerprint)
        self._kept: set[str] = set()

    def keep_hidden(self, block: int, batch: int, hidden: Tensor) -> None:
        """Write down the hidden states that enter a block."""
        folder = self.path / f"hidden-{block}"
        folder.mkdir(parents=True, exist_ok=True)
        RunFolder(folder).write(f"{batch}.safetensors", lambda path: save_file({"hidden": hidden.contiguous()}, path))

    def keep(self, walker: Walker, block: int, as_tuple: bool) -> None:
        """Write down everything decided before `block`, into which all hidden states have been kept."""
        self.path.mkdir(exist_ok=True)
        folder = RunFolder(self.path)
        tensors: dict[str, Tensor] = {}
        for quantizer in walker.points():
            if quantizer.state is State.QUANTIZED and quantizer.where not in self._kept:
                tensors |= {f"{quantizer.where}|{name}": tensor for name, tensor in _tensors(quantizer).items()}
                self._kept.add(quantizer.where)
        new = {name: tensor for name, tensor in walker.statistics.items() if name not in self._kept}
        tensors |= {f"statistics|{name}": tensor for name, tensor in new.items()}
        self._kept |= set(new)
        whole = _unshared(tensors)
        folder.write(f"points-{block}.safetensors", lambda path: save_file(whole, path))
        state = {"index": block, "as_tuple": as_tuple, "reports": walker.reports, "fallbacks": walker.fallbacks}
        folder.write_text(STATE, json.dumps(state | {"fingerprint": self.fingerprint}))
        for old in self.path.glob("hidden-*"):
            if old.name != f"hidden-{block}":
                shutil.rmtree(old)

    def take_up(self, walker: Walker, device: torch.device) -> Border | None:
        """Restore what was kept into a fresh walker; None when nothing was.

        Raises:
            ChangedError: model, data, recipe, code or machine are not those of the run that was put aside.
        """
        if not (self.path / STATE).is_file():
            return None
        state = json.loads((self.path / STATE).read_text(encoding="utf-8"))
        if changed := [key for key, value in self.fingerprint.items() if state["fingerprint"].get(key) != value]:
            raise ChangedError(f"cannot resume {self.path.parent}: changed since it stopped: {', '.join(changed)}")
        points = {quantizer.where: quantizer for quantizer in walker.points()}
        for index in range(1, state["index"] + 1):
            for name, tensor in self._load(f"points-{index}.safetensors").items():
                where, _, part = name.partition("|")
                if where == "statistics":
                    walker.statistics[part] = tensor
                    self._kept.add(part)
                else:
                    setattr(points[where], part, tensor.to(device))
                    points[where].observer, points[where].state = None, State.QUANTIZED
                    self._kept.add(where)
        walker.reports |= state["reports"]
        walker.fallbacks += state["fallbacks"]
        folder = self.path / f"hidden-{state['index']}"
        hidden = lambda batch: load_file(folder / f"{batch}.safetensors")["hidden"].to(device)  # noqa: E731
        return Border(state["index"], hidden, state["as_tuple"])

    def _load(self, name: str) -> dict[str, Tensor]:
        return load_file(self.path / name) if (self.path / name).is_file() else {}

    def clear(self) -> None:
        """Remove what was kept; the run is done."""
        shutil.rmtree(self.path, ignore_errors=True)


def find_unfinished(outputs: Path, recipe: str) -> RunFolder:
    """The newest run of `recipe` that did not finish and kept something; raises `ModelError` when there is none."""
    parent = outputs.expanduser() / recipe
    for state in sorted(parent.glob(f"*/resume/{STATE}"), reverse=True):
        folder = state.parents[1]
        status = json.loads((folder / STATUS_FILE).read_text(encoding="utf-8")).get("status")
        if status != "FINISHED":
            return RunFolder(folder)
    raise ModelError(f"nothing to resume: no unfinished run of {recipe} under {parent} got past its first block")


def _tensors(quantizer: Quantizer) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in quantizer.named_buffers(recurse=False) if tensor is not None}


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors`, with copies of what tied weights share: safetensors refuses it, and converting ties them again."""
    first: dict[int, str] = {}
    return {
        name: tensor if first.setdefault(tensor.data_ptr(), name) == name else tensor.clone()
        for name, tensor in tensors.items()
    }
