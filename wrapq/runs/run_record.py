"""Run records: finding runs by folder, name, id or inputs, and reading their files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, TypeAdapter

from wrapq.errors import ModelError, nearest, reading
from wrapq.metrics import Measured
from wrapq.paths import expand, refuse_devices
from wrapq.resolve.plan import Plan
from wrapq.runs.folder import FINISHED, LOCK, MANIFEST, MODULES, PLAN, PROGRESS, STATE, STATE_BEFORE, STATUS_FILE
from wrapq.runs.lock import Lock, code_digest, device_class, environment, read_lock

_RUN_ID = re.compile(r"[0-9a-f]{32}")
_MAX_PATH = 1024


class _Facts(BaseModel):
    """What `run.json` holds, as far as it is read again; of a run that did not finish, less."""

    status: str = ""
    reason: str = ""
    stages: dict[str, dict[str, float]] = {}
    curves: dict[str, list[float]] = {}
    sizes: dict[str, float] = {}
    seconds: dict[str, float] = {}
    digests: dict[str, str] = {}
    notes: list[str] = []
    run_id: str | None = None


_FACTS, _WEIGHTS = TypeAdapter(_Facts), TypeAdapter(dict[str, dict[str, float]])
_OBJECT = TypeAdapter(dict[str, Any])


@dataclass(frozen=True)
class RunRecord:
    """The record of one run; each file is read at the first access to something in it.

    Properties raise `ModelError` where the file is missing or is not what a run writes.

    Attributes:
        folder: the run's folder.
        name: as the user called it.
    """

    folder: Path
    name: str = field(default="", compare=False)

    @classmethod
    def ending(cls, folder: Path, facts: dict[str, Any]) -> RunRecord:
        """The record of a run of which all is known and `run.json` is not written yet."""
        record = cls(folder)
        record.__dict__["facts"] = facts  # where the property would keep what it has read
        return record

    @property
    def has_model(self) -> bool:
        """Whether the folder holds a quantized model, as that of a finished run does."""
        return (self.folder / MANIFEST).is_file()

    @property
    def resumable(self) -> bool:
        """Whether the folder holds saved progress: the run got past its first block."""
        return any((self.folder / PROGRESS / name).exists() for name in (STATE, STATE_BEFORE))

    @property
    def readable(self) -> bool:
        """Whether `run.json` is there and valid."""
        try:
            return bool(self.facts)
        except ModelError:
            return False

    def read(self) -> RunRecord:
        """Read all files of a finished run now; returns the record itself."""
        for part in ("facts", "plan", "measured", "weights", "lock"):
            getattr(self, part)
        return self

    @cached_property
    def facts(self) -> dict[str, Any]:
        """The contents of `run.json`: state, metrics, times, digests, notes."""
        return read_json(self.folder / STATUS_FILE, _FACTS)

    @property
    def status(self) -> str:
        """`RUNNING`, `FINISHED` or `FAILED`; empty where `run.json` cannot be read."""
        return str(self.facts.get("status", "")) if self.readable else ""

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256, in hex, of recipe, plan, model, data and results; empty unless the run finished."""
        return dict(self.facts.get("digests") or {}) if self.readable else {}

    @cached_property
    def measured(self) -> Measured:
        """Metrics, sizes and times of a finished run."""
        try:
            stages, sizes, seconds = (self.facts[key] for key in ("stages", "sizes", "seconds"))
            exports = {name: export["figures"] for name, export in self.facts.get("exports", {}).items()}
            measured = Measured(stages, sizes, seconds, self.plan.estimate.bits_per_weight, exports)
            measured.figures()
        except (AttributeError, KeyError, TypeError, ZeroDivisionError) as error:
            raise ModelError(f"{self.folder} is not the folder of a finished run: {error!r} in run.json") from error
        return measured

    @property
    def figures(self) -> dict[str, float]:
        """The figures of a finished run, by the names of `wrapq.metrics`; without those that were not measured."""
        return self.measured.figures()

    @property
    def curves(self) -> dict[str, list[float]]:
        """Curves over the blocks, by name."""
        return dict(self.facts.get("curves") or {})

    @cached_property
    def plan(self) -> Plan:
        """The plan that was executed."""
        return read_plan(self.folder / PLAN)

    @cached_property
    def lock(self) -> Lock:
        """The lock of a finished run."""
        return read_lock(self.folder / LOCK)

    def optional(self, name: str) -> dict[str, Any]:
        """The contents of the JSON file `name`; empty where there is none, as in a run that failed before."""
        path = self.folder / name
        return read_json(path) if path.is_file() else {}

    @cached_property
    def weights(self) -> dict[str, dict[str, float]]:
        """The reports of all quantized weights, by full name."""
        return read_json(self.folder / MODULES, _WEIGHTS)


