"""From a recipe to a plan."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn
from torch.fx import GraphModule

from wrapq.algorithms.transform import Transform
from wrapq.calibration.token_weights import why_no_gradients
from wrapq.data.sources.base import SOURCES
from wrapq.errors import CalibrationError, PlanError, Problem, ProblemsError, RecipeError, SpecError, and_more, nearest
from wrapq.export.base import EXPORTERS, Exporter, make_exporter, make_exporters
from wrapq.graph.blocks import Blocks, find_blocks
from wrapq.graph.mixtures import EXPERT_NAME
from wrapq.graph.towers import find_towers
from wrapq.metrics import metric
from wrapq.recipe.preset_index import RECIPE
from wrapq.recipe.provenance import Provenance
from wrapq.recipe.schema import Calibration, Evaluation, Export, Recipe, Rule
from wrapq.registry import Place, build
from wrapq.resolve.estimate import estimate
from wrapq.resolve.model_source import ModelSource
from wrapq.resolve.part_plans import check_quantizers, part_notes, plan_parts
from wrapq.resolve.plan import ModelFacts, ModulePlan, PartPlan, Plan, PointPlan, StagePlan, Untouched, specs_of
from wrapq.resolve.rules import Drafted, Sources, draft_points, lies_in
from wrapq.resolve.selectors import GATE, Site, find_sites
from wrapq.resolve.spec_fit import build_spec, held_problems, tied_problems, weight_shape, why_unfit
from wrapq.resolve.stages import StackEntry, check_stack, plan_stages
from wrapq.resolve.transforms import Transforms
from wrapq.resolve.unreached import leave_unreached
from wrapq.wrappers.experts import apart


class ResolvedModule(NamedTuple):
    """What the rules and the stack of a recipe come to in one module.

    Attributes:
        modules: those that are quantized.
        untouched: those that stay float although they compute something, and why.
        stages: the stack, with the points that each decides.
        blocks: the repeated blocks.
        notes: the points that no forward reaches.
        skipped: the places that transforms leave alone, and why.
        parts: those that PT2E quantizes.
    """

    modules: tuple[ModulePlan, ...]
    untouched: tuple[Untouched, ...]
    stages: tuple[StagePlan, ...]
    blocks: Blocks
    notes: tuple[str, ...]
    skipped: tuple[str, ...]
    parts: tuple[PartPlan, ...]


def resolve(recipe: Recipe, sources: Mapping[str, Provenance] | None = None, trust_remote_code: bool = False) -> Plan:
    """The plan of `recipe`; reads the model's configuration, no weights.

    Args:
        recipe: a validated recipe.
        sources: where each leaf of it was set, for messages and provenance.
        trust_remote_code: whether the model's own code may run.

    Raises:
        RecipeError: names that no registry holds, options that an algorithm or source does not take.
        PlanError: rules that fit nothing, specs that fit no module, stages that cannot work together.
        ModelError: the model's configuration cannot be read.
    """
    where = Sources(sources or {})
    stack = check_names(recipe, where)
    try:
        source = ModelSource(recipe.model, trust_remote_code)
        model = source.meta_model()
    except PlanError as error:
        raise PlanError([replace(p, source=where.of(p.path)) for p in error.problems]) from None
    towers = find_towers(model)
    told = [f"float here is what comes out of it: {source.stored.what}"] if source.stored else []
    if towers:
        told.append(f"{', '.join(towers)}: beside the language model, float unless a rule names them")
    found, problems = _resolve_stages(
        recipe, stack, model, where, towers, remedy="wrapq evaluate measures a model as it is"
    )
    if problems := problems + ([] if found.parts else _unread(recipe, found.stages, where)):
        raise PlanError(problems)
    with apart(model):
        estimated = estimate(model, found.modules, recipe, found.stages, found.parts)
    plan = Plan(
        recipe=recipe,
        model=ModelFacts(
            path=recipe.model.path,
            type=type(model).__name__,
            dtype=str(source.dtype).removeprefix("torch."),
            parameters=sum(p.numel() for p in model.parameters()),
            blocks=found.blocks.prefix,
            block_count=found.blocks.count,
        ),
        modules=found.modules,
        untouched=found.untouched,
        stages=found.stages,
        estimate=estimated,
        parts=found.parts,
        notes=(
            *told,
            *found.notes,
            *part_notes(found.parts),
            *_prefix_notes(recipe.float_prefix, found.modules),
            *found.skipped,
        ),
        presets=where.origins(),
    )
    check_export(plan)
    return plan


def resolve_module(
    recipe: Recipe, module: nn.Module, sources: Sources, inputs: Mapping[str, Any] | None = None
) -> ResolvedModule:
    """What the rules and the stack of `recipe` come to in any float `module` with its weights; what the recipe says of
    its model, data and export is not looked at.

    Args:
        inputs: the arguments of one small forward, to follow the module; None where there is no data.

    Raises:
        RecipeError, PlanError: as `resolve`.
    """
    schedule = recipe.calibration.schedule
    stack, wrong = check_stack(recipe.stack, sources, recipe.rules, recipe.stack_order, schedule == "parallel")
    wrong += check_quantizers(recipe.rules, sources)
    if wrong:
        raise RecipeError(wrong)
    looking = [entry for entry in stack if isinstance(entry.algorithm, Transform) or entry.algorithm.needs]
    looking += [entry for entry in stack if entry.algorithm.handles == "activation"]
    if looking and inputs is None:
        what = f"{looking[0].stage.algorithm} looks at data, and there are no batches"
        raise PlanError([sources.problem(looking[0].path, what)])
    if (parts := [name for name, rule in recipe.rules.items() if rule.by is not None]) and inputs is None:
        what = "PT2E looks at data, and there are no batches"
        raise PlanError([sources.problem(f"rules.{parts[0]}.by", what)])
    problems = list[Problem]()
    if recipe.float_prefix:
        what = "the first tokens of a sequence are known in the language models of wrapq run alone"
        problems.append(sources.problem("float_prefix", what, (), "float_prefix=0"))
    for entry in stack:
        if "gradient" in entry.algorithm.needs and (reason := why_no_gradients(module)) is not None:
            path = f"{entry.path}.gradient"
            problems.append(sources.problem(path, reason, (), f"{path}=false"))
    try:
        found, more = _resolve_stages(recipe, stack, module, sources, inputs=inputs)
    except PlanError as error:
        raise PlanError([*problems, *error.problems]) from None
    if problems := problems + more:
        raise PlanError(problems)
    return found


def _resolve_stages(
    recipe: Recipe,
    stack: Sequence[StackEntry],
    model: nn.Module,
    sources: Sources,
    towers: Sequence[str] = (),
    inputs: Mapping[str, Any] | None = None,
    remedy: str = "",
) -> tuple[ResolvedModule, list[Problem]]:
    """The modules that the rules quantize in `model`, the stages that decide their points, and what is wrong with
    these; raises `PlanError` where the rules are, with a `remedy` for those that quantize nothing."""
    with apart(model):
        modules, untouched, drafted, blocks = _resolve_rules(recipe.rules, model, sources, towers)
        modules, unreached, notes = leave_unreached(model, modules, inputs)
    parts, unfit = plan_parts(drafted.parts, recipe, model, sources, inputs)
    if not modules and not parts:
        what = "no rule quantizes anything in this model: the run would change nothing"
        raise PlanError([Problem("", "rules", what, (), remedy)])
    specs = specs_of(modules)
    transforms = Transforms(model, specs, inputs)
    with apart(model, specs):  # as in the run
        stages, problems = plan_stages(stack, modules, drafted.selected, transforms, sources)
    untouched += unreached
    found = ResolvedModule(modules, untouched, stages, blocks, tuple(notes), tuple(transforms.notes), parts)
    return found, [*unfit, *problems]


def _prefix_notes(tokens: int, modules: Sequence[ModulePlan]) -> Iterator[str]:
    if tokens:
        first = "token" if tokens == 1 else f"{tokens} tokens"
        yield f"float_prefix: the activations of the first {first} of each sequence stay float"
        if experts := tuple(module.name for module in modules if EXPERT_NAME.fullmatch(module.name)):
            yield f"float_prefix: {and_more(experts)} quantize all tokens: an expert does not know which it is given"


def check_names(recipe: Recipe, sources: Sources) -> list[StackEntry]:
    """Everything the registries can say of a recipe, without a model; all mistakes in one `RecipeError`."""
    parallel, compared = recipe.calibration.schedule == "parallel", recipe.evaluation.compare_schedules
    stack, problems = check_stack(recipe.stack, sources, recipe.rules, recipe.stack_order, parallel, compared)
    problems += _check_source("calibration", recipe.calibration, sources)
    problems += _check_source("evaluation", recipe.evaluation, sources)
    problems += _check_exports(recipe.export, sources)
    problems += _unreachable(recipe, sources)
    problems += check_quantizers(recipe.rules, sources)
    if problems:
        raise RecipeError(problems)
    return stack


def resolve_specs(
    rules: Mapping[str, Rule], model: nn.Module, sources: Sources
) -> tuple[tuple[ModulePlan, ...], tuple[Untouched, ...]]:
    """The modules that `rules` quantize in `model` (on the meta device or not), and those they leave alone.

    Raises:
        PlanError: every rule without effect and every spec that does not fit its module.
    """
    modules, untouched, *_ = _resolve_rules(rules, model, sources)
    return modules, untouched


def check_export(plan: Plan) -> None:
    """Raise `PlanError` with everything that the formats of its exports cannot say."""
    exporters = make_exporters(plan.recipe.export)
    problems = [problem for name, exporter in exporters.items() for problem in _inexpressible(plan, name, exporter)]
    if problems:
        raise PlanError(problems)


def _inexpressible(plan: Plan, name: str, exporter: Exporter) -> Iterator[Problem]:
    yield from exporter.check(plan)
    if plan.parts and not exporter.takes_parts:
        what = f"{and_more([part.name for part in plan.parts])}: {name} has no word for what PT2E makes of a module"
        takers = [f"export={other}" for other in EXPORTERS if EXPORTERS.get(other).takes_parts]
        remedy = f"run with one that has: {', '.join(takers)}; or with export=none"
        yield Problem(plan.parts[0].source, "export", what, (), remedy)


def _resolve_rules(
    rules: Mapping[str, Rule], model: nn.Module, sources: Sources, towers: Sequence[str] = ()
) -> tuple[tuple[ModulePlan, ...], tuple[Untouched, ...], Drafted, Blocks]:
    """The modules that `rules` quantize, those they leave alone, what each selects and hands over, the blocks."""
    blocks = find_blocks(model)
    sites = find_sites(model, blocks, towers)
    drafted = draft_points(rules, sites, blocks, sources)
    modules, problems = _plan_modules(sites, drafted)
    specs = specs_of(modules)
    problems = [*drafted.problems, *problems, *tied_problems(model, specs)]
    if problems := [*problems, *held_problems(model, {**specs, **drafted.parts})]:
        raise PlanError(problems)  # before the stages, in which what is wrong here would only echo
    return tuple(modules), tuple(_untouched(sites, drafted, specs)), drafted, blocks


def _plan_modules(sites: Sequence[Site], drafted: Drafted) -> tuple[list[ModulePlan], list[Problem]]:
    modules = []
    failures: dict[tuple[str, str], list[str]] = {}
    unfits: dict[tuple[str, str], list[str]] = {}
    for site in sites:
        drafts = drafted.points.get(site.name, {})
        if site.name in drafted.points and (unfit := why_unfit(site, bool(drafts))):
            unfits.setdefault(unfit, []).append(site.name)
            continue
        points = []
        for point in site.points:
            if (draft := drafts.get(point.name)) is None:
                continue
            set_by = tuple(dict.fromkeys(draft.sources.values()))
            try:
                spec = build_spec(site, point, draft)
            except SpecError as error:
                failures.setdefault((" + ".join(set_by), str(error)), []).append(f"{site.name}.{point.name}")
                continue
            points.append(PointPlan(name=point.name, role=point.role, spec=str(spec), sources=set_by))
        if site.wrapper and points:
            modules.append(
                ModulePlan(
                    name=site.name,
                    type=type(site.module).__name__,
                    wrapper=site.wrapper.__name__,
                    block=site.block,
                    multiplies=site.wrapper.multiplies(site.module),
                    groups=site.wrapper.groups(site.module),
                    has_bias=site.module._parameters.get("bias") is not None,
                    weight_shape=weight_shape(site),
                    points=tuple(points),
                )
            )
    problems = [Problem(source, "", f"{and_more(names)}: {what}") for (source, what), names in failures.items()]
    problems += [Problem("", "", f"{and_more(names)}: {what}", (), do) for (what, do), names in unfits.items()]
    return modules, problems


def _untouched(sites: Sequence[Site], drafted: Drafted, quantized: Container[str]) -> Iterator[Untouched]:
    """Modules with parameters of their own or a wrapper, and no quantized point."""
    graphs = [site.name for site in sites if isinstance(site.module, GraphModule)]
    for site in sites:
        own = sum(p.numel() for p in site.module.parameters(recurse=False))
        if site.name in quantized or not (own or site.wrapper) or any(lies_in(site.name, p) for p in drafted.parts):
            continue
        if site.name in drafted.left:
            reason = f"rule {drafted.left[site.name]}"
        elif any(lies_in(site.name, graph) for graph in graphs):
            reason = "in a graph that torch.export traced, which stays as it is"
        elif site.wrapper is None:
            reason = "no wrapper"
        elif site.tower:
            reason = f"no rule names it; beside the language model: {site.tower}"
        elif site.is_gate:
            reason = f"no rule; {'a router' if site.is_router else 'one output'}: type {GATE}"
        else:  # where a rule matches it, what that says is of matrix products alone
            reason = "no rule; every point: activations" if site.name in drafted.points else "no rule"
        yield Untouched(name=site.name, type=type(site.module).__name__, parameters=own, reason=reason)


def _check_source(section: str, config: Calibration | Evaluation, sources: Sources) -> Sequence[Problem]:
    try:
        place = Place(section, "source", type(config).model_fields, sources.of, "source {}")
        build(SOURCES, config.source, config.options, place).check()
    except ProblemsError as error:
        return error.problems
    except CalibrationError as error:
        key = next((k for k in ("path", *config.options) if f"{section}.{k}" in sources.leaves), "source")
        return [sources.problem(f"{section}.{key}", str(error))]
    return []


def _check_exports(exports: Mapping[str, Export], sources: Sources) -> Sequence[Problem]:
    problems: list[Problem] = []
    for name, config in exports.items():
        try:
            make_exporter(name, config, sources.of)
        except ProblemsError as error:
            problems += error.problems
    return problems


def _unreachable(recipe: Recipe, sources: Sources) -> list[Problem]:
    """Goals for exports that the recipe does not ask for: a run could only miss them."""
    problems = []
    for name in recipe.goals.bounds():
        row = metric(name)
        if not row.reachable(recipe.export):
            what = f"a goal for {f'the export to {row.format}' if row.format else 'exports'}, and the recipe has none"
            unknown_format = row.format and row.format not in EXPORTERS
            formats = nearest(row.format, EXPORTERS) if unknown_format else ()
            remedy = f"run with export={row.format or 'FORMAT'}, or without the goal: goals.{name}=null"
            problems.append(sources.problem(f"goals.{name}", what, formats, "" if formats else remedy))
    return problems


def _unread(recipe: Recipe, stages: Sequence[StagePlan], sources: Sources) -> list[Problem]:
    """Keys of the calibration that a recipe or the command line set although no stage looks at data.

    A file that says every one of them is a complete recipe, as `wrapq recipe from-run` writes it, and may.
    """
    if any(stage.needs for stage in stages):
        return []
    written = {
        leaf: source.file
        for leaf, source in sources.leaves.items()
        if leaf.startswith(("calibration.", "evaluation.compare_schedules"))
        and (source.origin is None or source.origin.kind == RECIPE)
    }
    keys = [f"calibration.{key}" for key in Calibration.model_fields]
    complete = {file for file in written.values() if all(written.get(key) == file for key in keys)}
    what = "nothing reads it: no stage of this recipe looks at calibration data"
    return [sources.unread(leaf, what, "leave it out") for leaf, file in written.items() if file not in complete]
