"""Wrapping a whole model, undoing it, and converting it: each all or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

from torch import nn

from wrapq.errors import LifecycleError, ModelError
from wrapq.quant.spec import QuantSpec
from wrapq.runtime.module import QuantizedModule
from wrapq.runtime.rotation import ONLINE, OnlineRotation, rotate_inputs
from wrapq.runtime.smoothing import SMOOTHING, InputSmoothing, KeySmoothing, smooth_inputs
from wrapq.wrappers.attention import Attention, use_attention_points
from wrapq.wrappers.base import QuantModuleBase
from wrapq.wrappers.experts import forget_fused, put_together, take_apart
from wrapq.wrappers.quantizer import Quantizer
from wrapq.wrappers.wrapper_registry import WRAPPERS

Specs = Mapping[str, Mapping[str, QuantSpec]]
"""For each module, by name, the spec of each of its points."""


def wrap_model(model: nn.Module, specs: Specs) -> nn.Module:
    """Replace the modules named in `specs` by wrapped ones that observe; returns the model, or its stand-in.

    Experts that share a tensor are taken apart where `specs` name them. A failure leaves the model as it was.

    Raises:
        LifecycleError: when the model is wrapped already, or a name in `specs` is no module or no point.
        ModelError: when a module has no wrapper.
    """
    if next(iter_wrapped(model), None) is not None:
        raise LifecycleError("the model is prepared already: restore() or convert() it first")
    if any(isinstance(module, QuantizedModule) for module in model.modules()):
        raise LifecycleError("the model is converted already: prepare the float model it comes from")
    model = take_apart(model, specs)
    try:
        wrapped = _wrapped(model, specs)
    except BaseException:
        put_together(model)
        raise
    model = place_modules(model, wrapped)
    attentions = [module for module in wrapped.values() if isinstance(module, Attention)]
    for module in attentions:
        module.__dict__["original_implementation"] = module.config._attn_implementation
    for module in attentions:  # once all know theirs: they share a configuration
        use_attention_points(module.config)
    return model


def _wrapped(model: nn.Module, specs: Specs) -> dict[str, QuantModuleBase]:
    """A wrapper for each module in `specs`, observing, and none in its place yet."""
    modules = dict(model.named_modules())
    wrapped: dict[str, QuantModuleBase] = {}
    for name, points in specs.items():
        if name not in modules:
            raise LifecycleError(f"the model has no module {name!r}")
        if (wrapper := WRAPPERS.find(modules[name])) is None:
            raise ModelError(f"no wrapper for {name} ({type(modules[name]).__name__})")
        wrapped[name] = QuantModuleBase.wrap(modules[name], wrapper, points, name)
    for module in wrapped.values():
        for quantizer in module.point_quantizers().values():
            quantizer.observe()
    return wrapped


def unwrap_model(model: nn.Module) -> nn.Module:
    """Put the float modules back, exactly as they were before `wrap_model`."""
    wrapped = dict(iter_wrapped(model))
    model = place_modules(model, {name: module.original for name, module in wrapped.items()})
    for module in wrapped.values():
        if isinstance(module, Attention):
            module.config._attn_implementation = module.original_implementation
    return put_together(model)


def convert_model(model: nn.Module, frees: bool = False) -> nn.Module:
    """Replace every wrapped module by the one that holds integers, with the same outputs.

    Args:
        frees: let each weight go, float and rounded, as soon as it is packed, although somebody may still hold what the
            model was wrapped in, which computes no more.

    Raises:
        LifecycleError: naming every point that is not quantized and saw no data; the model is left as it was.
    """
    wrapped = dict(iter_wrapped(model))
    if not wrapped:
        raise LifecycleError("the model is not prepared: nothing to convert")
    if failures := unready(iter_quantizers(model)):
        more = f"\n  and {len(failures) - 10} more" if len(failures) > 10 else ""
        raise LifecycleError("cannot convert:\n  " + "\n  ".join(failures[:10]) + more)
    shared: dict[int, QuantizedModule] = {}
    converted: dict[str, Any] = {}
    for name, module in wrapped.items():
        if module.weight_quantizer is None:
            converted[name] = module.converted()
        else:
            key = id(module.float_weight())
            converted[name] = module.converted(shared.get(key))
            shared.setdefault(key, converted[name])
            if frees:
                module.free_weight()
    before = {id(tensor) for tensor in chain(model.parameters(), model.buffers())} if frees else ()
    model = place_modules(model, converted)
    forget_fused(model)
    for tensor in chain(model.parameters(), model.buffers()):
        if id(tensor) in before and tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()  # one that lies in a file mapped into memory holds all of it there
    return model


def unready(points: Iterable[Quantizer]) -> list[str]:
    """Why each of `points` that is neither quantized nor saw data cannot be converted."""
    failures = []
    for quantizer in points:
        try:
            quantizer.check()
        except LifecycleError as error:
            failures.append(str(error))
    return failures


def add_rotation(module: nn.Module, rotation: OnlineRotation) -> Callable[[], object]:
    """Let the float `module` rotate what comes to it at each forward: an attention its queries and keys once it is
    wrapped, any other its input. Returns what undoes it."""
    module.register_module(ONLINE, rotation)
    return _add_online(module, ONLINE, rotation, rotate_inputs)


def add_smoothing(module: nn.Module, smoothing: InputSmoothing | KeySmoothing) -> Callable[[], object]:
    """Let the float `module` smooth what comes to it at each forward: an attention its queries and keys once it is
    wrapped, any other its input. Returns what undoes it."""
    return _add_online(module, SMOOTHING, smoothing, smooth_inputs)


def empty_smoothing(module: nn.Module) -> InputSmoothing | KeySmoothing:
    """The smoothing that `module` would have, its tensors still to be loaded."""
    return KeySmoothing() if is_attention(module) else InputSmoothing()


def is_attention(module: nn.Module) -> bool:
    """Whether `module` changes queries and keys instead of its input."""
    wrapper = WRAPPERS.find(module)
    return wrapper is not None and issubclass(wrapper, Attention)


def _add_online(
    module: nn.Module, name: str, change: nn.Module, add_hook: Callable[[nn.Module], Any]
) -> Callable[[], object]:
    module.register_module(name, change)
    hook = None if is_attention(module) else add_hook(module)

    def undo() -> None:
        module._modules.pop(name)
        if hook is not None:
            hook.remove()

    return undo


def iter_wrapped(model: nn.Module) -> Iterator[tuple[str, QuantModuleBase]]:
    """The wrapped modules of `model` by name, outer before inner."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, QuantModuleBase))


def iter_quantizers(model: nn.Module) -> Iterator[Quantizer]:
    """All quantization points of `model`."""
    return (quantizer for _, module in iter_wrapped(model) for quantizer in module.point_quantizers().values())


def place_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> nn.Module:
    """Put `modules` in the places of those of their names; returns the model, or what stands for it as a whole."""
    new = {id(model.get_submodule(name)): module for name, module in modules.items()}
    # a module may stand at several places, and each of them gets the new one
    places = {name: new[id(old)] for name, old in model.named_modules(remove_duplicate=False) if id(old) in new}
    # outer before inner: an inner one then lands in the table of the new outer one, not of the old
    for name in sorted(places, key=lambda n: (n.count("."), n != "")):
        if not name:
            model = places[name]
            continue
        parent, _, child = name.rpartition(".")
        model.get_submodule(parent)._modules[child] = places[name]
    return model
