"""Replaying a lock and comparing the result.

On the lock's class of device and with its libraries, every integer, scale and output must be equal to the bit.
Elsewhere sums are taken in another order and some roundings fall the other way: then each metric must lie within its
band. Recipe, plan, weights and tokens must be equal in either case, or it is another experiment.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import starmap
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from wrapq.engine.context import RunOptions
from wrapq.engine.host import use_machine
from wrapq.engine.progress import Progress
from wrapq.engine.run import execute
from wrapq.errors import ModelError, Problem, RecipeError
from wrapq.metrics import metrics
from wrapq.recipe.compose import compose
from wrapq.recipe.group_choices import parse_overrides
from wrapq.recipe.presets import SETTINGS_GROUPS
from wrapq.recipe.schema import Recipe, Settings
from wrapq.resolve.model_source import ModelSource
from wrapq.resolve.resolve import resolve
from wrapq.runs.checkpoint import changed_files, manifest_digest, read_manifest, weight_files
from wrapq.runs.folder import LOCK, MANIFEST, WEIGHTS
from wrapq.runs.lock import Lock, device_class, environment, read_lock
from wrapq.runs.run_record import find_lock
from wrapq.tracking.base import Tracker

LOCATIONS = ("model.path", "model.tokenizer", "calibration.path", "evaluation.path")
"""Keys of a recipe that are only locations: a replay on another machine may override them."""
_RESULTS = ("qparams", "tensors", "outputs")
_MAX_THREADS = 256


@dataclass(frozen=True)
class Difference:
    """One deviation from the lock.

    Attributes:
        what: the digest, version or metric.
        expected: what the lock says.
        found: what there is.
        where: the module and tensor, as far as that is known.
    """

    what: str
    expected: str
    found: str
    where: str = ""


@dataclass(frozen=True)
class Verdict:
    """The outcome of a replay.

    Attributes:
        exact: whether everything had to be equal to the bit; else the metrics had to lie within the bands.
        surroundings: differences of device, libraries and code; these alone are no failure.
        failures: what had to be equal, or within its band, and is not, in the order of a run.
        checked: what was compared, in words.
        metrics: for each stage and metric the locked value and the replay's.
    """

    exact: bool
    surroundings: tuple[Difference, ...]
    failures: tuple[Difference, ...]
    checked: str
    metrics: dict[str, tuple[float, float]]

    @property
    def same(self) -> bool:
        """Whether the result was reproduced."""
        return not self.failures


def verify(text: str, overrides: Sequence[str], config_dirs: Sequence[Path], progress: Progress) -> Verdict:
    """Compare the files of a run with its manifest, then replay its lock; what `wrapq verify` does.

    Nothing is recorded, and nothing of the replay is kept.

    Args:
        text: a lock file, or a run as `find_run` knows it.
        overrides: of the machine's settings and of `LOCATIONS`, nothing else.
        config_dirs: folders with presets for the settings.
        progress: told of each step.

    Raises:
        ModelError: no such run or lock, or a lock without results.
        WrapqError: the replay cannot be made; see `execute`.
    """
    settings, locations = _split(overrides, config_dirs)
    path = find_lock(text, Path(settings.paths.outputs))
    lock = read_lock(path)
    results = {"metrics": any(lock.metrics.values()), **{name: lock.digests.get(name) for name in _RESULTS}}
    if lacks := [name for name, value in results.items() if not value]:
        raise ModelError(f"{path} lacks {', '.join(lacks)}: it is not the lock of a finished run, or was changed")
    if changed := tuple(_changed(lock, path.parent)):
        return Verdict(True, (), changed, "the files of the run itself; nothing was run", {})
    data = lock.recipe.model_dump(exclude={"export"})  # a copy of the result
    for key, value in locations.items():
        section, _, name = key.partition(".")
        data[section][name] = value
    recipe, settings = Recipe.model_validate(data), _like(lock, settings)
    with use_machine(settings, recipe.seed) as device:
        here = tuple(_surroundings(lock, device_class(device), environment()))
    if early := tuple(_early(lock, recipe, settings)):
        return Verdict(not here, here, early, "recipe, plan and weights; nothing was run", {})
    outputs = Path(settings.paths.outputs)
    outputs.mkdir(parents=True, exist_ok=True)
    plan = resolve(recipe, {}, settings.runtime.trust_remote_code)
    with tempfile.TemporaryDirectory(prefix=".verify-", dir=outputs) as folder:
        paths = settings.paths.model_copy(update={"outputs": folder, "cache": str(Path(folder) / "cache")})
        replay = execute(plan, settings.model_copy(update={"paths": paths}), progress, RunOptions(tracker=Tracker()))
        if replay is None:  # one of several processes, of which the first has the result
            return Verdict(True, (), (), "", {})
        return _judge(lock, read_lock(replay.folder / LOCK), here, path.parent, replay.folder)


def compare_results(expected: Lock, found: Lock, folder: Path, other: Path) -> Iterator[Difference]:
    """All results that differ; where both folders hold models, with the tensor that differs."""
    modules = [name for name, digest in expected.modules.items() if found.modules.get(name) != digest]
    modules += [name for name in found.modules if name not in expected.modules]
    if modules:
        where = f"first in {_where(modules[0], folder, other)}"
        yield Difference("modules", f"{len(expected.modules)} modules", f"{len(modules)} of them differ", where)
    yield from _unequal(_RESULTS, expected.digests, found.digests)
    for metric, (before, after) in _metrics(expected, found).items():
        if before != after and not math.isnan(after):
            yield Difference(metric, f"{before:.9g}", f"{after:.9g}")


def compare_surroundings(expected: Lock, found: Lock) -> Iterator[Difference]:
    """Differences of device, libraries and code."""
    yield from _surroundings(expected, found.device, found.environment)
    yield from _unequal(("code",), expected.digests, found.digests)


def compare_inputs(expected: Lock, found: Lock) -> Iterator[Difference]:
    """Differences of weights and tokens."""
    yield from _unequal(("model",), expected.digests, found.digests)
    where = "" if expected.sequences == found.sequences else "sequences did not begin with the tokenizer's own tokens"
    for difference in _unequal(("calibration", "evaluation"), expected.digests, found.digests):
        yield replace(difference, where=where)


def _judge(lock: Lock, replay: Lock, here: tuple[Difference, ...], folder: Path, other: Path) -> Verdict:
    exact, values = not here, _metrics(lock, replay)
    results = compare_results(lock, replay, folder, other) if exact else _out_of_band(values)
    failures = (*compare_inputs(lock, replay), *results)
    bands = ", ".join(f"{metric.name} within {metric.band}" for metric in metrics() if metric.band)
    checked = f"weights and tokens to the bit, {bands}"
    if exact:
        checked = f"{len(lock.modules)} modules, all tensors, outputs and {len(values)} metrics to the bit"
    return Verdict(exact, (*here, *_unequal(("code",), lock.digests, replay.digests)), failures, checked, values)


def _out_of_band(values: dict[str, tuple[float, float]]) -> Iterator[Difference]:
    bands = {metric.name: metric.band for metric in metrics()}
    for name, (expected, found) in values.items():
        band = bands.get(name.partition("/")[2])
        if band is not None and not band.holds(expected, found):
            yield Difference(name, f"{expected:.6g} within {band}", f"{found:.6g}")


def _metrics(lock: Lock, replay: Lock) -> dict[str, tuple[float, float]]:
    return {
        f"{stage}/{name}": (value, replay.metrics.get(stage, {}).get(name, float("nan")))
        for stage, values in lock.metrics.items()
        for name, value in values.items()
    }


def _changed(lock: Lock, folder: Path) -> Iterator[Difference]:
    """The files in a run's folder that are not what was saved; none where the lock lies without a model."""
    if (folder / MANIFEST).is_file() or weight_files(folder):
        yield from starmap(Difference, changed_files(folder))
        yield from _unequal(["tensors"], lock.digests, read_manifest(folder))
        if "manifest" in lock.digests:  # older ones have none
            yield from _unequal(["manifest"], lock.digests, {"manifest": manifest_digest(folder)})


