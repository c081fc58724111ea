"""What every wrapper promises. A test class for a wrapper derives from `WrapperContract` and makes one such module."""

import copy

import pytest
import torch
from torch import Tensor, nn

from wrapq import PTQConfig, convert, prepare, restore
from wrapq.errors import LifecycleError
from wrapq.runtime.module import QuantizedModule
from wrapq.wrappers.base import QuantModuleBase, Wrapper
from wrapq.wrappers.model import iter_quantizers
from wrapq.wrappers.quantizer import State
from wrapq.wrappers.wrapper_registry import WRAPPERS

CONFIGS = {
    "static": ("int8:channel:sym", "uint8:tensor:asym"),
    "dynamic": ("int8:channel:sym", "int8:token:dyn"),
    "odd widths": ("uint5:tensor:asym", "int11:tensor:sym"),
}


class WrapperContract:
    """Derive, set `wrapper` and the points expected, and make one module and its inputs.

    Attributes:
        wrapper: the class that must stand in for the module.
        points: the names of all its points.
        tolerance: of the outputs with everything at 16 bit, relative to their size.
    """

    wrapper: type[Wrapper]
    points: tuple[str, ...]
    tolerance = 2e-3

    @classmethod
    def config(cls, weight: str = "int8:channel:sym", activations: str = "uint8:tensor:asym") -> PTQConfig:
        """Every point of the module; a spec for weights is an error where there are none."""
        return PTQConfig(weight if "weight" in cls.points else None, activations=activations)

    def module(self) -> nn.Module:
        raise NotImplementedError

    def inputs(self, tokens: int = 7, batch: int = 2) -> tuple[Tensor, ...]:
        return (torch.randn(batch, tokens, 16, generator=torch.Generator().manual_seed(tokens)),)

    def calibrated(self, *specs: str, dtype: torch.dtype = torch.float32) -> nn.Module:
        prepared = prepare(self.module().to(dtype).eval(), self.config(*specs))
        for tokens in (7, 3, 1):
            prepared(*self.cast(self.inputs(tokens), dtype))
        return prepared

    @staticmethod
    def cast(inputs: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
        return tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)

    def test_is_found_and_has_its_points(self):
        module = self.module()
        assert WRAPPERS.find(module) is self.wrapper
        prepared = prepare(module, self.config())
        assert isinstance(prepared, QuantModuleBase | type(module))
        assert tuple(prepared.quantizers) == self.points

    def test_observing_changes_no_bit(self):
        module, inputs = self.module().eval(), self.inputs()
        expected = module(*inputs)
        assert torch.equal(prepare(module, self.config())(*inputs), expected)

    def test_disabled_points_change_no_bit(self):
        expected = self.module().eval()(*self.inputs())
        prepared = self.calibrated(*CONFIGS["static"])
        for quantizer in iter_quantizers(prepared):
            if quantizer.where.endswith("weight"):
                continue
            quantizer.freeze()
            quantizer.enabled = False
        assert torch.equal(prepared(*self.inputs()), expected)

    @pytest.mark.parametrize("name", CONFIGS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_converted_has_the_bits_of_the_fake_quantized(self, name: str, dtype: torch.dtype):
        prepared = self.calibrated(*CONFIGS[name], dtype=dtype)
        fake = copy.deepcopy(prepared)
        converted = convert(prepared)
        assert isinstance(converted, QuantizedModule)
        round_weights(fake)
        for tokens in (7, 1):
            inputs = self.cast(self.inputs(tokens), dtype)
            expected, got = fake(*inputs), converted(*inputs)
            assert got.dtype == expected.dtype == dtype
            assert torch.equal(got, expected)
            assert bool(torch.isfinite(got).all())

    def test_quantizes_at_all_and_little_at_16_bit(self):
        inputs, expected = self.inputs(), self.module().eval()(*self.inputs())
        coarse = convert(self.calibrated("int3:tensor:sym", "int3:tensor:asym"))
        assert not torch.equal(coarse(*inputs), expected)
        fine = convert(self.calibrated("int16:channel:sym", "int16:tensor:asym"))
        assert float((fine(*inputs) - expected).norm() / expected.norm()) < self.tolerance

    def test_undo_gives_the_very_module_back(self):
        module, inputs = self.module().eval(), self.inputs()
        before, expected = dict(module.named_modules()), module(*inputs)
        state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        prepared = prepare(module, self.config())
        prepared(*inputs)
        restored = restore(prepared)
        assert restored is module
        assert all(found is before[name] for name, found in restored.named_modules())
        assert torch.equal(restored(*inputs), expected)
        assert all(torch.equal(tensor, state[name]) for name, tensor in restored.state_dict().items())

    def test_convert_without_data_names_the_points(self):
        prepared = prepare(self.module(), self.config())
        with pytest.raises(LifecycleError, match="saw no data"):
            convert(prepared)
        assert all(quantizer.state is State.OBSERVING for quantizer in iter_quantizers(prepared))

    @pytest.mark.parametrize("name", CONFIGS)
    def test_a_state_dict_loads_into_a_fresh_one(self, name: str):
        trained = self.calibrated(*CONFIGS[name])
        round_weights(trained)
        fresh = prepare(self.module().eval(), self.config(*CONFIGS[name]))
        fresh.load_state_dict(trained.state_dict())
        assert torch.equal(fresh(*self.inputs()), trained(*self.inputs()))


def round_weights(model: nn.Module) -> None:
    """Fix every point of a calibrated model, as `convert` would, without converting it."""
    from wrapq.algorithms.ranges import Ranges
    from wrapq.algorithms.rtn import RTN
    from wrapq.calibration.assignments import Assignments
    from wrapq.calibration.walker import Walker

    names = [quantizer.where for quantizer in iter_quantizers(model)]
    Walker(model, Assignments(dict.fromkeys(names, RTN()), dict.fromkeys(names, Ranges()))).run([], "parallel")
