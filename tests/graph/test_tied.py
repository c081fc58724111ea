"""Tied parameters: every place that holds one, and the modules it ties together."""

from __future__ import annotations

from torch import nn

from wrapq.graph.tied import tied_modules, tied_parameters


def tied_model() -> nn.ModuleDict:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "mid": nn.Linear(4, 4), "head": nn.Linear(4, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    return model


def test_each_shared_parameter_is_listed_once_with_all_its_places() -> None:
    model = tied_model()
    assert tied_parameters(model) == [[("embed", "weight"), ("head", "weight")]]
    model["mid"].bias = model["mid"].weight  # under two names of one module
    assert tied_parameters(model)[1] == [("mid", "weight"), ("mid", "bias")]


def test_modules_are_tied_to_all_others_that_hold_a_parameter() -> None:
    model = tied_model()
    model["third"] = nn.Linear(4, 5, bias=False)
    model["third"].weight = model["embed"].weight
    assert tied_modules(model) == {
        "embed": ("head", "third"),
        "head": ("embed", "third"),
        "third": ("embed", "head"),
    }
    assert tied_modules(nn.Linear(2, 2)) == {}
