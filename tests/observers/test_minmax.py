import torch

from tests.contracts.observer import ObserverContract, batches
from wrapq.observers.base import make_observer
from wrapq.quant.spec import QuantSpec


class TestMinMax(ObserverContract):
    name = "minmax"


def test_the_range_is_that_of_all_the_data():
    data = batches()
    observer = make_observer(QuantSpec.parse("int8:channel@-1"))
    for batch in data:
        observer.update(batch)
    rows = torch.cat([batch.flatten(0, 1) for batch in data])
    low, high = observer.range()
    assert torch.equal(low.flatten(), rows.amin(0)) and torch.equal(high.flatten(), rows.amax(0))


def test_groups_of_a_stream_are_shared_by_all_positions():
    observer = make_observer(QuantSpec.parse("int4:g8"))
    x = torch.randn(2, 5, 24)
    observer.update(x)
    assert torch.equal(observer.range()[1], x.unflatten(-1, (3, 8)).amax((0, 1, 3)))
