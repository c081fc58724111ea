"""Several observers on one point, in one pass over the data, and the error of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Self

import torch
from pydantic import Field
from torch import Tensor

from wrapq.errors import CalibrationError, SpecError
from wrapq.observers.base import OBSERVERS, Observer, all_finite, make_observer, scale_rows, weight_global_scale
from wrapq.observers.histogram import HistogramObserver
from wrapq.observers.mse import histogram_error
from wrapq.quant.affine import effective_scale, fake_quantize_elements, global_scale_for, range_to_qparams, reduce_range
from wrapq.quant.rounded_scales import zero_in_steps
from wrapq.quant.spec import QuantSpec
from wrapq.registry import Options

BEST = "best"


class CompareOptions(Options):
    """Options of `compare`."""

    of: str = Field("minmax+percentile+mse", strict=True, description="names of observers, joined by +")
    choose: str = Field(
        BEST,
        strict=True,
        description="best, for each scale the range with the least error, the first of equals; or one of the names",
    )


@OBSERVERS.register("compare")
class Compare(Observer):
    """Feeds several observers with the same data and takes one's range: `observer: {compare: [minmax, percentile,
    mse]}`.

    The error of each is the expected squared error over a histogram of the data or, for a tensor at hand, the squared
    error itself; `report()` gives it per element. Each observer has its default options.

    Raises:
        SpecError: no names, one of them twice or `compare` itself, or `choose` is none of them.
        UnknownNameError: one of them is no observer.
    """

    Options = CompareOptions
    options: CompareOptions

    def __init__(self, spec: QuantSpec, options: CompareOptions | None = None) -> None:
        super().__init__(spec, options)
        of, choose = self.options.of, self.options.choose
        names = [name.strip() for name in of.split("+")]
        if len(set(names)) != len(names) or "compare" in names:
            raise SpecError(f"{spec}: compare needs names of different observers, not {of!r}")
        if choose not in (BEST, *names):
            raise SpecError(f"{spec}: choose is {BEST} or one of {', '.join(names)}, not {choose!r}")
        self.children = {name: make_observer(replace(self.spec, observer=name, observer_options=())) for name in names}
        self.needs_consumer = any(child.needs_consumer for child in self.children.values())
        self.judge = HistogramObserver(self.spec)
        self.all: dict[str, Observer] = {**self.children, "histogram": self.judge}
        self._report: dict[str, dict[str, float]] = {}

    def update(self, x: Tensor) -> None:
        for observer in self.all.values():
            observer.consumer, observer.batch = self.consumer, self.batch
            observer.update(x)

    def merge(self, other: Self) -> None:
        for name, observer in self.all.items():
            observer.merge(other.all[name])

    def range(self) -> tuple[Tensor, Tensor]:
        ranges = {name: observer.range() for name, observer in self.children.items()}
        if not all_finite(*self.bounds()):
            return next(iter(ranges.values()))
        counts, width = self.judge.histogram()
        errors, whole = {}, global_scale_for(*self.bounds(), self.spec)
        for name, (low, high) in ranges.items():
            scale, zero_point = self._parameters(low, high, whole)
            errors[name] = histogram_error(counts, width, scale, zero_point, self.spec.dtype, 2.0).reshape(low.shape)
        return self._chosen(ranges, errors, int(counts.sum()))

    def tensor_range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        ranges = {name: observer.tensor_range(x) for name, observer in self.children.items()}
        rows, errors = scale_rows(x, self.spec).float(), {}
        whole = weight_global_scale(*reduce_range(x, self.spec), self.spec) if self.spec.global_scale else None
        for name, (low, high) in ranges.items():
            if not all_finite(low, high):
                return low, high
            difference = fake_quantize_elements(rows, *self._parameters(low, high, whole), self.spec.dtype) - rows
            errors[name] = difference.square_().sum(-1).reshape(low.shape)
        return self._chosen(ranges, errors, x.numel())

    def bounds(self) -> tuple[Tensor, Tensor]:
        return self.judge.bounds()

    def report(self) -> dict[str, dict[str, float]]:
        """For each observer the mean squared error, and the share of scales for which it was taken."""
        if not self._report and not self.empty:
            self.range()
        return self._report

    @property
    def empty(self) -> bool:
        return self.judge.empty

    def state_dict(self) -> dict[str, Tensor]:
        """The state of each observer, under `NAME.`."""
        return {
            f"{name}.{key}": tensor
            for name, observer in self.all.items()
            for key, tensor in observer.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if foreign := [key for key in state if key.partition(".")[0] not in self.all]:
            raise CalibrationError(f"{self.spec}: state with {foreign}, expected that of {', '.join(self.all)}")
        for name, observer in self.all.items():
            prefix = f"{name}."
            observer.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})

    def _parameters(self, low: Tensor, high: Tensor, global_scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
        spec = self.spec.with_free_scales()
        scale, zero_point = range_to_qparams(low.reshape(-1, 1), high.reshape(-1, 1), spec, global_scale)
        return effective_scale(scale, global_scale), zero_in_steps(scale, zero_point, spec)

    def _chosen(
        self, ranges: Mapping[str, tuple[Tensor, Tensor]], errors: Mapping[str, Tensor], elements: int
    ) -> tuple[Tensor, Tensor]:
        stacked, choose = torch.stack(list(errors.values())), self.options.choose  # [observers, *scale]
        best = stacked.argmin(0)
        index = best if choose == BEST else torch.full_like(best, list(errors).index(choose))
        self._report = {
            name: {"mse": float(error.sum()) / elements, "chosen": float((index == i).float().mean())}
            for i, (name, error) in enumerate(errors.items())
        }
        low, high = (torch.stack([ends[side] for ends in ranges.values()]) for side in (0, 1))
        return low.gather(0, index[None])[0], high.gather(0, index[None])[0]