def read_json(path: Path, kind: TypeAdapter[Any] = _OBJECT) -> dict[str, Any]:
    """Read a JSON file of a run's folder that holds a `kind`; raises `ModelError`."""
    with reading(f"{path} cannot be read", ModelError):
        values = json.loads(path.read_text(encoding="utf-8"))
    with reading(f"{path} does not hold what a run writes", ModelError):
        kind.validate_python(values, strict=True)
    return values


def read_plan(path: Path) -> Plan:
    """Read a plan from a run's `plan.json` or the output of `wrapq plan --json`; raises `ModelError`."""
    with reading(f"{path} cannot be read as a plan", ModelError):
        return Plan.model_validate_json(path.read_text(encoding="utf-8"))


def find_run(text: str, outputs: Path) -> RunRecord:
    """Find a finished run.

    Args:
        text: its folder, the name of its recipe or that recipe's folder (the newest run), or its MLflow id.
        outputs: the folder under which runs lie.

    Raises:
        ModelError: there is no such run.
    """
    outputs = outputs.expanduser()
    if len(text) > _MAX_PATH:
        raise ModelError(f"{text[:60]!r} is neither the folder of a finished run nor a recipe that was run")
    if is_run_id(text):
        tracked = (run for run in list_runs(outputs) if run.has_model and run.readable)
        if found := next((run for run in tracked if run.facts.get("run_id") == text), None):
            return RunRecord(found.folder, text)
    for candidate in (expand(text), outputs / text):
        runs = [candidate, *sorted(candidate.glob("*/"), reverse=True)] if candidate.is_dir() else []
        for folder in runs:
            if (record := RunRecord(folder, text)).has_model:
                refuse_devices(folder)
                return record
    known = sorted({run.folder.parent.name for run in list_runs(outputs) if run.has_model})
    hint = f"; did you mean: {', '.join(nearest(text, known))}" if known else f"; {outputs} holds no finished run"
    raise ModelError(f"{text} is neither the folder of a finished run nor a recipe that was run{hint}")


def is_run_id(text: str) -> bool:
    """Whether `text` looks like the id of an MLflow run."""
    return _RUN_ID.fullmatch(text) is not None


def find_lock(text: str, outputs: Path) -> Path:
    """The path of a lock: `text` itself when it is a YAML file, else the lock of the run that `find_run` finds."""
    return expand(text) if text.endswith(".yaml") else find_run(text, outputs).folder / LOCK


def list_runs(outputs: Path, recipe: str = "*") -> Iterator[RunRecord]:
    """All runs under `outputs`, or those of one recipe, newest first."""
    folders = outputs.expanduser().glob(f"{recipe}/*/")
    return (RunRecord(folder) for folder in sorted(folders, key=lambda folder: folder.name, reverse=True))


def find_unfinished(outputs: Path, recipe: str) -> RunRecord:
    """The newest unfinished run of `recipe` that can be resumed; raises `ModelError` when there is none."""
    for run in list_runs(outputs, recipe):
        if run.resumable and run.status != FINISHED:
            return run
    parent = outputs.expanduser() / recipe
    raise ModelError(f"nothing to resume: no unfinished run of {recipe} under {parent} got past its first block")


def find_equal(
    outputs: Path, plan: Plan, device: torch.device | None, inputs: Callable[[], Mapping[str, str]]
) -> RunRecord | None:
    """The newest finished run whose result `plan` would only repeat, to the bit; None when there is none.

    Args:
        outputs: the folder under which runs lie.
        plan: the plan that would be executed.
        device: where it would be executed; None for any kind of device.
        inputs: computes the digests of model and data as they are now; called only when a run has equal plan, code,
            libraries and device.
    """
    plan_digests = {"recipe": plan.recipe.digest(), "plan": plan.digest()}.items()
    now: Mapping[str, str] = {}
    for run in list_runs(outputs):
        if run.status != FINISHED or not plan_digests <= run.digests.items() or not run.has_model:
            continue
        try:
            lock = run.lock
        except ModelError:
            continue
        here = device is None or lock.device == device_class(device)
        if here and lock.environment == environment() and lock.digests.get("code") == code_digest():
            now = now or inputs()
            if now.items() <= run.digests.items():
                return run
    return None
