"""Exports of modules that are no language models: what they take and give, what is refused, what an error says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import wrapq
from tests.export.modules import by_onnxruntime, encoder, images, network, outputs, quantized_encoder
from wrapq.engine.export_comparison import compared, last_digits_changed
from wrapq.errors import CalibrationError, LifecycleError, ModelError, OutputError, PlanError, ProblemsError


@pytest.mark.parametrize("name", [pytest.param("torch_export", marks=pytest.mark.slow), "onnx"])
def test_weights_in_groups_and_a_float_module_are_exact(name: str, tmp_path: Path) -> None:
    model, example, _ = quantized_encoder("w4a16_rtn", "rules.linear.weight.group_size=32")
    assert wrapq.export_module(model, name, tmp_path / "made", example).error < 1e-5
    plain = wrapq.export_module(encoder(), name, tmp_path / "float", example)
    assert plain.error < 1e-5 and plain.figures["cosine"] == pytest.approx(1, abs=1e-5)


class Many(nn.Module):
    """Outputs of several shapes and types, more than ten of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 2 + i % 3) for i in range(12))

    def forward(self, x: Tensor, again: Tensor) -> list[Tensor]:
        made = [layer(x + again) for layer in self.layers]
        return [*made, made[0][:, 0], made[1].argmax(-1), made[2].sum()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["torch_export", "onnx"])
def test_many_outputs_in_their_order_of_one_tensor_given_twice(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Many().to(dtype).train(), torch.randn(4, 8, dtype=dtype)
    found = wrapq.export_module(model, name, tmp_path / "made", (x, x))
    assert found.figures["cosine"] > 0.999 and model.training and model.layers[0].training


def test_a_module_that_is_only_prepared_or_gives_no_tensor_is_told_so(tmp_path: Path) -> None:
    prepared = wrapq.prepare(network(), wrapq.PTQConfig("int8:channel", "int8:tensor:asym"))
    with pytest.raises(LifecycleError, match="prepared and not converted"):
        wrapq.export_module(prepared, "onnx", tmp_path / "made", images(2))

    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> None:
            return None

    with pytest.raises(CalibrationError, match="Nothing returns no tensor"):
        wrapq.export_module(Nothing(), "onnx", tmp_path / "made", images(2))
    assert not list(tmp_path.iterdir())


class Counted(nn.Module):
    """A layer under the name that it is given, and a number beside its result."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, nn.Linear(4, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.get_submodule(self.name)(x), torch.tensor(3.0)


def test_an_output_that_no_input_changes(tmp_path: Path) -> None:
    wrapq.export_module(Counted("layer").eval(), "onnx", tmp_path / "made", torch.randn(4, 4))
    assert by_onnxruntime(tmp_path / "made", [torch.randn(3, 4)])[1] == 3


def test_what_torch_onnx_met_is_told_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"take this model: a module in it is called 'class', a word that Python"
    ) as told:
        wrapq.export_module(Counted("class").eval(), "onnx", tmp_path / "made", torch.randn(4, 4))
    assert "\x1b" not in str(told.value)

    class Eigenvalues(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.eigvals(x).abs()

    with pytest.raises(ModelError, match=r"take this model: \w+: No ONNX function found for <.*linalg_eig") as told:
        wrapq.export_module(Eigenvalues(), "onnx", tmp_path / "made", torch.randn(4, 4))
    assert "\x1b" not in str(told.value)


def test_what_a_format_cannot_say_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model, example, _ = quantized_encoder("w8a8_static", "rules.linear.weight=nf4:g32")
    with pytest.raises(PlanError, match="operators for integers and fp8, not for nf4"):
        wrapq.export_module(model, "onnx", tmp_path / "made", example)
    with pytest.raises(ProblemsError, match="onnx"):
        wrapq.export_module(model, "onxx", tmp_path / "made", example)
    with pytest.raises(ProblemsError, match="strict"):
        wrapq.export_module(model, "torch_export", tmp_path / "made", example, stricct=True)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="name a new or an empty folder"):
        wrapq.export_module(network(), "torch_export", tmp_path, images(4))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_another_result_is_no_rounding() -> None:
    model, example, _ = quantized_encoder()
    right = outputs(model, example)
    again = last_digits_changed(model)(lambda: outputs(model, example))
    assert compared("onnx", right, right, 1e-3, again) == (0, "")
    wrong = [each.flip(0) for each in right]
    with pytest.raises(ModelError, match="computes something else"):
        compared("onnx", wrong, right, 1e-3, again)
    with pytest.raises(ModelError, match="gives"):
        compared("onnx", [each[:2] for each in right], right, 1e-3, again)


def test_how_far_last_digits_move_a_model_is_measured() -> None:
    """Many layers on coarse grids: two that compute the same in another order are off by steps."""
    torch.manual_seed(0)
    layers = [layer for _ in range(12) for layer in (nn.Linear(256, 256), nn.ReLU())]
    model = wrapq.quantize(nn.Sequential(*layers).eval(), "w8a8_static", [torch.randn(256, 256)])
    x = torch.randn(256, 256)
    with torch.no_grad():
        right, (elsewhere,) = model(x), outputs(model.double(), x.double())
    model.float()
    off = float((elsewhere.float() - right).norm() / right.norm())
    assert off > 1e-5  # a handful of numbers between two steps
    again = last_digits_changed(model)(lambda: outputs(model, x))
    error, note = compared("onnx", [elsewhere.float()], [right], 1e-6, again)
    assert error == pytest.approx(off) and "fall to the other side of a step" in note
