"""Putting a run aside after every block, and taking it up where it was killed, with the same bits.

In the run's folder, `resume/` holds files with the points decided so far, one with each batch's hidden states between
the last finished block and the next, and `state.json`, whose replacement makes a block count: whenever the run dies,
what `state.json` names is whole. The hidden states are kept as they were, not computed again.

A model that does not fit in memory is brought in block by block, and the points of the blocks that are not there stay
in the same files (`wrapq.calibration.residency.Shelf`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from wrapq.calibration.border import Border
from wrapq.calibration.walker import Walker
from wrapq.engine.folder import STATUS_FILE, RunFolder
from wrapq.errors import ModelError
from wrapq.resolve.shards import Shards
from wrapq.wrappers.quantizer import Quantizer, State

PROGRESS, STATE = "resume", "state.json"


class ChangedError(ModelError):
    """A run that cannot be taken up, since something that decides its result is no longer what it was."""


class Keeper:
    """Keeps a walk's progress in the folder of its run.

    Args:
        folder: the run's folder.
        fingerprint: digests of everything that decides the result; taking up needs every one of them equal.
        device: where points are when they are taken up.
    """

    def __init__(self, folder: RunFolder, fingerprint: Mapping[str, str], device: torch.device) -> None:
        self.path, self.fingerprint = folder.path / PROGRESS, dict(fingerprint)
        self.device = device
        self._files = 0
        self._holds: dict[str, str] = {}  # the file that holds a point, by the point's full name
        self._statistics: set[str] = set()

    def put(self, points: Iterable[Quantizer]) -> None:
        """See `Shelf.put`."""
        self._write(points)

    def get(self, points: Iterable[Quantizer]) -> None:
        """See `Shelf.get`."""
        wanted = [quantizer for quantizer in points if quantizer.where in self._holds]
        held = Shards(self.path / name for name in sorted({self._holds[q.where] for q in wanted}))
        by_name = {quantizer.where: quantizer for quantizer in wanted}
        for name in held:
            where, _, part = name.partition("|")
            if where in by_name:
                setattr(by_name[where], part, held[name].to(self.device))

    def keep_hidden(self, block: int, batch: int, hidden: Tensor) -> None:
        """Write down the hidden states that enter a block."""
        folder = self.path / f"hidden-{block}"
        folder.mkdir(parents=True, exist_ok=True)
        RunFolder(folder).write(f"{batch}.safetensors", lambda path: save_file({"hidden": hidden.contiguous()}, path))

    def keep(self, walker: Walker, block: int, as_tuple: bool) -> None:
        """Write down everything decided before `block`, into which all hidden states have been kept."""
        decided = [quantizer for quantizer in walker.points() if quantizer.state is State.QUANTIZED]
        new = {name: tensor for name, tensor in walker.statistics.items() if name not in self._statistics}
        self._write(decided, new)
        state = {"index": block, "as_tuple": as_tuple, "files": self._files, "reports": walker.reports}
        state |= {"fallbacks": walker.fallbacks, "fingerprint": self.fingerprint}
        RunFolder(self.path).write_text(STATE, json.dumps(state))
        for old in self.path.glob("hidden-*"):
            if int(old.name.removeprefix("hidden-")) < block:  # another process may be at the next block already
                shutil.rmtree(old)

    def take_up(self, walker: Walker) -> Border | None:
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
        for self._files in range(1, state["files"] + 1):
            self._restore(walker, points, f"points-{self._files}.safetensors")
        walker.reports |= state["reports"]
        walker.fallbacks += state["fallbacks"]
        folder = self.path / f"hidden-{state['index']}"
        hidden = lambda batch: load_file(folder / f"{batch}.safetensors")["hidden"].to(self.device)  # noqa: E731
        return Border(state["index"], hidden, state["as_tuple"])

    def _restore(self, walker: Walker, points: Mapping[str, Quantizer], file: str) -> None:
        for name, tensor in load_file(self.path / file).items():
            where, _, part = name.partition("|")
            if where == "statistics":
                walker.statistics[part] = tensor
                self._statistics.add(part)
                continue
            setattr(points[where], part, tensor.to(self.device))
            points[where].observer, points[where].state = None, State.QUANTIZED
            self._holds[where] = file
        for block in range(walker.blocks.count):
            walker.residency.release(block)

    def _write(self, points: Iterable[Quantizer], statistics: Mapping[str, Tensor] = MappingProxyType({})) -> None:
        """A new file with the tensors of those of `points` that no file holds yet, and with `statistics`."""
        new = {quantizer.where: _tensors(quantizer) for quantizer in points if quantizer.where not in self._holds}
        tensors = {f"{where}|{name}": tensor for where, own in new.items() for name, tensor in own.items()}
        tensors |= {f"statistics|{name}": tensor for name, tensor in statistics.items()}
        if not tensors:
            return
        self.path.mkdir(exist_ok=True)
        self._files += 1
        file, whole = f"points-{self._files}.safetensors", _unshared(tensors)
        RunFolder(self.path).write(file, lambda path: save_file(whole, path))
        self._holds |= dict.fromkeys(new, file)
        self._statistics |= set(statistics)


def forget_progress(folder: RunFolder) -> None:
    """Remove what was kept of a run that is done."""
    shutil.rmtree(folder.path / PROGRESS, ignore_errors=True)


def find_unfinished(outputs: Path, recipe: str) -> RunFolder:
    """The newest run of `recipe` that did not finish and kept something, rid of what it left half written.

    Raises:
        ModelError: there is none.
    """
    parent = outputs.expanduser() / recipe
    for state in sorted(parent.glob(f"*/{PROGRESS}/{STATE}"), reverse=True):
        folder = state.parents[1]
        status = json.loads((folder / STATUS_FILE).read_text(encoding="utf-8")).get("status")
        if status != "FINISHED":
            RunFolder(folder).sweep()
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
