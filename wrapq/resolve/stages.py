"""The stack becomes stages: algorithms by name, options checked, ordered by phase, every point decided exactly once."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from wrapq.algorithms.base import ALGORITHMS, BLOCK, PHASES, Algorithm, Corrector, Rounding
from wrapq.algorithms.transform import Transform
from wrapq.calibration.grouped_conv import unsupported
from wrapq.errors import Problem, ProblemsError, and_more, nearest
from wrapq.graph.blocks import Blocks, find_blocks
from wrapq.recipe.schema import Stage
from wrapq.registry import Place, build
from wrapq.resolve.plan import ModulePlan, PointPlan, StagePlan
from wrapq.resolve.rules import Sources
from wrapq.resolve.selectors import Site
from wrapq.resolve.transforms import Transforms
from wrapq.statistics.input import AGAINST_FLOAT

_SHOWN = 8


@dataclass(frozen=True)
class StackEntry:
    """A stage and its algorithm, whose options are known to be right."""

    name: str
    stage: Stage
    algorithm: Algorithm

    @property
    def path(self) -> str:
        """The dotted path of the stage in the recipe."""
        return f"stack.{self.name}"


def check_stack(
    stack: Mapping[str, Stage],
    sources: Sources,
    rules: Collection[str] = (),
    order: Sequence[str] | None = None,
    parallel: bool = False,
    compared: bool = False,
) -> tuple[list[StackEntry], list[Problem]]:
    """The stages in the order in which they run, and what is wrong with them; needs no model.

    Args:
        stack: the stages by name.
        sources: where each leaf of the recipe was set.
        rules: the names of the recipe's rules.
        order: the names of the stages in the order that the recipe asks for.
        parallel: whether the schedule is parallel.
        compared: whether the schedules are compared.
    """
    entries, problems = list[StackEntry](), list[Problem]()
    for name, stage in stack.items():
        try:
            place = Place(f"stack.{name}", "algorithm", Stage.model_fields, sources.of)
            algorithm = build(ALGORITHMS, stage.algorithm, stage.options, place)
        except ProblemsError as error:
            problems += error.problems
            continue
        entry = StackEntry(name, stage, algorithm)
        if {BLOCK, *AGAINST_FLOAT} & set(algorithm.needs) and (parallel or compared):
            how = stage.algorithm if BLOCK in algorithm.needs else "asymmetric calibration"
            what = f"{how} looks at what the quantized blocks before give, and parallel runs none"
            override = "calibration.schedule=sequential" if parallel else "evaluation.compare_schedules=false"
            problems.append(sources.problem(entry.path, what, (), f"set {override}"))
        for rule in (rule for rule in stage.rules or () if rule not in rules):
            problems.append(sources.problem(f"{entry.path}.rules", f"no rule is called {rule!r}", nearest(rule, rules)))
        entries.append(entry)
    if order is None:
        return sorted(entries, key=lambda entry: PHASES.index(entry.algorithm.phase)), problems
    if wrong := list(_misnamed(stack, order, sources)):
        return entries, problems + wrong
    entries.sort(key=lambda entry: order.index(entry.name))
    for index, entry in enumerate(entries):
        before = {other.algorithm.phase for other in entries[:index]}
        if entry.algorithm.phase == "transform" and before - {"transform"}:
            what = f"{entry.name} changes the float model, in which the stages before it have decided points already"
            problems.append(sources.problem("stack_order", what, (), f"name {entry.name} before them"))
    return entries, problems


def _misnamed(stack: Mapping[str, Stage], order: Sequence[str], sources: Sources) -> Iterator[Problem]:
    """What keeps `order` from naming each stage once."""
    for name in (name for name in dict.fromkeys(order) if name not in stack):
        yield sources.problem("stack_order", f"no stage is called {name!r}", nearest(name, stack))
    left_out = [name for name in stack if name not in order]
    twice = [name for name in dict.fromkeys(order) if order.count(name) > 1]
    for names, what in ((left_out, "leaves out {}"), (twice, "names {} more than once")):
        if names:
            remedy = f"name each stage once: {', '.join(stack)}, in the order in which they shall run"
            yield sources.problem("stack_order", what.format(", ".join(names)), (), remedy)


def algorithm_of(stage: StagePlan) -> Algorithm:
    """The algorithm of a planned stage, with its options."""
    return build(ALGORITHMS, stage.algorithm, stage.options, Place(f"stack.{stage.name}", "algorithm"))


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
    blocks = find_blocks(transforms.model)
    for index, entry in enumerate(entries):
        named = entry.stage.rules
        allowed = None if named is None else frozenset(site.name for rule in named for site in selected[rule])
        if isinstance(entry.algorithm, Transform):
            transform, source = entry.algorithm, sources.of(entry.path)
            after = [each.algorithm for each in entries[index + 1 :] if isinstance(each.algorithm, Transform)]
            targets, online, wrong = transforms.plan(
                entry.name, entry.stage.algorithm, transform, after, allowed, source
            )
            stages.append(_stage(entry, targets, transform.needs, sources, online))
            problems += wrong
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
        if not targets:
            kind = f"static {entry.algorithm.handles}"
            what = f"{entry.stage.algorithm} has nothing to do: no rule gives it a {kind} to decide"
            remedy = f"remove the stage with ~stack.{entry.name}, or add a rule for it"
            problems.append(sources.problem(entry.path, what, (), remedy))
        problems += _misfits(entry, points, blocks, sources)
        adds = f"{entry.algorithm.adds} " if isinstance(entry.algorithm, Corrector) else ""
        keys = [f"{adds}{target}" for target in targets]
        if twice := [key for key in keys if key in owner]:
            others = ", ".join(sorted({owner[key] for key in twice}))
            what = f"{entry.name} and {others} would decide the same points, such as {twice[0]}"
            remedy = "give each stage its own rules: stack.NAME.rules=[...]"
            problems.append(sources.problem(entry.path, what, (), remedy))
        owner |= dict.fromkeys(keys, entry.name)
        observers = {p.quant_spec.observer for _, p in points} if entry.algorithm.handles == "activation" else ()
        stages.append(_stage(entry, targets, (*entry.algorithm.needs, *sorted(observers)), sources))
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
        for other in (stage for stage in stages if AGAINST_FLOAT & set(stage.needs)):
            if both := mine & {blocks[target] for target in other.targets}:
                block = min(both)
                what = f"{other.name} follows the float model through block {block}, which {whole.name} rounds at once"
                remedy = f"turn that off, as with asymmetric=0 or empirical=false in stack.{other.name}"
                yield sources.problem(f"stack.{other.name}", what, (), remedy)


def _stage(
    entry: StackEntry,
    targets: tuple[str, ...],
    needs: tuple[str, ...],
    sources: Sources,
    online: Mapping[str, int | None] = MappingProxyType({}),
) -> StagePlan:
    return StagePlan(
        name=entry.name,
        algorithm=entry.stage.algorithm,
        phase=entry.algorithm.phase,
        options=entry.algorithm.options.model_dump(),
        targets=targets,
        needs=needs,
        source=sources.of(f"stack.{entry.name}.algorithm"),
        online=tuple(online),
        hadamard={name: size for name, size in online.items() if size},
    )


def _misfits(
    entry: StackEntry, points: Sequence[tuple[ModulePlan, PointPlan]], blocks: Blocks, sources: Sources
) -> Iterator[Problem]:
    """Why the algorithm of a stage cannot decide some of its `points`."""
    algorithm, name = entry.algorithm, entry.stage.algorithm
    split = f"name its rules: stack.{entry.name}.rules=[...], and give the others +algorithm@stack.others=rtn"
    of_inputs = algorithm.handles == "weight" and bool(set(algorithm.needs) - {BLOCK})
    if others := [module for module, _ in points if of_inputs and not module.multiplies]:
        kinds = ", ".join(sorted({module.type for module in others}))
        does = "corrects" if isinstance(algorithm, Corrector) else "rounds"
        what = f"{name} {does} what multiplies a matrix; not so the weights of {kinds} ({others[0].name})"
        yield sources.problem(entry.path, what, (), split)
    if isinstance(algorithm, Rounding):
        refused: dict[tuple[str, str], list[str]] = {}
        for module, point in points:
            rows = module.weight_shape[0] if module.weight_shape else 1
            if (reason := unsupported(algorithm, point.quant_spec, rows, module.groups)) is not None:
                refused.setdefault((point.spec, reason), []).append(f"{module.name}.{point.name}")
        for (spec, reason), names in refused.items():
            what = f"{name} cannot round {and_more(names)}, {spec}: {reason}"
            remedy = "change the spec, or give these weights another algorithm: +algorithm@stack.others=rtn"
            yield sources.problem(entry.path, what, (), remedy)
    in_blocks = BLOCK in algorithm.needs and blocks.count > 0  # a model without is one itself
    if outside := [module.name for module, _ in points if in_blocks and module.block is None]:
        what = f"{name} rounds the weights of blocks, and {and_more(outside)} lies in none"
        left = f"+rules.outside={{match: {{name: [{', '.join(outside[:_SHOWN])}]}}, quantize: false}}"
        yield sources.problem(entry.path, what, (), f"{split}; or leave these float: '{left}'")
    if others := [m for m, _ in points if isinstance(algorithm, Corrector) and not algorithm.takes(m.wrapper)]:
        what = f"{name} does not correct {others[0].type} ({others[0].name})"
        yield sources.problem(entry.path, what, (), f"name the rules of linear layers: stack.{entry.name}.rules=[...]")


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
            yield Problem("", "stack", what, (), f"add a stage for them, for example {remedy}")
