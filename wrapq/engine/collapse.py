"""Where a model collapsed: each kind of point is left in float alone, and what the model predicts then is compared."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from wrapq.calibration.walker import Walker
from wrapq.data.samples import Samples
from wrapq.engine.calibrate import offloading
from wrapq.engine.context import Run
from wrapq.engine.goals import SURVIVAL, collapsed, judge, lost
from wrapq.engine.measure import Quality, Stages, measure_stages
from wrapq.metrics import FLOAT, KL, METRICS, QUANTIZED, STAGES, WEIGHTS, Measured
from wrapq.resolve.plan import Plan, StagePlan
from wrapq.wrappers.quantizer import Quantizer, WeightQuantizer

_AGREEMENT = "top1_agreement"
_TOKENS = 256  # of one sample
_LOUD = 3.0  # dB: half as much noise as signal
_SHOWN = 3
_FEW, _ENOUGH = 8192, 64  # tokens, and the default number of samples
_OWN_KEYS = ("weight", "input", "output")  # of a rule; other points stand under `points`


def explain_collapse(run: Run, walker: Walker, samples: Samples, quality: Quality) -> None:
    """Note at which stage, from which block on and by which kinds of points the model collapsed, if it did, and what to
    change. A kind is the points of one name in all blocks, such as `mlp.down_proj.input`."""
    if not collapsed(judge(run.plan.recipe.goals, Measured(quality.stages).figures())):
        return
    stage = WEIGHTS if _by_weights(quality) else QUANTIZED
    kinds: dict[str, list[Quantizer]] = {}
    for point in walker.points():
        if WEIGHTS not in quality.stages or isinstance(point, WeightQuantizer) == (stage == WEIGHTS):
            name = re.sub(rf"^{re.escape(walker.blocks.prefix)}\.\d+\.", f"{walker.blocks.prefix}.*.", point.where)
            kinds.setdefault(name, []).append(point)
    without = {kind: partial(_is_none_of, frozenset(map(id, points))) for kind, points in kinds.items()}
    stages: Stages = {FLOAT: lambda _: False, **without, QUANTIZED: lambda _: True}
    ids, mask = samples.input_ids, samples.attention_mask
    row = slice(0, 1) if mask is None else slice(longest := int(mask.sum(1).argmax()), longest + 1)
    sample = Samples(ids[row, :_TOKENS], None if mask is None else mask[row, :_TOKENS], samples.digest)
    with run.step("diagnose", "Looking for what made it collapse"), offloading(run, walker.model) as offload:
        found = measure_stages(walker.model, sample, 1, lambda: None, walker.options.loader, offload, stages=stages)
    agreement = {name: metrics[_AGREEMENT] for name, metrics in list(found.stages.items())[1:]}
    points = {point.where for each in kinds.values() for point in each}
    by = [s for s in run.plan.stages if s.phase != "transform" and points & set(s.targets)]
    for text in (_where(stage, by, quality.curves), *_by_little(run.plan, by), *_by_what(kinds, agreement)):
        run.note(f"collapsed: {text}")


def _where(stage: str, by: Sequence[StagePlan], curves: Mapping[str, Sequence[float]]) -> str:
    text = f"with {STAGES[stage]}" + (f", by stage {', '.join(s.name for s in by)}" if by else "")
    loud = next((i for i, sqnr in enumerate(curves.get("layer/sqnr_db", ())) if sqnr < _LOUD), None)
    return text if loud is None else f"{text}; from block {loud} on the outputs are at least a third noise"


def _by_little(plan: Plan, by: Sequence[StagePlan]) -> Iterator[str]:
    """What rounds the weights of matrix products and looks at no data, which costs most at few bits, or at little."""
    multiplying = {f"{module.name}.weight" for module in plan.modules if module.multiplies}
    for stage in (s for s in by if s.phase == "round" and not s.needs and multiplying & set(s.targets)):
        change = f"algorithm@stack.{stage.name}=gptq"
        yield f"{stage.algorithm} looks at no data: try {change}, which rounds by what comes out of a layer"
    tokens = plan.estimate.calibration_tokens
    if 0 < tokens < _FEW and any(stage.needs for stage in by):
        yield f"{tokens:,} calibration tokens are few: try calibration.samples={_ENOUGH}"


def _by_what(kinds: Mapping[str, Sequence[Quantizer]], agreement: Mapping[str, float]) -> Iterator[str]:
    show = METRICS.get(_AGREEMENT).show
    best = sorted(kinds, key=lambda kind: -agreement[kind])
    gained = [f"{kind} ({kinds[kind][0].spec}) {show(agreement[kind])}" for kind in best[:_SHOWN]]
    whole = f"top-1 agreement of {show(agreement[QUANTIZED])} on a sample"
    yield f"{whole}; with one kind of point in float: {', '.join(gained)}"
    if agreement[best[0]] < SURVIVAL[_AGREEMENT]:
        yield "no kind of point alone is to blame: try more bits, smaller groups, or a recipe that rotates"
        return
    module, _, point = best[0].rpartition(".")
    key = f"{point}: float" if point in _OWN_KEYS else f"points: {{{point}: float}}"
    yield f"try '+rules.kept={{match: {{name: \"{module}\"}}, {key}}}', or a finer spec for these points"


def _by_weights(quality: Quality) -> bool:
    """Whether the weights alone did it, or more of it than the activations did."""
    if (weights := quality.stages.get(WEIGHTS)) is None:
        return False
    ruined = lost(Measured({FLOAT: quality.stages[FLOAT], QUANTIZED: weights}).figures())
    return bool(ruined) or weights[KL] > quality.stages[QUANTIZED][KL] / 2


def _is_none_of(points: frozenset[int], point: Quantizer) -> bool:
    return id(point) not in points
