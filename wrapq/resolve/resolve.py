"""From a recipe to a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError
from torch import nn

from wrapq.calibration.blocks import Blocks, find_blocks
from wrapq.calibration.sources.base import SOURCES, Source
from wrapq.errors import CalibrationError, PlanError, Problem, RecipeError, SpecError, UnknownNameError, Unread
from wrapq.recipe.schema import Calibration, Evaluation, Export, Recipe, Rule
from wrapq.resolve.checks import build_spec, tied_problems, weight_shape
from wrapq.resolve.estimate import estimate
from wrapq.resolve.exporter import EXPORTERS, NONE, make_exporter
from wrapq.resolve.model import ModelSource
from wrapq.resolve.plan import ModelFacts, ModulePlan, Plan, PointPlan, Untouched
from wrapq.resolve.rules import Drafted, Sources, draft_points
from wrapq.resolve.selectors import GATE, Site, find_sites
from wrapq.resolve.stages import StackEntry, check_stack, option_problems, plan_stages
from wrapq.resolve.transforms import Transforms
from wrapq.wrappers.experts import apart


def resolve(recipe: Recipe, sources: Mapping[str, Any] | None = None, trust_remote_code: bool = False) -> Plan:
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
        model = ModelSource(recipe.model, trust_remote_code).meta_model()
    except PlanError as error:
        raise PlanError([replace(p, where=where.where("model.path")) for p in error.problems]) from None
    return resolve_model(recipe, model, stack, where)


def check_names(recipe: Recipe, sources: Sources) -> list[StackEntry]:
    """Everything the registries can say of a recipe, without a model; all mistakes in one `RecipeError`."""
    stack, problems = check_stack(recipe, sources)
    problems += _check_source("calibration", recipe.calibration, sources)
    problems += _check_source("evaluation", recipe.evaluation, sources)
    problems += _check_export(recipe.export, sources)
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
    resolved = _resolve_rules(rules, model, sources)
    return resolved.modules, resolved.untouched


def resolve_model(recipe: Recipe, model: nn.Module, stack: Sequence[StackEntry], sources: Sources) -> Plan:
    """The plan of a recipe whose names are checked, for `model`; see `resolve`."""
    with apart(model):
        resolved = _resolve_rules(recipe.rules, model, sources)
    if not resolved.modules:
        what = "no rule quantizes anything in this model: the run would change nothing"
        raise PlanError([Problem("rules", what, (), "wrapq evaluate measures a model as it is")])
    specs = {m.name: {p.name: p.quant_spec for p in m.points} for m in resolved.modules}
    transforms = Transforms(model, specs)
    with apart(model, specs):  # as in the run
        stages, problems = plan_stages(stack, resolved.modules, resolved.selected, transforms, sources)
    needs_data = any(stage.needs for stage in stages)
    if problems := problems + _unread(recipe, needs_data, sources):
        raise PlanError(problems)
    facts = ModelFacts(
        path=recipe.model.path,
        type=type(model).__name__,
        parameters=sum(p.numel() for p in model.parameters()),
        blocks=resolved.blocks.prefix,
        block_count=resolved.blocks.count,
    )
    with apart(model):
        estimated = estimate(model, resolved.modules, recipe, needs_data, stages)
    plan = Plan(
        recipe=recipe,
        model=facts,
        modules=resolved.modules,
        untouched=resolved.untouched,
        stages=stages,
        estimate=estimated,
        notes=tuple(transforms.notes),
        presets=sources.origins(),
    )
    check_export(plan)
    return plan


def check_export(plan: Plan) -> None:
    """Raise `PlanError` with everything that the export's format cannot say."""
    exporter = make_exporter(plan.recipe.export)
    if exporter is not None and (problems := list(exporter.check(plan))):
        raise PlanError(problems)


@dataclass(frozen=True)
class _Resolved:
    modules: tuple[ModulePlan, ...]
    untouched: tuple[Untouched, ...]
    selected: Mapping[str, Sequence[Site]]
    blocks: Blocks


