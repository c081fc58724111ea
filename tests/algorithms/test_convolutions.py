"""GPTQ on convolutions: the patches of an image are the rows that the kernel, as a matrix, multiplies."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

import wrapq
from tests.algorithms.test_gptq import literal_gptq
from wrapq import PTQConfig
from wrapq.observers.base import observe_tensor
from wrapq.quant.spec import QuantSpec

CONFIG = PTQConfig(weight="int4:channel:sym", activation=None)


class PadsItself(nn.Conv2d):
    """A convolution whose forward pads by what no attribute says, as in networks that come from TensorFlow."""

    def forward(self, x: Tensor) -> Tensor:
        return conv2d(pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride, (0, 1), self.dilation, self.groups)


CONVOLUTIONS = {
    "1d": (nn.Conv1d(3, 8, 5, padding=2, stride=2), (4, 3, 40)),
    "2d": (nn.Conv2d(3, 8, 3), (4, 3, 12, 10)),
    "2d-uneven": (nn.Conv2d(2, 8, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(2, 1)), (4, 2, 14, 11)),
    "2d-same": (nn.Conv2d(3, 8, (2, 3), padding="same", padding_mode="reflect"), (4, 3, 9, 9)),
    "2d-unbatched": (nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"), (3, 20, 21)),
    "2d-pads-itself": (PadsItself(3, 8, 3, stride=2), (4, 3, 12, 10)),
    "3d": (nn.Conv3d(2, 8, (2, 3, 3), stride=(1, 2, 2)), (2, 2, 5, 11, 11)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_kernel_as_a_matrix_times_the_patches_is_the_convolution(name: str):
    conv, shape = CONVOLUTIONS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    wrapped = wrapq.prepare(copy.deepcopy(conv), CONFIG)
    with torch.no_grad():
        rows = wrapped.input_matrix(x) @ conv.weight.flatten(1).t() + conv.bias  # [M, N]
        expected = conv(x)
    channels_last = (expected if x.dim() == conv.weight.dim() else expected[None]).movedim(1, -1)
    torch.testing.assert_close(rows, channels_last.reshape(-1, 8), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("schedule", ["sequential", "parallel"])
def test_gptq_rounds_a_net_of_convolutions_as_the_paper_says(schedule: str):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, stride=2, dilation=2),
        nn.Flatten(),
        nn.Linear(96, 5),
    )
    batches = [torch.randn(4, 3, 12, 12) for _ in range(6)]
    model = wrapq.prepare(copy.deepcopy(net), CONFIG)
    report = wrapq.calibrate(model, batches, {"round": {"algorithm": "gptq", "ranges": "observer"}}, schedule)
    x = torch.cat(batches)
    for index, layer in enumerate(net):
        if hasattr(layer, "weight"):
            weight, spec = layer.weight.detach().flatten(1), QuantSpec.parse(CONFIG.weight)
            rows = model[index].input_matrix(x).double()
            qparams = observe_tensor(weight, spec, "w")
            expected = literal_gptq(weight, (rows.t() @ rows).float(), qparams, 0.01, True)
            got = model[index].weight.detach().flatten(1)
            assert torch.isclose(got.double(), expected, rtol=1e-4, atol=1e-6).all(1).float().mean() > 0.7
            assert report.reports[f"{index}.weight"]["rows"] == len(rows)
        with torch.no_grad():
            x = layer(x) if schedule == "parallel" else model[index](x)


class Branches(nn.Module):
    """Convolutions of one input, as those of SqueezeNet and Inception."""

    def __init__(self, *convolutions: nn.Module) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(convolutions)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [conv(x) for conv in self.convolutions]


def test_convolutions_of_one_input_share_statistics_only_where_they_meet_the_same_patches():
    made = [nn.Conv2d(4, 8, 1), nn.Conv2d(4, 8, 3), nn.Conv2d(4, 6, 3), nn.Conv2d(4, 8, 3, stride=2)]
    x = torch.randn(2, 4, 9, 9)
    together = wrapq.calibrate(wrapq.prepare(Branches(*copy.deepcopy(made)), CONFIG), [x], {"round": "gptq"})
    for index, conv in enumerate(made):
        alone = wrapq.calibrate(wrapq.prepare(Branches(copy.deepcopy(conv)), CONFIG), [x], {"round": "gptq"})
        assert together.reports[f"convolutions.{index}.weight"] == alone.reports["convolutions.0.weight"]
