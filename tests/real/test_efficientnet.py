"""EfficientNet-Lite0, whose convolutions are depthwise and behind a ReLU6: how many photographs keep their class."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import wrapq
from wrapq.errors import PlanError
from wrapq.runtime.module import QuantizedModule

pytestmark = [pytest.mark.real, pytest.mark.timeout(1200)]
PHOTOS = {
    "skimage": [
        *("data/astronaut.png", "data/chelsea.png", "data/coffee.png", "data/rocket.jpg", "data/hubble_deep_field.jpg"),
        *("data/color.png", "data/ihc.png", "data/retina.jpg", "data/motorcycle_left.png", "data/motorcycle_right.png"),
    ],
    "sklearn": ["datasets/images/china.jpg", "datasets/images/flower.jpg"],
}
"""What these packages bring."""
CONVOLUTIONS = "rules.linear.match.type=[Linear,Conv2d]"
PER_CHANNEL = "rules.linear.weight=int8:channel:sym"
SENSITIVE = "+rules.sensitive={match: {name: [_conv_stem, '*_depthwise_conv']}, weight: int8:channel:sym}"
"""Their weights have 9 to 27 columns, of which one with a large weight takes the whole range."""
_CALIBRATED, _COMPARED, _SIZE = 24, 120, 224


class Classifier(NamedTuple):
    """A float network, crops of photographs to calibrate on and to compare [B, 3, H, W], and its logits of these."""

    model: nn.Module
    calibration: Sequence[Tensor]
    compared: Sequence[Tensor]
    logits: Tensor

    def quantized(self, recipe: str, *overrides: str) -> nn.Module:
        """A copy of the network, quantized."""
        return wrapq.quantize(copy.deepcopy(self.model), recipe, self.calibration, overrides)

    def kept(self, model: nn.Module) -> float:
        """The share of crops for which `model` says what the float network says."""
        with torch.no_grad():
            found = torch.cat([model(batch) for batch in self.compared])
        return float((found.argmax(-1) == self.logits.argmax(-1)).float().mean())


def crops(count: int) -> Tensor:
    """Random parts of the photographs [count, 3, 224, 224], as the network takes them."""
    image = importlib.import_module("PIL.Image")
    photos, random, made = list[Any](), np.random.default_rng(0), list[Tensor]()
    for package, names in PHOTOS.items():
        folder = Path(pytest.importorskip(package).__file__).parent
        photos += [image.open(folder / name).convert("RGB") for name in names]
    for number in range(count):
        photo = photos[number % len(photos)]
        side = int(min(photo.size) * random.uniform(0.45, 1))
        left, top = (int(random.integers(0, length - side + 1)) for length in photo.size)
        crop = photo.crop((left, top, left + side, top + side)).resize((_SIZE, _SIZE), image.Resampling.BICUBIC)
        made.append((torch.tensor(np.array(crop)).permute(2, 0, 1).float() - 127) / 128)
    return torch.stack(made)


@pytest.fixture(scope="module")
def classifier(real_model: Callable[[str], Path]) -> Classifier:
    package = pytest.importorskip("efficientnet_lite_pytorch", reason="the package that defines the module")
    model = package.EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(real_model("efficientnet-lite0") / "weights.pth", weights_only=True))
    calibration, compared = crops(_CALIBRATED + _COMPARED).split((_CALIBRATED, _COMPARED))
    with torch.no_grad():
        logits = torch.cat([model.eval()(batch) for batch in compared.split(16)])
    return Classifier(model, calibration.split(16), compared.split(16), logits)


@pytest.mark.parametrize(
    ("recipe", "overrides", "floor"),
    [
        ("w8a16", [PER_CHANNEL, "algorithm@stack.round=gptq"], 0.93),
        ("w4a16_gptq", ["rules.linear.weight=int4:channel:sym", SENSITIVE], 0.72),
        ("w8a8_smoothquant", [], 0.92),
    ],
    ids=["8-bit weights", "4-bit weights", "8-bit weights and inputs"],
)
def test_what_recipes_keep_of_its_classes(
    recipe: str, overrides: list[str], floor: float, classifier: Classifier
) -> None:
    """Of 120; .950, .783 and .942 were measured."""
    model = classifier.quantized(recipe, CONVOLUTIONS, *overrides)
    layers = [name for name, m in classifier.model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(layers) == 50 and all(isinstance(model.get_submodule(name), QuantizedModule) for name in layers)
    assert classifier.kept(model) > floor


def test_its_classifier_alone(classifier: Classifier, caplog: pytest.LogCaptureFixture) -> None:
    """What shipped recipes match; what they leave is told."""
    model = classifier.quantized("w8a16")
    assert [name for name, m in model.named_modules() if isinstance(m, QuantizedModule)] == ["_fc"]
    assert "Conv2dStaticSamePadding _conv_stem and 48 more with 3,328,992 parameters stay float" in caplog.text
    assert classifier.kept(model) > 0.98


def test_groups_that_do_not_fit_its_kernels_are_refused(classifier: Classifier) -> None:
    with pytest.raises(PlanError, match=r"_conv_stem\.weight: .* group size 128 does not divide the width 27"):
        classifier.quantized("w8a16", CONVOLUTIONS)
