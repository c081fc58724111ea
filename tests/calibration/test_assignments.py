"""Which algorithm finalizes which point: the stages of a plan, and stacks that name no points."""

from __future__ import annotations

import pytest
from torch import nn

from tests.conftest import build_model
from wrapq import PTQConfig, prepare
from wrapq.algorithms.autoround import AutoRound
from wrapq.algorithms.base import Algorithm
from wrapq.algorithms.bias_correction import BiasCorrection
from wrapq.algorithms.cle import CLE
from wrapq.algorithms.gptq import GPTQ
from wrapq.algorithms.low_rank import LowRank
from wrapq.algorithms.ranges import Ranges
from wrapq.algorithms.rtn import RTN
from wrapq.calibration.assignments import Assignments
from wrapq.errors import PlanError
from wrapq.wrappers.model import iter_quantizers
from wrapq.wrappers.quantizer import WeightQuantizer


def test_every_kind_of_algorithm_has_its_place() -> None:
    gptq, autoround, bias, low_rank, ranges = GPTQ(), AutoRound(), BiasCorrection(), LowRank(), Ranges()
    stages = [
        (CLE(), ["a"]),
        (ranges, ["a.input"]),
        (gptq, ["a.weight"]),
        (autoround, ["b.weight"]),
        (low_rank, ["a.weight"]),
        (bias, ["a.weight", "b.weight"]),
    ]
    made = Assignments.from_stages(stages)
    assert made.rounders == {"a.weight": gptq, "b.weight": autoround}
    assert made.range_setters == {"a.input": ranges}
    assert made.correctors == {"a.weight": [low_rank, bias], "b.weight": [bias]}


def test_what_is_no_kind_of_algorithm_has_none() -> None:
    class Odd(Algorithm):
        pass

    with pytest.raises(TypeError, match="Odd is no kind of algorithm"):
        Assignments.from_stages([(Odd(), ["a.weight"])])


def points(model: nn.Module) -> dict[str, WeightQuantizer]:
    return {q.where: q for q in iter_quantizers(model) if isinstance(q, WeightQuantizer)}


def test_a_stack_takes_the_points_it_can() -> None:
    model = prepare(build_model("llama"), PTQConfig("int4:channel:sym", "int8:tensor:asym"))
    gptq, low_rank = GPTQ(), LowRank()
    made = Assignments.from_stack(model, [gptq, low_rank])
    weights = points(model)
    assert made.rounders.keys() == weights.keys()
    assert made.rounders["model.layers.0.mlp.up_proj.weight"] is gptq
    assert isinstance(made.rounders["model.norm.weight"], RTN) and isinstance(
        made.rounders["model.embed_tokens.weight"], RTN
    )
    assert made.range_setters.keys() == {q.where for q in iter_quantizers(model)} - weights.keys()
    up, norm = weights["model.layers.0.mlp.up_proj.weight"], weights["model.norm.weight"]
    assert made.of(up) == (gptq, low_rank) and made.needs(up) == {"hessian"} and made.needs_data(up)
    assert len(made.of(norm)) == 1 and not made.needs(norm) and not made.needs_data(norm)
    assert not made.by_block(up) and Assignments.from_stack(model, [AutoRound()]).by_block(up)


def test_what_a_rounder_cannot_round_is_named() -> None:
    model = prepare(build_model("llama"), PTQConfig("nf4:g16", None))
    with pytest.raises(PlanError, match=r"model\.layers\.0\.\S+weight, nf4:g16"):
        Assignments.from_stack(model, [AutoRound()])
