"""What cannot work for a module, found from shapes before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from types import MethodType

from torch import Tensor, nn

from wrapq.errors import Problem, SpecError, UnknownNameError, and_more
from wrapq.graph.tied import tied_parameters
from wrapq.observers.base import make_observer
from wrapq.quant.affine import scale_shape
from wrapq.quant.spec import QuantSpec
from wrapq.resolve.rules import Draft
from wrapq.resolve.selectors import Site
from wrapq.runtime.module import QuantizedModule
from wrapq.wrappers.base import Point

_OF_TORCH = vars(nn.Module()).keys()
_ACTIVATION_RANK = 3  # [B, T, K]
_FOR_WEIGHTS = "tensor, channel, group or block"
_CALLED = ("forward", "_call_impl", "_slow_forward", "_compiled_call_impl")  # of these, what a call of a module runs
_HEADS = -3  # of [B, H, T, D]


def build_spec(site: Site, point: Point, draft: Draft) -> QuantSpec:
    """The spec that the draft of `point` says; raises `SpecError` when it contradicts itself or does not fit."""
    try:
        spec = QuantSpec.from_fields(draft.fields)
        observer = None if spec.dynamic else make_observer(spec)
    except UnknownNameError as error:
        raise SpecError(str(error)) from None
    operands = site.wrapper.operands(site.module) if site.wrapper else ()
    if observer is not None and observer.needs_consumer and point.name not in operands:
        what = f"{spec.observer} is for inputs that a weight multiplies, and {point.name} is none"
        raise SpecError(f"{spec}: {what}; take mse")
    if point.role == "weight":
        _check_weight(site, spec)
    else:
        _check_activation(site, point, spec)
    return spec


def why_unfit(site: Site, has_points: bool) -> tuple[str, str] | None:
    """Why no wrapper can stand in for this very module although there is one for its class, and a remedy.

    Args:
        site: the module, which rules select.
        has_points: whether they quantize anything in it.
    """
    module = site.module
    if site.holds_experts:
        kind = type(module).__name__
        return (
            f"{kind} keeps experts in one tensor in a way that wrapq does not know, and they would stay float",
            f"leave them in float: {{match: {{type: {kind}}}, quantize: false}}, after the other rules",
        )
    if has_points and any(vars(module).get(name) is not None for name in _CALLED):
        return (
            f"the forward of this {type(module).__name__} was replaced on the instance, as hooks of accelerate, "
            "compile() and patches do, and a quantized module would not run its own",
            "undo that (accelerate.hooks.remove_hook_from_module), compile what convert returns, or leave it in float: "
            "quantize: false",
        )
    plain = {"weight": {*module._parameters}, "bias": {*module._parameters, *module._buffers}}
    tensors = (name for name in plain if isinstance(getattr(module, name, None), Tensor))
    computed = [name for name in tensors if name not in plain[name]]
    if isinstance(module, QuantizedModule):  # converted already, which is told elsewhere
        return None
    if computed and site.wrapper is not None and any(point.role == "weight" for point in site.wrapper.points):
        return (
            f"the {computed[0]} of this {type(module).__name__} is computed from other parameters at each forward "
            "(a parametrization, weight_norm)",
            f"make it a plain one (torch.nn.utils.parametrize.remove_parametrizations(module, '{computed[0]}'), "
            "torch.nn.utils.remove_weight_norm), or leave it in float: quantize: false",
        )
    return None


def weight_shape(site: Site) -> tuple[int, int] | None:
    """The shape of the site's weight as a matrix [N, K], or None where it has no weight."""
    weight = site.module._parameters.get("weight")
    if site.wrapper is None or weight is None:
        return None
    rows, columns = site.wrapper.to_matrix(weight).shape
    return int(rows), int(columns)


def tied_problems(model: nn.Module, specs: Mapping[str, Mapping[str, QuantSpec]]) -> Iterator[Problem]:
    """Weights that several modules share must get one spec, or none: quantizing one of them would untie them."""
    for places in tied_parameters(model):
        names = [name for name, parameter in places if parameter == "weight"]
        given = {name: str(specs.get(name, {}).get("weight", "float")) for name in names}
        if len(set(given.values())) > 1:
            listed = ", ".join(f"{name}.weight is {spec}" for name, spec in given.items())
            what = f"these are one tied tensor, but {listed}"
            yield Problem("", "rules", what, (), "give them the same weight spec, or leave them all float")


