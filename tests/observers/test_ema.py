import torch

from tests.contracts.observer import ObserverContract
from wrapq.observers.base import make_observer
from wrapq.quant.spec import QuantSpec


class TestEma(ObserverContract):
    name = "ema"
    exact_merge = False
    ordered = True


class TestEmaFast(TestEma):
    options = "(momentum=0.0)"


def test_the_first_update_sets_and_later_ones_move():
    observer = make_observer(QuantSpec.parse("uint8:tensor:asym:ema(momentum=0.75)"))
    for high in (4.0, 8.0, 0.0):
        observer.update(torch.tensor([-1.0, high]))
    assert observer.range()[1].item() == 0.75 * (0.75 * 4 + 0.25 * 8)
    assert observer.range()[0].item() == -1
