"""Which kernel computes which module: by measuring each distinct shape once."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import geometric_mean

import torch
from torch import Tensor, nn

from wrapq.runtime.kernel import KERNELS, REFERENCE, Inapplicable, Kernel
from wrapq.runtime.module import QuantizedWeight

AUTO = "auto"
ROWS = (1, 128)
"""Rows of the input at which kernels are timed: one token, and a prompt."""
_REPEATS = 5
_SECONDS = 0.05
_CACHE, _MOST_COPIES = 1 << 25, 16
"""A weight is timed in several copies in turn, so many that no cache holds them: a model's next token finds it cold.
One that would take more copies is small, and timed as it is."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class KernelChoice:
    """How one module is computed.

    Attributes:
        module: its name in the model.
        kernel: the kernel's name, or `reference`.
        bytes: what the module's tensors and the kernel's layout take in memory.
        speedups: for each number of rows how many times faster than the reference; empty where nothing was timed.
        float_speedups: the same against the float operation on the dequantized weight.
        reason: why it is the reference, where it is.
    """

    module: str
    kernel: str
    bytes: int
    speedups: Mapping[int, float] = field(default_factory=dict)
    float_speedups: Mapping[int, float] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True)
class KernelReport:
    """The choices for all modules with a quantized weight, in the model's order."""

    choices: tuple[KernelChoice, ...]

    @property
    def bytes(self) -> int:
        """Bytes of all these modules in memory; tensors that several hold count with each."""
        return sum(choice.bytes for choice in self.choices)

    def counts(self) -> dict[str, int]:
        """For each kernel the number of modules that it computes."""
        return dict(Counter(choice.kernel for choice in self.choices))

    def summary(self) -> str:
        """One line: `int8_mm 14 modules (9.1x at 1, 6.0x at 128 rows over the reference), reference 1 modules`."""
        return ", ".join(f"{name} {count} modules{self._speed(name)}" for name, count in self.counts().items())

    def speedup(self, rows: int, kernel: str | None = None) -> float | None:
        """The geometric mean over the timed modules (of `kernel`) at `rows` rows; None where none was timed."""
        chosen = (c for c in self.choices if kernel in (None, c.kernel))
        speeds = [c.speedups[rows] for c in chosen if rows in c.speedups]
        return geometric_mean(speeds) if speeds else None

    def table(self) -> str:
        """A line for each module: name, kernel, bytes, speed over the reference and over float, reason."""
        rows = [("module", "kernel", "bytes", *(f"x{m}" for m in ROWS), *(f"float x{m}" for m in ROWS), "reason")]
        for c in self.choices:
            speeds = [f"{t[m]:.2f}" if m in t else "" for t in (c.speedups, c.float_speedups) for m in ROWS]
            rows.append((c.module, c.kernel, str(c.bytes), *speeds, c.reason))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ("  ".join(t.ljust(w) for t, w in zip(row, widths, strict=True)).rstrip() for row in rows)
        return "\n".join(lines) + "\n"

    def _speed(self, name: str) -> str:
        speeds = {rows: self.speedup(rows, name) for rows in ROWS}
        known = [f"{speed:.1f}x at {rows}" for rows, speed in speeds.items() if speed is not None and name != REFERENCE]
        return f" ({', '.join(known)} rows over the reference)" if known else ""


@torch.no_grad()
def choose_kernels(model: nn.Module, policy: str = AUTO) -> KernelReport:
    """Let the converted modules of `model` run on kernels; the model is changed in place.

    Outputs are then those of the kernels' arithmetic, which is near that of the reference but not the same to the bit.
    A layout is made at a module's first forward and takes the place of its packed weight; nothing float is kept.

    Args:
        model: a converted model.
        policy: `auto` times, for each distinct shape and specs, the reference and every kernel that supports it, with 1
            and 128 rows, and takes the fastest (geometric mean) of those that are faster in both; `reference` leaves
            kernels; the name of a kernel takes it wherever it is supported.

    Raises:
        UnknownNameError: no kernel has the name `policy`.
    """
    candidates = [KERNELS.get(name) for name in {AUTO: tuple(KERNELS), REFERENCE: ()}.get(policy, (policy,))]
    modules = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedWeight)}
    _mark_shared(modules.values())
    by_shape: dict[tuple[object, ...], KernelChoice] = {}
    choices = []
    for name, module in modules.items():
        module.use_kernel(None)
        if (key := _key(module)) not in by_shape:
            by_shape[key] = _choose(module, candidates, policy)
        choice = replace(by_shape[key], module=name)
        module.use_kernel(None if choice.kernel == REFERENCE else KERNELS.get(choice.kernel))
        choices.append(choice)
    report = KernelReport(tuple(choices))
    _log.info("kernels: %s", report.summary() or "no module has a quantized weight")
    return report


