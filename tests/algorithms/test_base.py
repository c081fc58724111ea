"""The kinds of algorithm: what the skeletons in their docstrings say is true, and nothing else can be registered."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from pydantic import Field
from torch import Tensor

import wrapq
from tests.conftest import build_model
from wrapq.algorithms import base, scaling, transform
from wrapq.algorithms.base import ALGORITHMS, Algorithm, BlockRounder, Corrector, RangeSetter, Rounder
from wrapq.algorithms.transform import Transform
from wrapq.errors import WrapqError
from wrapq.observers.base import observe_tensor
from wrapq.registry import Options

CONFIG = wrapq.PTQConfig("int4:channel:sym", "uint8:tensor:asym", {"model.embed_tokens": None})
NAMES = (
    vars(base)
    | vars(transform)
    | vars(scaling)
    | {
        "Field": Field,
        "Options": Options,
        "observe_tensor": observe_tensor,
        "replace": dataclasses.replace,
        "torch": torch,
    }
)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ALGORITHMS, "_entries", {name: ALGORITHMS.get(name) for name in ALGORITHMS})


def run_skeleton(kind: type[Algorithm]) -> None:
    """Execute the indented code of a kind's docstring, as a plug-in's file would be imported."""
    lines = kind.__doc__.partition("Attributes:")[0].splitlines()
    code = "\n".join(line[8:] for line in lines if line.startswith(" " * 8) or not line)
    exec(compile(code, kind.__name__, "exec"), dict(NAMES))


@pytest.mark.parametrize(
    ("kind", "stack"),
    [
        (Rounder, {"round": "nearest"}),
        (BlockRounder, {"round": "best_observer"}),
        (RangeSetter, {"ranges": {"algorithm": "wider", "factor": 1.5}}),
        (Corrector, {"correct": "mean_output"}),
        (Transform, {"even": {"algorithm": "even", "power": 0.4}}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_the_skeleton_of_each_kind_runs(kind: type[Algorithm], stack: dict, token_batches: list[Tensor]) -> None:
    run_skeleton(kind)
    plain, model = (wrapq.prepare(build_model("llama"), CONFIG) for _ in range(2))
    batches = [{"input_ids": ids} for ids in token_batches]
    wrapq.calibrate(plain, batches, {"round": "rtn"})
    made = wrapq.calibrate(model, batches, stack)
    where = "model.layers.1.mlp.down_proj"
    before, point = (dict(m.named_modules())[where].point_quantizers()["input"] for m in (plain, model))
    weight = dict(model.named_modules())[where].weight_quantizer
    if kind is Rounder:
        assert made.reports[f"{where}.weight"]["input_power"] > 0
    elif kind is BlockRounder:
        assert type(made.algorithms[f"{where}.weight"]).__name__ == "BestObserver" and not made.fallbacks[2:]
    elif kind is RangeSetter:
        assert torch.allclose(point.scale, before.scale * 1.5, rtol=0.2)
    elif kind is Transform:
        assert made.transforms["even"]["model.layers.1.input_layernorm"]["largest_factor"] > 0
    else:
        assert weight.bias is not None and weight.bias.abs().max() > 0


def test_what_is_none_of_the_kinds_cannot_be_registered() -> None:
    class Odd(Algorithm):
        phase = "round"
        handles = "weight"

    with pytest.raises(WrapqError, match=r"'odd': Odd is no kind of algorithm .*: transform, range setter, rounder,"):
        ALGORITHMS.register("odd")(Odd)
    assert "odd" not in ALGORITHMS
