"""Replaying a lock, and saying whether the result is the same.

Where device and libraries are those of the lock, every integer, scale and output must be equal to the bit. Elsewhere
sums are made in another order and roundings fall the other way here and there: then the quality must lie within
`BANDS`. Recipe, plan, weights and tokens must be equal in either case, or it is another experiment.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from wrapq.engine.checkpoint import WEIGHTS
from wrapq.engine.finished import find_lock
from wrapq.engine.lock import LOCK, Lock, device_class, environment, read_lock
from wrapq.engine.progress import Progress
from wrapq.engine.run import execute, use_machine
from wrapq.errors import Problem, RecipeError
from wrapq.recipe.choices import parse_overrides
from wrapq.recipe.compose import compose
from wrapq.recipe.presets import SETTINGS_GROUPS
from wrapq.recipe.schema import Export, Recipe, Settings
from wrapq.resolve.model import ModelSource
from wrapq.resolve.resolve import resolve
from wrapq.tracking.null import NullTracker

LOCATIONS = ("model.path", "model.tokenizer", "calibration.path", "evaluation.path")
"""Keys of a recipe that say only where something lies: they may be told to a replay on another machine."""
_INPUTS = ("recipe", "plan", "model", "calibration", "evaluation")


@dataclass(frozen=True)
class Band:
    """How far a metric may lie from the locked one: the larger of a share of it and an absolute amount."""

    relative: float = 0.0
    absolute: float = 0.0

    def holds(self, expected: float, found: float) -> bool:
        """Whether `found` is near enough."""
        return abs(found - expected) <= max(self.relative * abs(expected), self.absolute)

    def __str__(self) -> str:
        parts = [f"{self.relative:.0%}" if self.relative else "", f"{self.absolute:g}" if self.absolute else ""]
        return " or ".join(filter(None, parts))


BANDS = {"perplexity": Band(0.01), "kl": Band(0.2, 1e-4), "top1_agreement": Band(absolute=0.01)}
"""What tolerance mode allows each metric of each stage."""


@dataclass(frozen=True)
class Difference:
    """One thing that is not as the lock says.

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
    """What came of a replay.

    Attributes:
        exact: whether everything had to be equal to the bit; else the metrics had to lie within the bands.
        surroundings: how device, libraries and code differ from the lock's; these alone are no failure.
        failures: what had to be equal or near and is not, in the order in which a run comes by it.
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
        """Whether the lock holds here."""
        return not self.failures


def verify(text: str, overrides: Sequence[str], config_dirs: Sequence[Path], progress: Progress) -> Verdict:
    """Replay a lock; what `wrapq verify` does. Nothing is recorded, and nothing of the replay is kept.

    Args:
        text: a lock file, or a run as `find_run` knows it.
        overrides: of the machine's settings and of `LOCATIONS`, nothing else.
        config_dirs: folders with presets for the settings.
        progress: told of each step.

    Raises:
        ModelError: no such run or lock.
        WrapqError: the replay cannot be made; see `execute`.
    """
    settings, recipe_changes = _split(overrides, config_dirs)
    path = find_lock(text, Path(settings.paths.outputs))
    lock = read_lock(path)
    recipe = _relocated(lock.recipe, recipe_changes).model_copy(update={"export": Export()})  # a copy of the result
    settings = _like(lock, settings)
    here = _here(lock, settings)
    if early := tuple(_early(lock, recipe, settings)):
        return Verdict(not here, here, early, "recipe, plan and weights; nothing was run", {})
    outputs = Path(settings.paths.outputs).expanduser()
    outputs.mkdir(parents=True, exist_ok=True)
    plan = resolve(recipe, {}, settings.runtime.trust_remote_code)
    with tempfile.TemporaryDirectory(prefix=".verify-", dir=outputs) as folder:
        paths = settings.paths.model_copy(update={"outputs": folder, "cache": str(Path(folder) / "cache")})
        replay = execute(plan, settings.model_copy(update={"paths": paths}), progress, tracker=NullTracker())
        if replay is None:  # one of several processes, of which the first has the result
            return Verdict(True, (), (), "", {})
        return _judge(lock, read_lock(replay.folder / LOCK), here, path.parent, replay.folder)


def compare_results(expected: Lock, found: Lock, folder: Path, other: Path) -> Iterator[Difference]:
    """Everything that must be equal to the bit and is not; the folders, if they hold models, say in which tensor."""
    modules = [name for name, digest in expected.modules.items() if found.modules.get(name) != digest]
    modules += [name for name in found.modules if name not in expected.modules]
    if modules:
        where = f"first in {_where(modules[0], folder, other)}"
        yield Difference("modules", f"{len(expected.modules)} modules", f"{len(modules)} of them differ", where)
    for name in ("qparams", "tensors", "outputs"):
        yield from _digest_difference(name, expected, found)
    for metric, (before, after) in _metrics(expected, found).items():
        if before != after and not math.isnan(after):
            yield Difference(metric, f"{before:.9g}", f"{after:.9g}")


def compare_surroundings(expected: Lock, found: Lock) -> Iterator[Difference]:
    """How device, libraries and code differ."""
    yield from _surroundings(expected, found.device, found.environment)
    yield from _digest_difference("code", expected, found)


def compare_inputs(expected: Lock, found: Lock) -> Iterator[Difference]:
    """Which of weights and tokens differ."""
    for name in ("model", "calibration", "evaluation"):
        yield from _digest_difference(name, expected, found)


def _judge(lock: Lock, replay: Lock, here: tuple[Difference, ...], folder: Path, other: Path) -> Verdict:
    exact = not here
    inputs = list(compare_inputs(lock, replay))
    metrics = _metrics(lock, replay)
    results = compare_results(lock, replay, folder, other) if exact else _out_of_band(metrics)
    failures = (*inputs, *results)
    if exact:
        checked = f"{len(lock.modules)} modules, all tensors, outputs and {len(metrics)} metrics to the bit"
    else:
        bands = ", ".join(f"{name} within {band}" for name, band in BANDS.items())
        checked = f"weights and tokens to the bit, {bands}"
    return Verdict(exact, (*here, *_digest_difference("code", lock, replay)), failures, checked, metrics)


def _out_of_band(metrics: dict[str, tuple[float, float]]) -> Iterator[Difference]:
    for metric, (expected, found) in metrics.items():
        band = BANDS.get(metric.partition("/")[2])
        if band is not None and not band.holds(expected, found):
            yield Difference(metric, f"{expected:.6g} within {band}", f"{found:.6g}")


def _metrics(lock: Lock, replay: Lock) -> dict[str, tuple[float, float]]:
    return {
        f"{stage}/{name}": (value, replay.metrics.get(stage, {}).get(name, float("nan")))
        for stage, values in lock.metrics.items()
        for name, value in values.items()
    }


def _early(lock: Lock, recipe: Recipe, settings: Settings) -> Iterator[Difference]:
    """What can be seen to differ before anything is run."""
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
    """The machine's settings, and the locations that the overrides change."""
    machine, locations, problems = [], {}, []
    for text, override in zip(overrides, parse_overrides(overrides), strict=True):
        key = override.key_or_group
        if key.partition(".")[0] in SETTINGS_GROUPS:
            machine.append(text)
        elif key in LOCATIONS and isinstance(override.value(), str) and not override.is_delete():
            locations[key] = str(override.value())
        else:
            what = f"a replay takes only {', '.join(SETTINGS_GROUPS)}, and {', '.join(LOCATIONS)}"
            problems.append(Problem(f"override {text}", what))
    if problems:
        raise RecipeError(problems)
    return compose(machine, config_dirs).settings, locations


