"""What every observer promises. A test class for an observer derives from `ObserverContract` and says its spec part."""

import pytest
import torch
from torch import Tensor

from wrapq.errors import CalibrationError, SpecError
from wrapq.observers.base import OBSERVERS, Observer, make_observer, observe_tensor
from wrapq.quant.affine import scale_shape
from wrapq.quant.spec import QuantSpec

SPECS = [
    "int8:tensor",
    "int4:g8:signed",
    "uint8:tensor:asym",
    "int8:channel@-1",
    "uint4:channel@-1:asym",
    "int4:g8:sym",
    "int16:tensor",
]


def batches(count: int = 6, width: int = 24) -> list[Tensor]:
    """Batches of different lengths and scales, so that ranges widen late, with a zero channel and a skewed one."""
    generator = torch.Generator().manual_seed(3)
    scales = [0.01, 1.0, 0.3, 40.0, 2.0, 7.0]
    out = [torch.randn(2, 5 + i, width, generator=generator) * scales[i % len(scales)] for i in range(count)]
    for batch in out:
        batch[..., 3] = 0
        batch[..., 4] = batch[..., 4].abs() * 10
    return out


def same_state(a: Observer, b: Observer) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


class ObserverContract:
    """Derive, set `name`, and `exact_merge = False` when merging is right only to rounding errors."""

    name: str
    options = ""
    exact_merge = True
    ordered = False

    def make(self, text: str) -> Observer:
        return make_observer(QuantSpec.parse(f"{text}:{self.name}{self.options}"))

    def observed(self, text: str, data: list[Tensor]) -> Observer:
        observer = self.make(text)
        for batch in data:
            observer.update(batch)
        return observer

    def test_is_registered(self):
        assert self.name in OBSERVERS

    @pytest.mark.parametrize("text", SPECS)
    def test_range_is_ordered_finite_and_within_the_data(self, text: str):
        data = batches()
        low, high = self.observed(text, data).range()
        assert low.dtype == high.dtype == torch.float32
        assert bool((low <= high).all())
        rows = torch.cat([batch.flatten(0, 1) for batch in data])
        assert bool((low >= rows.min()).all()) and bool((high <= rows.max()).all())

    @pytest.mark.parametrize("text", SPECS)
    def test_parameters_fit_batches_of_any_length(self, text: str):
        qparams = self.observed(text, batches()).qparams("input")
        for shape in [(1, 1, 24), (2, 9, 24)]:
            assert qparams.fake_quantize(torch.randn(shape)).shape == shape

    @pytest.mark.parametrize("text", SPECS)
    def test_merging_two_halves_is_one_stream(self, text: str):
        data = batches()
        for cut in (1, 3, 5):
            merged, other = self.observed(text, data[:cut]), self.observed(text, data[cut:])
            merged.merge(other)
            whole = self.observed(text, data)
            if self.exact_merge:
                assert same_state(merged, whole)
            for got, expected in zip(merged.range(), whole.range(), strict=True):
                torch.testing.assert_close(got, expected, rtol=0 if self.exact_merge else 1e-5, atol=0)

    @pytest.mark.parametrize("text", SPECS)
    def test_the_order_of_the_data_does_not_matter(self, text: str):
        if self.ordered:
            pytest.skip("order is part of what this observer means")
        assert same_state(self.observed(text, batches()), self.observed(text, batches()[::-1]))

    @pytest.mark.parametrize("text", SPECS)
    def test_a_tensor_in_parts_is_the_same_where_it_says_so(self, text: str):
        parts = [part for batch in batches() for part in batch.split(2, 1)]
        if self.make(text).in_parts:
            assert same_state(self.observed(text, parts), self.observed(text, batches()))

    def test_merging_with_an_empty_observer_changes_nothing(self):
        whole, merged, filled = (self.observed("uint8:tensor:asym", data) for data in (batches(), batches(), []))
        merged.merge(self.make("uint8:tensor:asym"))
        filled.merge(whole)
        assert same_state(merged, whole) and same_state(filled, whole)
        filled.update(batches()[0] * 1e6)
        assert not same_state(filled, whole)

    @pytest.mark.parametrize("text", SPECS)
    def test_state_round_trip_continues_as_if_never_interrupted(self, text: str):
        data = batches()
        first, second = self.observed(text, data[:3]), self.make(text)
        kept = {name: tensor.clone() for name, tensor in first.state_dict().items()}
        second.load_state_dict(kept)
        assert not second.empty and same_state(first, second)
        for batch in data[3:]:
            second.update(batch)
        assert same_state(second, self.observed(text, data))
        assert same_state(first, self.observed(text, data[:3]))

    def test_state_of_an_empty_observer_and_of_another_kind(self):
        observer = self.observed("int8:tensor", batches())
        observer.load_state_dict(self.make("int8:tensor").state_dict())
        assert observer.empty
        with pytest.raises(CalibrationError, match="expected"):
            observer.load_state_dict({"foreign": torch.ones(1)})

    def test_an_empty_observer_names_the_point(self):
        observer = self.make("int8:tensor")
        observer.update(torch.zeros(0, 24))
        assert observer.empty
        with pytest.raises(CalibrationError, match=r"layers\.0\.q_proj input: saw no data"):
            observer.qparams("layers.0.q_proj input")

    @pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
    @pytest.mark.parametrize("text", ["int8:tensor", "uint8:channel@-1:asym", "int4:g8"])
    def test_nan_and_inf_name_the_point(self, bad: str, text: str):
        data = batches()
        data[2][1, 2, 5] = float(bad)
        kind = "NaN" if bad == "nan" else "inf|NaN"
        with pytest.raises(CalibrationError, match=rf"mlp\.up weight: the data holds ({kind})"):
            self.observed(text, data).qparams("mlp.up weight")
        if self.options == "" or "@" not in text:
            with pytest.raises(CalibrationError, match=rf"mlp\.up weight: the data holds ({kind})"):
                observe_tensor(data[2][1], self.make(text).spec, "mlp.up weight")

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    @pytest.mark.parametrize("text", SPECS)
    def test_other_float_types_count_as_the_same_numbers_in_float32(self, dtype: torch.dtype, text: str):
        data = [batch.half().to(torch.bfloat16).to(dtype) for batch in batches()]
        assert same_state(self.observed(text, data), self.observed(text, [batch.float() for batch in data]))

    @pytest.mark.parametrize("text", SPECS)
    def test_constant_and_zero_data(self, text: str):
        for value in (0.0, 2.5, -2.5, 1e-42):
            qparams = self.observed(text, [torch.full((3, 24), value)]).qparams("input")
            result = qparams.fake_quantize(torch.full((3, 24), value))
            assert bool(torch.isfinite(result).all())
            if value == 0:
                assert bool((qparams.scale == 1).all())

    @pytest.mark.parametrize(
        "text", ["int8:tensor", "int4:channel", "uint4:channel@1:asym", "int4:g8", "uint4:g8:asym"]
    )
    def test_a_tensor_at_hand_gets_parameters_of_the_promised_shape(self, text: str):
        spec, w = self.make(text).spec, torch.randn(6, 24)
        qparams = observe_tensor(w, spec, "weight")
        assert tuple(qparams.scale.shape) == scale_shape(w.shape, spec)
        assert qparams.fake_quantize(w).shape == w.shape
        assert qparams.digest() == observe_tensor(w.clone(), spec, "weight").digest()

    def test_an_empty_tensor_is_refused_by_name(self):
        with pytest.raises(CalibrationError, match="weight: an empty tensor"):
            observe_tensor(torch.zeros(0, 24), self.make("int8:tensor").spec, "weight")

    def test_a_changed_number_of_channels_is_refused(self):
        observer = self.observed("int8:channel@-1", batches())
        with pytest.raises(CalibrationError, match="16 ranges after data with 24"):
            observer.update(torch.randn(3, 16))

    def test_an_unknown_option_is_refused_with_the_nearest(self):
        with pytest.raises(SpecError, match="no option 'no_such'"):
            make_observer(QuantSpec.parse(f"int8:tensor:{self.name}(no_such=1)"))
