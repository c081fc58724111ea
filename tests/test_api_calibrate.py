"""`wrapq.calibrate`: a stack of algorithms on any module, through the Python API."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import wrapq
from tests.calibration.conftest import as_batches, decided, gptq_walker
from tests.conftest import build_model
from wrapq import PTQConfig
from wrapq.errors import CalibrationError, LifecycleError, PlanError

CONFIG = PTQConfig(weight="int4:g16:sym", activations="uint8:tensor:asym", overrides={"model.embed_tokens": None})


def test_decides_what_the_walker_of_a_run_decides(token_batches: list[Tensor]):
    model, walked = (wrapq.prepare(build_model("llama"), CONFIG) for _ in range(2))
    batches = [{"input_ids": ids, "use_cache": False} for ids in token_batches]
    report = wrapq.calibrate(model, batches, {"round": "gptq"})
    gptq_walker(walked).run(as_batches(token_batches), "sequential")
    assert decided(model) == decided(walked)
    assert type(report.algorithms["model.layers.0.mlp.up_proj.weight"]).__name__ == "GPTQ"
    assert type(report.algorithms["model.norm.weight"]).__name__ == "RTN"
    assert report.reports["model.layers.1.mlp.down_proj.weight"]["output_error"] > 0 and not report.fallbacks
    out = model(**batches[0]).logits
    assert torch.equal(wrapq.convert(model)(**batches[0]).logits, out)


@pytest.mark.parametrize("algorithm", ["gptq", "adaround", "autoround"])
def test_a_cache_of_keys_and_values_is_not_kept(algorithm: str, token_batches: list[Tensor]):
    """Models keep one unless told otherwise, and a block that is run again would read what it left there itself."""
    stack = {"round": {"algorithm": algorithm, **({} if algorithm == "gptq" else {"iterations": 4})}}
    found = []
    for more in ({}, {"use_cache": False}):
        model = wrapq.prepare(build_model("llama"), PTQConfig("int4:channel:sym", None))
        wrapq.calibrate(model, [{"input_ids": ids, **more} for ids in token_batches], stack)
        found.append(decided(model))
    assert found[0] == found[1]


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.linear(x)


@pytest.mark.parametrize("schedule", ["sequential", "parallel"])
def test_batches_as_tensors_tuples_and_mappings(schedule: str):
    torch.manual_seed(0)
    net, x, mask = Masked(), torch.randn(2, 5, 8), torch.ones(2, 5, dtype=torch.long)
    x[:, 3:] *= 1e3
    mask[:, 3:] = 0
    found = []
    for batch in (x[:, :3], (x, mask), {"attention_mask": mask, "x": x}):
        model = wrapq.prepare(copy.deepcopy(net), PTQConfig(weight="int4:channel:sym"))
        wrapq.calibrate(model, [batch], {"round": {"algorithm": "gptq", "damp": 0.05}}, schedule)
        found.append(decided(model))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    ("stack", "message"),
    [
        ({"round": "gtpq"}, r"calibrate: stack\.round\.algorithm: unknown algorithm 'gtpq'\n    did you mean: gptq"),
        ({"round": {"algorithm": "gptq", "dmap": 1}}, r"gptq has no option 'dmap'\n    did you mean: damp"),
        ({"round": {"damp": 1}}, r"stack\.round\.algorithm: a stage needs algorithm"),
        ({"a": "rtn", "b": "gptq"}, r"stages a and b would decide the same points"),
        ({"round": ["gptq"]}, r"stack\.round: \['gptq'\] is neither an algorithm's name nor a mapping"),
    ],
    ids=["algorithm", "option", "no-algorithm", "twice", "a-list"],
)
def test_mistakes_in_the_stack(stack: dict, message: str):
    model = wrapq.prepare(nn.Sequential(nn.Linear(8, 4)), PTQConfig(activation=None))
    with pytest.raises(PlanError, match=message):
        wrapq.calibrate(model, [torch.randn(3, 8)], stack)


def test_what_cannot_be_calibrated():
    net = nn.Sequential(nn.Linear(8, 4))
    with pytest.raises(LifecycleError, match="call prepare first"):
        wrapq.calibrate(net, [torch.randn(3, 8)], {"round": "gptq"})
    model = wrapq.prepare(net, PTQConfig(activation=None))
    with pytest.raises(CalibrationError, match=r"a batch of 2 arguments, and .*forward names 1"):
        wrapq.calibrate(model, [(torch.randn(3, 8), None)], {"round": "gptq"})
