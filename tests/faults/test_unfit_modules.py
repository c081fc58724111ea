"""A module whose class has a wrapper and that is not what its class says: refused in the plan, never left in float."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import wrapq
from wrapq.errors import PlanError


def _patched(layer: nn.Module) -> nn.Module:
    layer.forward = types.MethodType(lambda self, x: type(self).forward(self, x) * 2, layer)  # type: ignore[assignment]
    return layer


def _hooked(layer: nn.Module) -> nn.Module:
    """As `accelerate.hooks.add_hook_to_module` does it."""
    old = layer.forward
    layer.forward = lambda *args, **kwargs: old(*args, **kwargs)  # type: ignore[method-assign]
    return layer


def _compiled(layer: nn.Module) -> nn.Module:
    """What runs is bound to the module that was compiled, in it or in a copy."""
    layer.compile(backend="eager")
    return layer


def _called(layer: nn.Module) -> nn.Module:
    layer._call_impl = lambda x: type(layer).forward(layer, x) * 2  # type: ignore[assignment, misc]
    return layer


def _doubled_bias(layer: nn.Module) -> nn.Module:
    class Double(nn.Module):
        def forward(self, bias: torch.Tensor) -> torch.Tensor:
            return bias * 2

    parametrize.register_parametrization(layer, "bias", Double())
    return layer


def _pruned_bias(layer: nn.Module) -> nn.Module:
    return prune.l1_unstructured(layer, "bias", 0.5)  # type: ignore[no-untyped-call]


def _pruned(layer: nn.Module) -> nn.Module:
    return prune.l1_unstructured(layer, "weight", 0.5)  # type: ignore[no-untyped-call]


FORWARD = "forward of this {} was replaced on the instance"
WEIGHT, BIAS = (f"{name} of this {{}} is computed from other" for name in ("weight", "bias"))
KINDS: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "patched": (_patched, FORWARD),
    "hooked": (_hooked, FORWARD),
    "compiled": (_compiled, FORWARD),
    "called otherwise": (_called, FORWARD),
    "weight_norm": (parametrizations.weight_norm, WEIGHT),
    "orthogonal": (parametrizations.orthogonal, WEIGHT),
    "old weight_norm": (weight_norm, WEIGHT),
    "old spectral_norm": (spectral_norm, WEIGHT),
    "pruned": (_pruned, WEIGHT),
    "parametrized bias": (_doubled_bias, BIAS),
    "pruned bias": (_pruned_bias, BIAS),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [lambda: nn.Linear(8, 8), lambda: nn.Conv1d(8, 8, 3)], ids=["Linear", "Conv1d"])
@pytest.mark.parametrize("activation", [None, "int8:tensor:asym"], ids=["weights", "both"])
def test_it_is_refused_by_name(kind: str, make: Callable[[], nn.Module], activation: str | None) -> None:
    change, message = KINDS[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        changed = change(make())
    model = nn.Sequential(make(), changed, nn.ReLU())
    before = dict(model.named_modules())
    with pytest.raises(PlanError, match=rf"1: the {message.format(type(changed).__name__)}"):
        wrapq.prepare(model, wrapq.PTQConfig(weight="int8:channel:sym", activation=activation))
    assert dict(model.named_modules()) == before


def test_left_in_float_it_is_none_of_our_business() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), _patched(nn.Linear(8, 8)), parametrizations.weight_norm(nn.Linear(8, 8)))
    x = torch.randn(4, 8)
    config = wrapq.PTQConfig(weight="int8:channel:sym", activation=None, overrides={"1": None, "2": None})
    expected = model(x)
    converted = wrapq.convert(wrapq.prepare(model, config))
    assert (converted(x) - expected).norm() < 0.02 * expected.norm()
    assert not isinstance(converted[0], nn.Linear) or type(converted[0]) is not nn.Linear


@pytest.mark.parametrize("whole", [False, True])
def test_a_scripted_module_has_no_wrapper(whole: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(nn.Sequential(nn.Linear(8, 8)))
    model = scripted if whole else nn.Sequential(nn.Linear(8, 8), scripted)
    with pytest.raises(PlanError, match="no wrapper"):
        wrapq.prepare(model, wrapq.PTQConfig(activation=None, strict=True))


class Holder(nn.Module):
    """Calls its layer by what it holds beside it."""

    def __init__(self, hold: Callable[[nn.Module], object], call: Callable[[object], Callable[..., object]]) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.held, self.call = hold(self.layer), call

    def forward(self, x: object) -> object:
        return self.call(self.held)(x)


HELD: dict[str, tuple[Callable[[nn.Module], object], Callable[[object], Callable[..., object]]]] = {
    "its forward": (lambda layer: layer.forward, lambda held: held),
    "a partial": (partial, lambda held: held),
    "a partial of its forward": (lambda layer: partial(layer.forward), lambda held: held),
    "a list": (lambda layer: [layer], lambda held: held[0]),
    "a tuple in a dict": (lambda layer: {"a": (layer,)}, lambda held: held["a"][0]),
}


@pytest.mark.parametrize("kind", HELD)
@pytest.mark.parametrize("inside", [False, True])
def test_what_is_held_beside_the_tree_is_refused(kind: str, inside: bool) -> None:
    holder = Holder(*HELD[kind])
    model, name = (nn.Sequential(holder, nn.Linear(8, 8)), "0.layer") if inside else (holder, "layer")
    where = "0.held" if inside else "the model.held"
    with pytest.raises(PlanError, match=rf"{name}: held by {where}, which is no module"):
        wrapq.prepare(model, wrapq.PTQConfig(weight="int8:channel:sym", activation=None))
    if inside:
        left = wrapq.PTQConfig(weight="int8:channel:sym", activation=None, overrides={name: None})
        wrapq.convert(wrapq.prepare(model, left))


def test_a_module_in_two_places_is_none_of_these() -> None:
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.Sequential(shared))
    wrapq.convert(wrapq.prepare(model, wrapq.PTQConfig(weight="int8:channel:sym", activation=None)))