def _resolve_rules(rules: Mapping[str, Rule], model: nn.Module, sources: Sources) -> _Resolved:
    blocks = find_blocks(model)
    sites = find_sites(model, blocks)
    drafted = draft_points(rules, sites, blocks, sources)
    modules, problems = _plan_modules(sites, drafted)
    specs = {m.name: {p.name: p.quant_spec for p in m.points} for m in modules}
    if problems := [*drafted.problems, *problems, *tied_problems(model, specs)]:
        raise PlanError(problems)  # before the stages, in which what is wrong here would only echo
    untouched = tuple(_untouched(sites, drafted, set(specs)))
    return _Resolved(tuple(modules), untouched, drafted.selected, blocks)


def _plan_modules(sites: Sequence[Site], drafted: Drafted) -> tuple[list[ModulePlan], list[Problem]]:
    modules = []
    failures: dict[tuple[str, str], list[str]] = {}
    for site in sites:
        drafts = drafted.points.get(site.name, {})
        points = []
        for point in site.points:
            if (draft := drafts.get(point.name)) is None:
                continue
            said = tuple(dict.fromkeys(draft.sources.values()))
            try:
                spec = build_spec(site, point, draft)
            except SpecError as error:
                failures.setdefault((" + ".join(said), str(error)), []).append(f"{site.name}.{point.name}")
                continue
            points.append(PointPlan(name=point.name, role=point.role, spec=str(spec), sources=said))
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
    problems = [
        Problem(where, f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {what}")
        for (where, what), names in failures.items()
    ]
    return modules, problems


def _untouched(sites: Sequence[Site], drafted: Drafted, quantized: set[str]) -> list[Untouched]:
    """Modules with parameters of their own or a wrapper, and no quantized point."""
    rows = []
    for site in sites:
        own = sum(p.numel() for p in site.module.parameters(recurse=False))
        if site.name in quantized or not (own or site.wrapper):
            continue
        if site.wrapper is None:
            reason = "no wrapper"
        elif site.name in drafted.left:
            reason = f"rule {drafted.left[site.name]}"
        else:
            reason = f"no rule; one output: type {GATE}" if site.is_gate else "no rule"
        rows.append(Untouched(name=site.name, type=type(site.module).__name__, parameters=own, reason=reason))
    return rows


def _check_source(section: str, config: Calibration | Evaluation, sources: Sources) -> list[Problem]:
    try:
        kind: type[Source] = SOURCES.get(config.source)
    except UnknownNameError as error:
        return [Problem(sources.where(f"{section}.source"), f"unknown data source {config.source!r}", error.nearest)]
    try:
        kind(kind.Options.model_validate(config.options)).check()
    except ValidationError as error:
        valid = [*kind.Options.model_fields, *type(config).model_fields]
        return list(option_problems(error, section, valid, f"source {config.source}", sources))
    except CalibrationError as error:
        said = next((k for k in ("path", *config.options) if f"{section}.{k}" in sources.leaves), "source")
        return [Problem(sources.where(f"{section}.{said}"), str(error))]
    return []


def _check_export(config: Export, sources: Sources) -> list[Problem]:
    where = sources.where("export.format")
    if config.format == NONE:
        what = "nothing reads it: export.format is none"
        return [
            Unread(sources.where(f"export.{key}"), what, (), "choose a format: export=...") for key in config.options
        ]
    try:
        kind = EXPORTERS.get(config.format)
    except UnknownNameError as error:
        return [Problem(where, f"unknown export format {config.format!r}", (*error.nearest, NONE))]
    try:
        kind.Options.model_validate(config.options)
    except ValidationError as error:
        valid = [*kind.Options.model_fields, *Export.model_fields]
        return list(option_problems(error, "export", valid, f"the format {config.format}", sources))
    return []


def _unread(recipe: Recipe, needs_data: bool, sources: Sources) -> list[Problem]:
    """Keys of the calibration that a recipe or the command line set although no stage looks at data.

    A file that says every one of them is a complete recipe, as `wrapq recipe from-run` writes it, and may.
    """
    if needs_data:
        return []
    said = {
        leaf: str(source).rpartition(":")[0]
        for leaf, source in sources.leaves.items()
        if leaf.startswith(("calibration.", "evaluation.compare_schedules")) and not str(source).startswith("conf/")
    }
    keys = [f"calibration.{key}" for key in Calibration.model_fields]
    complete = {file for file in said.values() if all(said.get(key) == file for key in keys)}
    what = "nothing reads it: no stage of this recipe looks at calibration data"
    return [
        Unread(sources.where(leaf), what, (), "leave it out") for leaf, file in said.items() if file not in complete
    ]