def held_problems(model: nn.Module, specs: Mapping[str, object]) -> Iterator[Problem]:
    """Modules that an attribute holds beside the tree of modules: what calls that would go on with the float one."""
    names = {id(module): name for name, module in model.named_modules() if name in specs}
    for owner, module in model.named_modules():
        for key in [key for key in vars(module) if key not in _OF_TORCH]:
            found = [each for each in _modules_in(vars(module)[key]) if each is not module]
            if held := [names[id(each)] for each in found if id(each) in names]:
                where = f"{owner or 'the model'}.{key}, which is no module"
                what = f"{and_more(held)}: held by {where}: what calls that would go on with the float one"
                yield Problem("", "", what, (), "use its place in the model, or leave it in float: quantize: false")


def _modules_in(value: object) -> Iterator[nn.Module]:
    """The modules in a list, tuple or dict, behind a bound method or a `partial`."""
    match value:
        case list() | tuple():
            yield from (module for each in value for module in _modules_in(each))
        case dict():
            yield from _modules_in(list(value.values()))
        case partial():
            yield from _modules_in([value.func, *value.args, *value.keywords.values()])
        case MethodType():
            yield from _modules_in(value.__self__)
        case nn.Module():
            yield value


def _check_weight(site: Site, spec: QuantSpec) -> None:
    if spec.dynamic or spec.local:
        word = "dynamic" if spec.dynamic else "local"
        raise SpecError(f"{spec}: a weight does not change, so it cannot be {word}: use {_FOR_WEIGHTS}")
    if spec.granularity == "head":
        raise SpecError(f"{spec}: a weight has no heads: use {_FOR_WEIGHTS}")
    shape = weight_shape(site)
    if shape is None:
        raise SpecError(f"{spec}: {type(site.module).__name__} has no weight")
    _check_groups(spec, shape)


def _check_activation(site: Site, point: Point, spec: QuantSpec) -> None:
    if spec.zero_point != "int":
        raise SpecError(f"{spec}: {spec.zero_point} zero points are for weights; {point.name} needs zero_point: int")
    fixed = site.wrapper.fixed_axes(site.module, point) if site.wrapper is not None else point.fixed_axes
    if spec.granularity == "block" and not spec.dynamic:
        what = "fixed blocks have rows, and so no meaning for tensors of varying length: use groups, or add dyn"
        raise SpecError(f"{spec}: {what}")
    if spec.granularity == "head" and (point.fixed_axes is None or _HEADS not in point.fixed_axes):
        having = [p.name for p in site.points if p.fixed_axes is not None and _HEADS in p.fixed_axes]
        has = f"of {type(site.module).__name__} only {', '.join(having)} have" if having else "it has none"
        raise SpecError(f"{spec}: one scale for each attention head, and {has}: use tensor, or token with dyn")
    if spec.granularity == "channel":
        axis = spec.axis or 0
        if axis >= 0 and (fixed is None or -1 in fixed):
            raise SpecError(f"{spec}: an activation's channels are its last axis: write channel@-1 (axis: -1)")
        if fixed is not None and axis not in fixed and (axis >= 0 or not spec.dynamic):
            known = ", ".join(f"channel@{known}" for known in fixed)
            raise SpecError(f"{spec}: that axis of {point.name} is as long as the data: use {known}, or tensor")
    if spec.granularity == "group":
        if fixed is not None and -1 not in fixed:
            raise SpecError(f"{spec}: the last axis of {point.name} is as long as the data, so it has no groups")
        if site.wrapper is not None and (width := site.wrapper.width(site.module, point.name)) is not None:
            _check_groups(spec, (1,) * (_ACTIVATION_RANK - 1) + (width,))


def _check_groups(spec: QuantSpec, shape: Sequence[int]) -> None:
    try:
        scale_shape(shape, spec)
    except SpecError as error:
        width = shape[-1]
        near = sorted((d for d in range(8, width + 1) if width % d == 0), key=lambda d: abs(d - (spec.group_size or 0)))
        divided = near and spec.granularity == "group" and not spec.super_blocks
        hint = f"; {width} is divided by {', '.join(map(str, near[:4]))}" if divided else ""
        raise SpecError(f"{error}{hint}") from None
