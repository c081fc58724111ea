"""Checkpoints of a run after every block, from which a killed run is resumed, with the same bits.

In the run's folder, `resume/` holds files with the points finalized so far, one per batch with the hidden states
between the last finished block and the next, and `state.json`, whose replacement commits a block: whenever the run
dies, what `state.json` names is whole. The hidden states are kept as they were, not computed again.

Each file carries a digest, of its name and of what the run depends on as well. Where one is damaged the run goes on
from the block before, of which `state-before.json` and the hidden states are still there, or else begins anew.

The same files hold the points of blocks that are not in memory (`wrapq.calibration.block_loader.PointStore`).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from wrapq.calibration.block_checkpoint import BlockCheckpoint
from wrapq.calibration.block_loader import BlockLoader
from wrapq.calibration.finalize import WalkResult
from wrapq.calibration.processes import Processes
from wrapq.errors import ModelError
from wrapq.resolve.shards import Shards
from wrapq.runs.checkpoint import tensors_digest
from wrapq.runs.folder import PROGRESS, STATE, STATE_BEFORE, RunFolder, flush, remove, seal, unseal
from wrapq.wrappers.quantizer import Quantizer, State


class ChangedError(ModelError):
    """A run that cannot be resumed, since something that its result depends on has changed."""


class _DamagedError(ModelError):
    """A file of a checkpoint that is not what was written."""


class ResumeStore:
    """The checkpoints of a walk, in the folder of its run.

    Args:
        folder: the run's folder.
        fingerprint: digests of everything that the result depends on; resuming needs every one of them equal.
        device: where restored points are put.
        note: told what is damaged.
        processes: those of the run; the first decides where it is taken up.
    """

    def __init__(
        self,
        folder: RunFolder,
        fingerprint: Mapping[str, str],
        device: torch.device,
        note: Callable[[str], None],
        processes: Processes,
    ) -> None:
        self.path, self.fingerprint = folder.path / PROGRESS, dict(fingerprint)
        self.device, self._note, self._processes = device, note, processes
        self._state: dict[str, Any] = {}  # as it was written or restored last
        self._files = 0
        self._holds: dict[str, str] = {}  # the file that holds a point, by the point's full name
        self._statistics: set[str] = set()

    def get(self, points: Iterable[Quantizer]) -> None:
        wanted = [quantizer for quantizer in points if quantizer.where in self._holds]
        held = Shards(self.path / name for name in sorted({self._holds[q.where] for q in wanted}))
        by_name = {quantizer.where: quantizer for quantizer in wanted}
        for name in held:
            where, _, part = name.partition("|")
            if where in by_name:
                setattr(by_name[where], part, held[name].to(self.device))

    def save_hidden(self, block: int, batch: int, hidden: Tensor) -> None:
        """Write down the hidden states that enter a block."""
        self._write(f"hidden-{block}/{batch}.safetensors", {"hidden": hidden.contiguous()}, flushed=False)

    def save(self, block: int, as_tuple: bool, points: Iterable[Quantizer], result: WalkResult) -> None:
        """Write down everything finalized before `block`, whose hidden states have been written."""
        finalized = [quantizer for quantizer in points if quantizer.state is State.QUANTIZED]
        new = {name: tensor for name, tensor in result.statistics.items() if name not in self._statistics}
        self.put(finalized, new)
        state = {"index": block, "as_tuple": as_tuple, "files": self._files, "reports": result.reports}
        state |= {"fallbacks": result.fallbacks, "fingerprint": self.fingerprint}
        hidden = list(self.path.glob(f"hidden-{block}/*.safetensors"))
        for path in (*hidden, self.path / f"hidden-{block}"):  # all at once, which takes half the time
            flush(path)
        state["hidden"] = [f"{file.parent.name}/{file.name}" for file in hidden]
        state = json.loads(json.dumps(state))  # a copy, since the walk goes on
        if self._state:
            self._write_state(STATE_BEFORE, self._state, flushed=False)
        self._write_state(STATE, state)
        kept, self._state = self._state.get("index", block), state
        for old in self.path.glob("hidden-*"):
            if int(old.name.removeprefix("hidden-")) < kept:  # another process may be at the next block already
                remove(old)

    def restore(self, points: Iterable[Quantizer], result: WalkResult, loader: BlockLoader) -> BlockCheckpoint | None:
        """Restore what was written into `points`, of a fresh model, and `result`; None when nothing was.

        Raises:
            ChangedError: model, data, recipe, code or machine are not those of the run that was put aside.
        """
        found = {} if self._processes.rank else self._last_good()
        state = self._state = json.loads(self._processes.text_of_first(json.dumps(found)))
        if not state:
            return None
        by_name = {quantizer.where: quantizer for quantizer in points}
        for self._files in range(1, state["files"] + 1):
            file = f"points-{self._files}.safetensors"
            for name, tensor in self._read(file).items():
                where, _, part = name.partition("|")
                if where == "statistics":
                    result.statistics[part] = tensor
                    self._statistics.add(part)
                else:
                    point, self._holds[where] = by_name[where], file
                    setattr(point, part, tensor.to(self.device))
                    point.observer, point.state = None, State.QUANTIZED
            loader.release_all()  # a file holds a block's worth: no more is in memory at a time
        result.reports.update(state["reports"])
        result.fallbacks.extend(state["fallbacks"])
        index = state["index"]
        hidden = lambda batch: self._read(f"hidden-{index}/{batch}.safetensors")["hidden"].to(self.device)  # noqa: E731
        return BlockCheckpoint(index, hidden, state["as_tuple"])

    def _last_good(self) -> dict[str, Any]:
        """The last state that is whole, with all the files that it names; empty where there is none."""
        problems: dict[str, ModelError] = {}
        state: dict[str, Any] = {}
        there = [name for name in (STATE, STATE_BEFORE) if (self.path / name).exists()]
        for name in dict.fromkeys([STATE, *there] if there else ()):
            try:
                state = self._read_state(name)
                break
            except (ChangedError, _DamagedError) as error:
                problems[name] = error
        changed = [error for error in problems.values() if isinstance(error, ChangedError)]
        if changed and not state:
            raise changed[0]
        for name, problem in problems.items():
            what = f"{self.path / name} is of another run" if problem in changed else problem
            self._note(f"{what}: the run {'goes on from the block before' if state else 'begins anew'}")
            remove(self.path / name)
        return state

    def _read_state(self, name: str) -> dict[str, Any]:
        try:
            state: dict[str, Any] = json.loads(unseal((self.path / name).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise _DamagedError(f"{self.path / name} is damaged") from error
        if changed := [key for key, value in self.fingerprint.items() if state["fingerprint"].get(key) != value]:
            raise ChangedError(f"cannot resume {self.path.parent}: changed since it stopped: {', '.join(changed)}")
        for file in (*(f"points-{number}.safetensors" for number in range(1, state["files"] + 1)), *state["hidden"]):
            self._read(file)
        return state

    def _write_state(self, name: str, state: Mapping[str, Any], flushed: bool = True) -> None:
        RunFolder(self.path).write(name, lambda partial: partial.write_text(seal(json.dumps(state))), flushed)

    def _read(self, name: str) -> dict[str, Tensor]:
        """The tensors of a file, which are what was written under its name; not mapped, see `Shards`."""
        try:
            with safe_open(self.path / name, framework="pt", backend="pread") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
                if (file.metadata() or {}).get("digest") == self._digest(name, tensors):
                    return tensors
        except (OSError, SafetensorError) as error:
            raise _DamagedError(f"{self.path / name} is damaged") from error
        raise _DamagedError(f"{self.path / name} is damaged")

    def _write(self, name: str, tensors: dict[str, Tensor], flushed: bool = True) -> None:
        path, facts = self.path / name, {"digest": self._digest(name, tensors)}
        if path.parent.is_file():
            path.parent.unlink()
        path.parent.mkdir(parents=True, exist_ok=True)
        RunFolder(path.parent).write(path.name, lambda partial: save_file(tensors, partial, facts), flushed)

    def _digest(self, name: str, tensors: Mapping[str, Tensor]) -> str:
        return hashlib.sha256(json.dumps([name, self.fingerprint, tensors_digest(tensors)]).encode()).hexdigest()

    def put(self, points: Iterable[Quantizer], statistics: Mapping[str, Tensor] = MappingProxyType({})) -> None:
        """Write a new file with the tensors of those of `points` that no file holds yet, and with `statistics`."""
        new = {quantizer.where: quantizer for quantizer in points if quantizer.where not in self._holds}
        tensors = {
            f"{where}|{name}": tensor.contiguous()
            for where, quantizer in new.items()
            for name, tensor in quantizer.named_buffers(recurse=False)
        }
        tensors |= {f"statistics|{name}": tensor for name, tensor in statistics.items()}
        if not tensors:
            return
        self._files += 1
        first: dict[int, str] = {}  # tied weights share tensors, which safetensors refuses; converting ties them again
        whole = {n: t if first.setdefault(t.data_ptr(), n) == n else t.clone() for n, t in tensors.items()}
        file = f"points-{self._files}.safetensors"
        self._write(file, whole)
        self._holds |= dict.fromkeys(new, file)
        self._statistics |= set(statistics)


def forget_progress(folder: RunFolder) -> None:
    """Remove what was kept of a run that is done."""
    shutil.rmtree(folder.path / PROGRESS, ignore_errors=True)
