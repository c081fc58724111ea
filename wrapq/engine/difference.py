"""What two recipes, plans or runs do differently: for which modules and points, in which stages, on which data."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wrapq.engine.finished import PLAN, find_run, read_plan
from wrapq.engine.lock import LOCK, Lock, read_lock
from wrapq.engine.verify import compare_inputs, compare_results, compare_surroundings
from wrapq.errors import Problem, RecipeError
from wrapq.recipe.compose import compose
from wrapq.resolve.plan import ModulePlan, Plan, StagePlan
from wrapq.resolve.resolve import resolve
from wrapq.tracking.base import flatten

NOTHING = "-"
"""Stands for what one side does not have; `float` stands for a point that one side does not quantize."""
_EFFECTS = ("name", "description", "rules", "stack", "stack_order", "calibration")
"""Keys that are shown by what they do, or are mere labels."""
_DIGITS = 12


@dataclass(frozen=True)
class Side:
    """One of the two: its plan, and for a run also its lock and folder."""

    name: str
    plan: Plan
    lock: Lock | None = None
    folder: Path | None = None


@dataclass(frozen=True)
class PointChange:
    """A quantization point whose spec differs."""

    module: str
    type: str
    point: str
    before: str
    after: str


@dataclass(frozen=True)
class Change:
    """Anything else that differs, by its dotted name."""

    what: str
    before: str
    after: str
    where: str = ""


@dataclass(frozen=True)
class Differences:
    """Everything that differs.

    Attributes:
        points: points in the order of the model.
        stages: stages of the stack, their options and what they decide.
        settings: keys of the recipe beside rules and stack, and the model.
        runs: of two runs, data, surroundings and results.
    """

    points: tuple[PointChange, ...]
    stages: tuple[Change, ...]
    settings: tuple[Change, ...]
    runs: tuple[Change, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.points or self.stages or self.settings or self.runs)


def read_side(text: str, overrides: Sequence[str], config_dirs: Sequence[Path]) -> Side:
    """What `text` names.

    Args:
        text: the folder or MLflow id of a run, a `plan.json`, a `recipe.lock.yaml`, or a recipe's name or file, with
            overrides of its own after it: `"w4a16_gptq stack.round.damp=0.05"`.
        overrides: of the recipe, before its own; a run or a plan takes none.
        config_dirs: folders with presets of one's own.

    Raises:
        RecipeError, PlanError, ModelError: it cannot be read or resolved.
    """
    words = _words(text)
    path = Path(words[0]).expanduser()
    if len(words) == 1 and _is_file(path) and path.suffix == ".json":
        return Side(text, read_plan(path))
    if len(words) == 1 and path.name.endswith(LOCK.partition(".")[2]):
        lock = read_lock(path)
        return Side(text, resolve(lock.recipe), lock)
    if len(words) == 1 and (_is_folder(path) or _is_run_id(words[0])):
        folder = find_run(text, Path(compose([]).settings.paths.outputs))
        return Side(text, read_plan(folder / PLAN), read_lock(folder / LOCK), folder)
    composed = compose([f"recipe={words[0]}", *overrides, *words[1:]], config_dirs)
    return Side(text, resolve(composed.recipe, composed.sources, composed.settings.runtime.trust_remote_code))


def find_differences(before: Side, after: Side) -> Differences:
    """What `after` does differently."""
    return Differences(
        tuple(_points(before.plan, after.plan)),
        tuple(_stages(before.plan, after.plan)),
        tuple(_settings(before.plan, after.plan)),
        tuple(_runs(before, after)),
    )


def _points(before: Plan, after: Plan) -> Iterator[PointChange]:
    ours, theirs = ({module.name: module for module in plan.modules} for plan in (before, after))
    for name in _merged(list(ours), list(theirs)):
        one, other = _specs(ours.get(name)), _specs(theirs.get(name))
        kind = (ours.get(name) or theirs[name]).type
        for point in {**one, **other}:
            spec, new = one.get(point, "float"), other.get(point, "float")
            if spec != new:
                yield PointChange(name, kind, point, spec, new)


def _specs(module: ModulePlan | None) -> dict[str, str]:
    return {point.name: point.spec for point in module.points} if module else {}


def _merged(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """All names, those of `second` alone after the one they follow there."""
    names = list(first)
    for index, name in enumerate(second):
        if name not in first:
            names.insert(names.index(second[index - 1]) + 1 if index else 0, name)
    return names


def _stages(before: Plan, after: Plan) -> Iterator[Change]:
    ours, theirs = ({stage.name: stage for stage in plan.stages} for plan in (before, after))
    for name in {**ours, **theirs}:
        one, other = ours.get(name), theirs.get(name)
        if one is None or other is None or one.algorithm != other.algorithm:
            yield Change(name, _called(one), _called(other))
            continue
        for key in {**one.options, **other.options}:
            yield from _changed(f"{name}.{key}", one.options.get(key), other.options.get(key))
        if set(one.targets) != set(other.targets):
            yield Change(f"{name} decides", f"{len(one.targets)} points", f"{len(other.targets)} points")
    common = [[name for name in order if name in ours and name in theirs] for order in (ours, theirs)]
    if common[0] != common[1]:
        yield Change("order", ", ".join(common[0]), ", ".join(common[1]))


def _called(stage: StagePlan | None) -> str:
    if stage is None:
        return NOTHING
    listed = ", ".join(f"{key}={value}" for key, value in stage.options.items())
    return f"{stage.algorithm}({listed})" if listed else stage.algorithm


def _settings(before: Plan, after: Plan) -> Iterator[Change]:
    one, other = (_keys(plan) for plan in (before, after))
    if before.needs_calibration != after.needs_calibration:
        yield Change("calibration", *(_data(plan) for plan in (before, after)))
    elif before.needs_calibration:
        one |= dict(flatten({"calibration": before.recipe.calibration.model_dump(mode="json")}))
        other |= dict(flatten({"calibration": after.recipe.calibration.model_dump(mode="json")}))
    for key in {**one, **other}:
        yield from _changed(key, one.get(key), other.get(key))


def _keys(plan: Plan) -> dict[str, Any]:
    keys: Mapping[str, Any] = plan.recipe.model_dump(mode="json", exclude=set(_EFFECTS))
    facts = {"type": plan.model.type, "parameters": plan.model.parameters, "blocks": plan.model.block_count}
    return dict(flatten(keys)) | {f"model.{name}": value for name, value in facts.items()}


def _data(plan: Plan) -> str:
    config = plan.recipe.calibration
    return f"{config.samples} x {config.seq_len} tokens of {config.source}" if plan.needs_calibration else NOTHING


def _runs(before: Side, after: Side) -> Iterator[Change]:
    if before.lock is None or after.lock is None:
        return
    none = Path()
    found = [
        *compare_inputs(before.lock, after.lock),
        *compare_surroundings(before.lock, after.lock),
        *compare_results(before.lock, after.lock, before.folder or none, after.folder or none),
    ]
    for difference in found:
        yield Change(difference.what, _short(difference.expected), _short(difference.found), difference.where)


def _short(text: str) -> str:
    return text[:_DIGITS] if len(text) == 64 else text  # digests


def _changed(what: str, before: Any, after: Any) -> Iterator[Change]:
    if before != after:
        yield Change(what, *(NOTHING if value is None else str(value) for value in (before, after)))


def _words(text: str) -> list[str]:
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise RecipeError([Problem(f"{text!r}", f"cannot be taken apart: {error}")]) from None
    return words or [text]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def _is_run_id(text: str) -> bool:
    return len(text) == 32 and set(text) <= set("0123456789abcdef")