def _relocated(recipe: Recipe, locations: dict[str, str]) -> Recipe:
    data = recipe.model_dump()
    for key, value in locations.items():
        section, _, name = key.partition(".")
        data[section][name] = value
    return Recipe.model_validate(data)


def _like(lock: Lock, settings: Settings) -> Settings:
    """The settings with the lock's kind of device and number of threads where the user does not say another."""
    runtime, words = settings.runtime, lock.device.split()
    changes: dict[str, object] = {"kernels": "reference", "cache_gb": 0}
    if runtime.device == "auto" and (words[0] != "cuda" or torch.cuda.is_available()):
        changes["device"] = words[0] if words[0] in ("cpu", "cuda", "mps") else "auto"
    if runtime.threads is None and words[-1] == "threads" and words[-2].isdecimal():
        changes["threads"] = max(1, min(int(words[-2]), _MAX_THREADS))
    return settings.model_copy(update={"runtime": runtime.model_copy(update=changes)})


_MAX_THREADS = 256


def _here(lock: Lock, settings: Settings) -> tuple[Difference, ...]:
    device = use_machine(settings, lock.recipe.seed)
    return tuple(_surroundings(lock, device_class(device), environment()))


def _surroundings(lock: Lock, device: str, libraries: dict[str, str]) -> Iterator[Difference]:
    if lock.device != device:
        yield Difference("device", lock.device, device)
    for name in {**lock.environment, **libraries}:
        before, after = lock.environment.get(name, "none"), libraries.get(name, "none")
        if before != after:
            yield Difference(name, before, after)


def _digest_difference(name: str, expected: Lock, found: Lock) -> Iterator[Difference]:
    before, after = expected.digests.get(name, "none"), found.digests.get(name, "none")
    if before != after:
        yield Difference(name, before, after)


def _where(module: str, folder: Path, other: Path) -> str:
    """The module, and where both folders hold the model the tensor of it that differs and how much."""
    try:
        before, after = (_tensors_of(module, path) for path in (folder, other))
    except (OSError, SafetensorError):
        return module
    for name, tensor in before.items():
        found = after.get(name)
        if found is None or found.shape != tensor.shape or found.dtype != tensor.dtype:
            return f"{name}, which has another shape or type"
        if not torch.equal(tensor, found):
            return f"{name}: {_how(tensor, found)}"
    return module


def _tensors_of(module: str, folder: Path) -> dict[str, Tensor]:
    return {name: t for name, t in load_file(folder / WEIGHTS).items() if name.rpartition(".")[0] == module}


def _how(before: Tensor, after: Tensor) -> str:
    count = int((before != after).sum())
    text = f"{count} of {before.numel()} values differ"
    if before.is_floating_point():
        relative = ((before.double() - after.double()).abs() / before.double().abs().clamp_min(1e-30)).max()
        text += f", by up to {float(relative):.1e} of their size"
    return text
