"""The stack becomes stages: algorithms by name, options checked, ordered by phase, every point decided exactly once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from pydantic import BaseModel, ValidationError

from wrapq.calibration.algorithm import ALGORITHMS, PHASES, Algorithm, Corrector, Rounding, Transform
from wrapq.calibration.blockwise import BLOCK
from wrapq.calibration.by_group import unsupported
from wrapq.calibration.statistics import TWIN
from wrapq.errors import ModelError, Problem, UnknownNameError, nearest
from wrapq.recipe.schema import Recipe, Stage
from wrapq.resolve.plan import ModulePlan, PointPlan, StagePlan
from wrapq.resolve.rules import Sources
from wrapq.resolve.selectors import Site
from wrapq.resolve.transforms import Transforms


@dataclass(frozen=True)
class StackEntry:
    """A stage whose algorithm and options are known to be right."""

    name: str
    stage: Stage
    algorithm: type[Algorithm]
    options: BaseModel

    @property
    def needs(self) -> tuple[str, ...]:
        """The statistics that the algorithm with these options must be given."""
        return self.algorithm(self.options).needs


def check_stack(recipe: Recipe, sources: Sources) -> tuple[list[StackEntry], list[Problem]]:
    """The stages in the order in which they run, and what is wrong with them; needs no model."""
    entries, problems = [], []
    for name, stage in recipe.stack.items():
        try:
            algorithm = ALGORITHMS.get(stage.algorithm)
        except UnknownNameError as error:
            where = sources.where(f"stack.{name}.algorithm")
            problems.append(Problem(where, f"unknown algorithm {stage.algorithm!r}", error.nearest))
            continue
        try:
            options = algorithm.Options(**stage.options)
        except ValidationError as error:
            valid = [*algorithm.Options.model_fields, *Stage.model_fields]
            problems += option_problems(error, f"stack.{name}", valid, stage.algorithm, sources)
            continue
        parallel, needs = recipe.calibration.schedule == "parallel", algorithm(options).needs
        if {BLOCK, *TWIN} & set(needs) and (parallel or recipe.evaluation.compare_schedules):
            how = stage.algorithm if BLOCK in needs else "asymmetric calibration"
            what = f"{how} looks at what the quantized blocks before give, and parallel runs none"
            said = "calibration.schedule=sequential" if parallel else "evaluation.compare_schedules=false"
            remedy = f"set {said}"
            problems.append(Problem(sources.where(f"stack.{name}"), what, (), remedy))
        for rule in stage.rules or ():
            if rule not in recipe.rules:
                where = sources.where(f"stack.{name}.rules")
                problems.append(Problem(where, f"no rule is called {rule!r}", nearest(rule, recipe.rules)))
        entries.append(StackEntry(name, stage, algorithm, options))
    order, wrong = _order(recipe, entries, sources)
    return order, problems + wrong


def option_problems(
    error: ValidationError, path: str, valid: Sequence[str], owner: str, sources: Sources
) -> Iterator[Problem]:
    """Each mistake in the options of `owner`, whose keys, all of them `valid`, stand under `path`."""
    for item in error.errors():
        key = ".".join(map(str, item["loc"]))
        where = sources.where(f"{path}.{key}")
        if item["type"] == "extra_forbidden":
            yield Problem(where, f"{owner} has no option {key!r}", nearest(key, valid))
        elif item["type"] == "missing":
            yield Problem(f"{path}.{key}", f"{owner} needs {key}", (), f"set it with {path}.{key}=...")
        else:
            yield Problem(where, f"{item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}")


def plan_stages(
    entries: Sequence[StackEntry],
    modules: Sequence[ModulePlan],
    selected: Mapping[str, Sequence[Site]],
    transforms: Transforms,
    sources: Sources,
) -> tuple[tuple[StagePlan, ...], list[Problem]]:
    """The stages with the points each decides; every point left over or decided twice is a problem."""
    stages: list[StagePlan] = []
    problems: list[Problem] = []
    owner: dict[str, str] = {}
    for entry in entries:
        named = entry.stage.rules
        allowed = None if named is None else frozenset(site.name for rule in named for site in selected[rule])
        if issubclass(entry.algorithm, Transform):
            stage, wrong = _plan_transform(entry, allowed, transforms, sources)
            stages, problems = [*stages, stage], problems + wrong
            continue
        points = [
            (module, point)
            for module in modules
            for point in module.points
            if point.role == entry.algorithm.handles
            and not point.quant_spec.dynamic
            and (allowed is None or module.name in allowed)
        ]
        targets = tuple(f"{module.name}.{point.name}" for module, point in points)
        where = sources.where(f"stack.{entry.name}")
        if not targets:
            kind = f"static {entry.algorithm.handles}"
            what = f"{entry.stage.algorithm} has nothing to do: no rule gives it a {kind} to decide"
            problems.append(
                Problem(where, what, (), f"remove the stage with ~stack.{entry.name}, or add a rule for it")
            )
        problems += _without_statistics(entry, points, where)
        problems += _unsupported(entry, points, where)
        problems += _outside_blocks(entry, points, modules, where)
        if issubclass(entry.algorithm, Corrector):
            problems += _uncorrectable(entry, points, where)
            said = {target: f"{entry.algorithm.adds} {target}" for target in targets}
        else:
            said = {target: target for target in targets}
        twice = sorted({owner[key] for key in said.values() if key in owner})
        if twice:
            what = f"{entry.name} and {', '.join(twice)} would decide the same points, such as {targets[0]}"
            problems.append(Problem(where, what, (), "give each stage its own rules: stack.NAME.rules=[...]"))
        owner |= dict.fromkeys(said.values(), entry.name)
        observers = {p.quant_spec.observer for _, p in points} if entry.algorithm.handles == "activation" else ()
        stages.append(_stage(entry, targets, (*entry.needs, *sorted(observers)), sources))
    problems += _following_the_float_model(stages, modules, sources)
    return tuple(stages), problems + list(_undecided(modules, owner))


def _following_the_float_model(
    stages: Sequence[StagePlan], modules: Sequence[ModulePlan], sources: Sources
) -> Iterator[Problem]:
    """Stages that round a block at once, which takes what the float model leaves it with, beside those that follow the
    float model from layer to layer: its runs would have to wait within the block, and be through it."""
    blocks = {f"{module.name}.{point.name}": module.block for module in modules for point in module.points}
    for whole in (stage for stage in stages if BLOCK in stage.needs):
        mine = {index for target in whole.targets if (index := blocks[target]) is not None}
        for other in (stage for stage in stages if TWIN & set(stage.needs)):
            if both := mine & {blocks[target] for target in other.targets}:
                block = min(both)
                what = f"{other.name} follows the float model through block {block}, which {whole.name} rounds at once"
                remedy = f"turn that off, as with asymmetric=0 or empirical=false in stack.{other.name}"
                yield Problem(sources.where(f"stack.{other.name}"), what, (), remedy)


def _stage(
    entry: StackEntry, targets: tuple[str, ...], needs: tuple[str, ...], sources: Sources, online: tuple[str, ...] = ()
) -> StagePlan:
    return StagePlan(
        name=entry.name,
        algorithm=entry.stage.algorithm,
        phase=entry.algorithm.phase,
        options=entry.options.model_dump(),
        targets=targets,
        needs=needs,
        source=sources.of(f"stack.{entry.name}.algorithm"),
        online=online,
    )


def _plan_transform(
    entry: StackEntry, allowed: frozenset[str] | None, transforms: Transforms, sources: Sources
) -> tuple[StagePlan, list[Problem]]:
    where = sources.where(f"stack.{entry.name}")
    targets: tuple[str, ...] = ()
    online: tuple[str, ...] = ()
    algorithm = cast(Transform, entry.algorithm(entry.options))
    try:
        found = transforms.ask(entry.name, entry.stage.algorithm, algorithm, allowed)
        problems = list(transforms.check(entry.name, entry.stage.algorithm, algorithm, found, where))
        targets, online = found.targets, algorithm.online(transforms.graph, found.targets)
    except ModelError as error:
        problems = [Problem(where, f"{entry.stage.algorithm} cannot follow this model: {error}")]
    return _stage(entry, targets, entry.needs, sources, online), problems


def _without_statistics(
    entry: StackEntry, points: Sequence[tuple[ModulePlan, PointPlan]], where: str
) -> Iterator[Problem]:
    inputs = set(entry.needs) - {BLOCK} if entry.algorithm.handles == "weight" else set()
    others = [module for module, _ in points if not module.multiplies] if inputs else []
    if others:
        kinds = ", ".join(sorted({module.type for module in others}))
        does = "corrects" if issubclass(entry.algorithm, Corrector) else "rounds"
        does = f"{entry.stage.algorithm} {does} what multiplies a matrix"
        what = f"{does}; not so the weights of {kinds} ({others[0].name})"
        remedy = f"name its rules: stack.{entry.name}.rules=[...], and give the others +algorithm@stack.others=rtn"
        yield Problem(where, what, (), remedy)


def _outside_blocks(
    entry: StackEntry, points: Sequence[tuple[ModulePlan, PointPlan]], modules: Sequence[ModulePlan], where: str
) -> Iterator[Problem]:
    blocks = any(module.block is not None for module in modules)
    others = [module.name for module, _ in points if module.block is None] if BLOCK in entry.needs and blocks else []
    if others:
        what = f"{entry.stage.algorithm} rounds the weights of blocks, and {', '.join(others[:3])} lies in none"
        remedy = f"name its rules: stack.{entry.name}.rules=[...], and give the others +algorithm@stack.others=rtn"
        yield Problem(where, what, (), remedy)


def _uncorrectable(entry: StackEntry, points: Sequence[tuple[ModulePlan, PointPlan]], where: str) -> Iterator[Problem]:
    algorithm = entry.algorithm(entry.options)
    others = [m for m, _ in points if isinstance(algorithm, Corrector) and not algorithm.takes(m.wrapper)]
    if others:
        what = f"{entry.stage.algorithm} does not correct {others[0].type} ({others[0].name})"
        yield Problem(where, what, (), f"name the rules of linear layers: stack.{entry.name}.rules=[...]")


def _unsupported(entry: StackEntry, points: Sequence[tuple[ModulePlan, PointPlan]], where: str) -> Iterator[Problem]:
    algorithm = entry.algorithm(entry.options)
    if not isinstance(algorithm, Rounding):
        return
    refused: dict[tuple[str, str], list[str]] = {}
    for module, point in points:
        rows = module.weight_shape[0] if module.weight_shape else 1
        if (reason := unsupported(algorithm, point.quant_spec, rows, module.groups)) is not None:
            refused.setdefault((point.spec, reason), []).append(f"{module.name}.{point.name}")
    for (spec, reason), names in refused.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        what = f"{entry.stage.algorithm} cannot round {names[0]}{more}, {spec}: {reason}"
        remedy = "change the spec, or give these weights another algorithm: +algorithm@stack.others=rtn"
        yield Problem(where, what, (), remedy)


def _undecided(modules: Sequence[ModulePlan], owner: Mapping[str, str]) -> Iterator[Problem]:
    remedies = {"weight": "+algorithm@stack.round=rtn", "activation": "+algorithm@stack.ranges=ranges"}
    for role, remedy in remedies.items():
        open_points = [
            f"{module.name}.{point.name}"
            for module in modules
            for point in module.points
            if point.role == role and not point.quant_spec.dynamic and f"{module.name}.{point.name}" not in owner
        ]
        if open_points:
            kind = "weights" if role == "weight" else "static activations"
            what = f"no stage decides {len(open_points)} {kind}, such as {open_points[0]}"
            yield Problem("stack", what, (), f"add a stage for them, for example {remedy}")


def _order(recipe: Recipe, entries: Sequence[StackEntry], sources: Sources) -> tuple[list[StackEntry], list[Problem]]:
    by_name = {entry.name: entry for entry in entries}
    if recipe.stack_order is None:
        return sorted(entries, key=lambda entry: PHASES.index(entry.algorithm.phase)), []
    where, said = sources.where("stack_order"), recipe.stack_order
    problems = [
        Problem(where, f"no stage is called {name!r}", nearest(name, recipe.stack))
        for name in dict.fromkeys(said)
        if name not in recipe.stack
    ]
    left_out = [name for name in recipe.stack if name not in said]
    twice = [name for name in dict.fromkeys(said) if said.count(name) > 1]
    for names, what in ((left_out, "leaves out {}"), (twice, "names {} more than once")):
        if names:
            remedy = f"name each stage once: {', '.join(recipe.stack)}, in the order in which they shall run"
            problems.append(Problem(where, what.format(", ".join(names)), (), remedy))
    if problems:
        return list(entries), problems
    order = [by_name[name] for name in said if name in by_name]
    phases = [entry.algorithm.phase for entry in order]
    for entry, before in zip(order, (phases[:i] for i in range(len(order))), strict=True):
        if entry.algorithm.phase == "transform" and set(before) - {"transform"}:
            what = f"{entry.name} changes the float model, in which the stages before it have decided points already"
            problems.append(Problem(where, what, (), f"name {entry.name} before them"))
    return order, problems