def _early(lock: Lock, recipe: Recipe, settings: Settings) -> Iterator[Difference]:
    """Differences of recipe, plan and weights, which show before anything is run."""
    digest = lock.recipe.digest()
    if digest != lock.digests.get("recipe"):
        yield Difference("recipe", lock.digests.get("recipe", "none"), digest, "the recipe in the lock was changed")
        return
    trust = settings.runtime.trust_remote_code
    plan = resolve(recipe, {}, trust).model_copy(update={"recipe": lock.recipe})
    for name, found in (("plan", plan.digest()), ("model", ModelSource(recipe.model, trust).digest())):
        if found != lock.digests.get(name):
            where = "what the recipe means for this model" if name == "plan" else recipe.model.path
            yield Difference(name, lock.digests.get(name, "none"), found, where)


def _split(overrides: Sequence[str], config_dirs: Sequence[Path]) -> tuple[Settings, dict[str, str]]:
    """The settings and the locations among the overrides; anything else is a `RecipeError`."""
    machine, locations, problems = [], {}, []
    for text, override in zip(overrides, parse_overrides(overrides), strict=True):
        key = override.key_or_group
        if key.partition(".")[0] in SETTINGS_GROUPS:
            machine.append(text)
        elif key in LOCATIONS and isinstance(override.value(), str) and not override.is_delete():
            locations[key] = str(override.value())
        else:
            what = f"a replay takes only {', '.join(SETTINGS_GROUPS)}, and {', '.join(LOCATIONS)}"
            problems.append(Problem(f"override {text}", "", what))
    if problems:
        raise RecipeError(problems)
    return compose(machine, config_dirs).settings, locations


