"""The differences of two recipes, plans or runs: points, stages, settings, and for runs data and results."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from wrapq.engine.replay import compare_inputs, compare_results, compare_surroundings
from wrapq.errors import Problem, RecipeError
from wrapq.paths import expand
from wrapq.recipe.compose import compose
from wrapq.resolve.listing import with_options
from wrapq.resolve.plan import Plan
from wrapq.resolve.resolve import resolve
from wrapq.runs.folder import LOCK
from wrapq.runs.lock import Lock, read_lock
from wrapq.runs.run_record import find_run, is_run_id, read_plan
from wrapq.tracking.base import flatten

NOTHING = "-"
"""The value of something that one side lacks; a point that one side does not quantize is `float`."""
_EFFECTS = {"name", "description", "rules", "stack", "stack_order", "calibration"}
"""Keys whose effect is compared instead, or that are only labels."""
_DIGITS = 12


@dataclass(frozen=True)
class Side:
    """One side of the comparison: its plan, and for a run its lock and folder."""

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
    """Read one side of the comparison.

    Args:
        text: the folder or MLflow id of a run, a `plan.json`, a `recipe.lock.yaml`, or a recipe's name or file, with
            overrides of its own after it: `"w4a16_gptq stack.round.damp=0.05"`.
        overrides: of the recipe, before its own; a run or a plan takes none.
        config_dirs: folders with presets of one's own.

    Raises:
        RecipeError, PlanError, ModelError: it cannot be read or resolved.
    """
    try:
        words = shlex.split(text) or [text]
    except ValueError as error:
        raise RecipeError([Problem(f"{text!r}", "", f"cannot be taken apart: {error}")]) from None
    path, alone = expand(words[0]), len(words) == 1
    if alone and os.path.isfile(path) and path.suffix == ".json":
        return Side(text, read_plan(path))
    if alone and path.name.endswith(LOCK.partition(".")[2]):
        lock = read_lock(path)
        return Side(text, resolve(lock.recipe), lock)
    if alone and (os.path.isdir(path) or is_run_id(words[0])):
        run = find_run(text, Path(compose([]).settings.paths.outputs))
        return Side(text, run.plan, run.lock, run.folder)
    composed = compose([f"recipe={words[0]}", *overrides, *words[1:]], config_dirs)
    return Side(text, resolve(composed.recipe, composed.sources, composed.settings.runtime.trust_remote_code))


def find_differences(before: Side, after: Side) -> Differences:
    """Compare two sides."""
    one, other = before.plan, after.plan
    settings, runs = tuple(_settings(one, other)), tuple(_runs(before, after))
    return Differences(tuple(_points(one, other)), tuple(_stages(one, other)), settings, runs)


def _points(before: Plan, after: Plan) -> Iterator[PointChange]:
    ours, theirs = ({module.name: module for module in plan.modules} for plan in (before, after))
    names, following = list(ours), list(theirs)
    for index, name in enumerate(following):
        if name not in ours:  # it comes after its predecessor there
            names.insert(names.index(following[index - 1]) + 1 if index else 0, name)
    for name in names:
        modules = [ours.get(name), theirs.get(name)]
        one, other = ({p.name: p.spec for p in module.points} if module else {} for module in modules)
        kind = next(module.type for module in modules if module)
        for point in {**one, **other}:
            spec, new = one.get(point, "float"), other.get(point, "float")
            if spec != new:
                yield PointChange(name, kind, point, spec, new)
    parts = [{part.name: part for part in plan.parts} for plan in (before, after)]
    for name, part in {**parts[0], **parts[1]}.items():
        old, new = (str(each[name]) if name in each else NOTHING for each in parts)
        if old != new:
            yield PointChange(name, part.type, "by PT2E", old, new)


def _stages(before: Plan, after: Plan) -> Iterator[Change]:
    ours, theirs = ({stage.name: stage for stage in plan.stages} for plan in (before, after))
    for name in {**ours, **theirs}:
        one, other = ours.get(name), theirs.get(name)
        if one is None or other is None or one.algorithm != other.algorithm:
            yield Change(name, *(with_options(s.algorithm, s.options) if s else NOTHING for s in (one, other)))
            continue
        for key in {**one.options, **other.options}:
            yield from _changed(f"{name}.{key}", one.options.get(key), other.options.get(key))
        if set(one.targets) != set(other.targets):
            yield Change(f"{name} decides", f"{len(one.targets)} points", f"{len(other.targets)} points")
    common = [[name for name in order if name in ours and name in theirs] for order in (ours, theirs)]
    if common[0] != common[1]:
        yield Change("order", ", ".join(common[0]), ", ".join(common[1]))


def _settings(before: Plan, after: Plan) -> Iterator[Change]:
    both = before.needs_calibration and after.needs_calibration
    one, other = (_keys(plan, both) for plan in (before, after))
    if before.needs_calibration != after.needs_calibration:
        used = [(plan.recipe.calibration, plan.needs_calibration) for plan in (before, after)]
        shown = (f"{c.samples} x {c.seq_len} tokens of {c.source}" if needed else NOTHING for c, needed in used)
        yield Change("calibration", *shown)
    for key in {**one, **other}:
        yield from _changed(key, one.get(key), other.get(key))


def _keys(plan: Plan, calibration: bool) -> dict[str, Any]:
    model, keys = plan.model, flatten(plan.recipe.model_dump(mode="json", exclude=_EFFECTS))
    facts = {"model.type": model.type, "model.parameters": model.parameters, "model.blocks": model.block_count}
    data = {"calibration": plan.recipe.calibration.model_dump(mode="json")} if calibration else {}
    return {**dict(keys), **facts, **dict(flatten(data))}


def _runs(before: Side, after: Side) -> Iterator[Change]:
    ours, theirs = before.lock, after.lock
    if ours is None or theirs is None:
        return
    results = compare_results(ours, theirs, before.folder or Path(), after.folder or Path())
    for found in chain(compare_inputs(ours, theirs), compare_surroundings(ours, theirs), results):
        one, other = (text[:_DIGITS] if len(text) == 64 else text for text in (found.expected, found.found))  # digests
        yield Change(found.what, one, other, found.where)


def _changed(what: str, before: Any, after: Any) -> Iterator[Change]:
    if before != after:
        yield Change(what, *(NOTHING if value is None else str(value) for value in (before, after)))
