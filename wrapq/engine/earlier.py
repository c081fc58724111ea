"""Earlier runs whose result a new one would only repeat: equal recipe, model, data, code, libraries and device."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from wrapq.engine.checkpoint import MANIFEST
from wrapq.engine.folder import STATUS_FILE
from wrapq.engine.lock import code_digest, device_class, environment
from wrapq.engine.samples import calibration_samples, evaluation_samples, read_tokenizer, sources_of
from wrapq.resolve.model import ModelSource
from wrapq.resolve.plan import Plan

LOCK = "recipe.lock.yaml"


def find_equal(outputs: Path, plan: Plan, device: torch.device | None, trust_remote_code: bool = False) -> Path | None:
    """The folder of the newest finished run that did what `plan` would do, to the bit; None when there is none.

    With `device` None it may have been any kind of device.

    Model and data are read, for their digests, only when a run with the recipe, code, libraries and device is there.
    """
    here: dict[str, Any] = {"environment": environment()}
    if device is not None:
        here["device"] = device_class(device)
    inputs: dict[str, str] = {}
    for folder, digests in _finished(outputs, plan):
        lock = _read(folder / LOCK)
        same_machine = all(lock.get(key) == value for key, value in here.items())
        if not same_machine or lock.get("digests", {}).get("code") != code_digest():
            continue
        inputs = inputs or _input_digests(plan, trust_remote_code)
        if all(digests.get(name) == value for name, value in inputs.items()):
            return folder
    return None


def has_finished(outputs: Path, plan: Plan) -> bool:
    """Whether a run of `plan` finished, whatever model, data, code and machine were then."""
    return next(_finished(outputs, plan), None) is not None


def read_status(folder: Path) -> dict[str, Any]:
    """What a run's folder says of how it ended; empty when it says nothing."""
    return _read(folder / STATUS_FILE)


def _finished(outputs: Path, plan: Plan) -> Iterator[tuple[Path, dict[str, str]]]:
    """Finished runs of the same plan with their digests, the newest first."""
    wanted = {"recipe": plan.recipe.digest(), "plan": plan.digest()}
    found = sorted(outputs.expanduser().glob(f"*/*/{STATUS_FILE}"), key=lambda path: path.parent.name, reverse=True)
    for path in found:
        status = _read(path)
        digests = status.get("digests", {})
        same = all(digests.get(name) == value for name, value in wanted.items())
        if same and status.get("status") == "FINISHED" and (path.parent / MANIFEST).is_file():
            yield path.parent, digests


def _input_digests(plan: Plan, trust_remote_code: bool) -> dict[str, str]:
    """The digests of model and data as they are now."""
    source = ModelSource(plan.recipe.model, trust_remote_code)
    given = read_tokenizer(source, sources_of(plan)), source.vocab_size
    digests = {"model": source.digest(), "evaluation": evaluation_samples(plan, *given)[1].digest}
    if (calibration := calibration_samples(plan, *given)) is not None:
        digests["calibration"] = calibration[1].digest
    return digests


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        held = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return held if isinstance(held, dict) else {}