def _like(lock: Lock, settings: Settings) -> Settings:
    """The settings with the lock's kind of device and number of threads, unless the user sets them."""
    runtime, words = settings.runtime, lock.device.split()
    changes: dict[str, object] = {"kernels": "reference", "cache_gb": 0}
    here = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if runtime.device == "auto" and here.get(words[0]):
        changes["device"] = words[0]
    if runtime.threads is None and words[-1] == "threads" and words[-2:][0].isdecimal():
        changes["threads"] = max(1, min(int(words[-2]), _MAX_THREADS))
    return settings.model_copy(update={"runtime": runtime.model_copy(update=changes)})


def _surroundings(lock: Lock, device: str, libraries: dict[str, str]) -> Iterator[Difference]:
    expected, found = {"device": lock.device, **lock.environment}, {"device": device, **libraries}
    yield from _unequal({**expected, **found}, expected, found)


def _unequal(names: Iterable[str], expected: Mapping[str, str], found: Mapping[str, str]) -> Iterator[Difference]:
    for name in names:
        before, after = expected.get(name, "none"), found.get(name, "none")
        if before != after:
            yield Difference(name, before, after)


def _where(module: str, folder: Path, other: Path) -> str:
    """The module; where both folders hold the model, its tensor that differs and by how much."""
    try:
        before, after = (
            {name: tensor for name, tensor in load_file(path / WEIGHTS).items() if name.rpartition(".")[0] == module}
            for path in (folder, other)
        )
    except (OSError, SafetensorError):
        return module
    for name, tensor in before.items():
        found = after.get(name)
        if found is None or found.shape != tensor.shape or found.dtype != tensor.dtype:
            return f"{name}, which has another shape or type"
        if not torch.equal(tensor, found):
            text = f"{name}: {int((tensor != found).sum())} of {tensor.numel()} values differ"
            if not tensor.is_floating_point():
                return text
            relative = (tensor.double() - found.double()).abs() / tensor.double().abs().clamp_min(1e-30)
            return f"{text}, by up to {float(relative.max()):.1e} of their size"
    return module