def _choose(module: QuantizedWeight, candidates: list[type[Kernel]], policy: str) -> KernelChoice:
    """The choice for all modules of the shape and the specs of `module`."""
    none = KernelChoice("", REFERENCE, _bytes(module, None))
    reasons = {kernel.name: reason for kernel in candidates if (reason := kernel.unsupported(module)) is not None}
    usable = [kernel for kernel in candidates if kernel.name not in reasons]
    if not usable:  # the kernels for this kind of module and device say why, or all where there are none
        near = {name: why for name, why in reasons.items() if not isinstance(why, Inapplicable)} or reasons
        rejected = "; ".join(f"{name}: {why}" for name, why in near.items())
        return replace(none, reason="as asked" if policy == REFERENCE else rejected)
    inputs = {rows: x for rows in ROWS if (x := _input(module, rows)) is not None}
    reference = {rows: _seconds([module.forward], x) for rows, x in inputs.items()}
    floats = _float_seconds(module, inputs)
    copies = _copies(module.weight_packed.nbytes)
    best, best_times = None, reference
    for kernel in usable:
        prepared = [kernel(module) for _ in range(copies)]
        times = {rows: _seconds([each.run for each in prepared], x) for rows, x in inputs.items()}
        faster = all(times[rows] < reference[rows] for rows in times)
        if policy != AUTO or (faster and geometric_mean(times.values()) < geometric_mean(best_times.values())):
            best, best_times = prepared[0], times
    if best is None:
        slow, equal = f"not faster: {', '.join(kernel.name for kernel in usable)}", dict.fromkeys(ROWS, 1.0)
        return replace(none, speedups=equal, float_speedups=_ratios(floats, reference), reason=slow)
    speedups = _ratios(reference, best_times), _ratios(floats, best_times)
    return KernelChoice("", best.name, _bytes(module, best), *speedups)


def _key(module: QuantizedWeight) -> tuple[object, ...]:
    """What decides which kernels support a module and how fast they are."""
    specs = tuple((point, str(spec)) for point, spec in module.specs.items())
    ordered = "weight_permutation" in module._buffers
    layout = (module.weight_layout, module.weight_dtype, module.weight_device, module.keeps_packed, ordered)
    return (type(module), specs, *layout, getattr(module, "bias", None) is None)


def _mark_shared(modules: Collection[QuantizedWeight]) -> None:
    """Tied weights stay one tensor: a kernel must not take it away from one of the modules."""
    for module in modules:
        module.forget_kernel()
    holders = Counter(module.weight_packed.data_ptr() for module in modules)
    for module in modules:
        module.keeps_packed = holders[module.weight_packed.data_ptr()] > 1


def _input(module: QuantizedWeight, rows: int) -> Tensor | None:
    generator = torch.Generator().manual_seed(rows)
    if module.wrapper.kind == "Embedding":
        return torch.randint(0, module.weight_layout[0], (rows,), generator=generator).to(module.weight_device)
    if module.wrapper.kind != "Linear":
        return None
    x = torch.randn(rows, module.weight_columns, generator=generator)
    return x.to(module.weight_device, module.weight_dtype)


def _float_seconds(module: QuantizedWeight, inputs: Mapping[int, Tensor]) -> dict[int, float]:
    kind, weight = module.wrapper.kind, module.weight
    matrix = weight if kind == "Embedding" else module.wrapper.to_matrix(weight)
    operation = nn.functional.embedding if kind == "Embedding" else nn.functional.linear
    copies = [matrix.clone() for _ in range(_copies(matrix.nbytes))]
    return {rows: _seconds([partial(operation, weight=copy) for copy in copies], x) for rows, x in inputs.items()}


def _copies(size: int) -> int:
    """Copies of a weight of `size` bytes that it is timed in."""
    copies = -(-_CACHE // max(1, size))
    return copies if copies <= _MOST_COPIES else 1


def _seconds(functions: Sequence[Callable[[Tensor], object]], x: Tensor) -> float:
    """Seconds of a call in the shortest of some rounds through `functions`, each on a tensor of its own."""
    times: list[float] = []
    for function in functions:
        function(x.clone())
    while len(times) < _REPEATS or (sum(times) < _SECONDS and len(times) < 10 * _REPEATS):
        inputs = [x.clone() for _ in functions]
        _wait(x)
        start = time.perf_counter()
        for function, own in zip(functions, inputs, strict=True):
            function(own)
        _wait(x)
        times.append(time.perf_counter() - start)
    return min(times) / len(functions)


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def _bytes(module: QuantizedWeight, kernel: Kernel | None) -> int:
    own = {**module._buffers, **module._parameters}
    if kernel is not None and kernel.holds_weight and not module.keeps_packed:
        own.pop("weight_packed")
    tensors = [tensor for tensor in own.values() if tensor is not None]
    if kernel is None:
        return tensor_bytes(tensors)
    return tensor_bytes([*tensors, *kernel.tensors()]) + kernel.hidden_bytes


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of `tensors`, those at the same place counted once; an opaque layout counts as its elements."""
    sizes: dict[object, int] = {}
    for tensor in tensors:
        place = tensor.data_ptr() if tensor.layout == torch.strided else id(tensor)
        sizes[place] = max(sizes.get(place, 0), tensor.numel() * tensor.element_size())
    return sum(sizes.values())


def _ratios(slow: Mapping[int, float], fast: Mapping[int, float]) -> dict[int, float]:
    return {rows: slow[rows] / fast[rows] for rows in slow}
