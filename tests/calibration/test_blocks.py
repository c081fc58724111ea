"""Which modules are the repeated blocks."""

import pytest
from torch import nn

from tests.conftest import FAMILIES, build_model
from wrapq import PTQConfig, prepare
from wrapq.calibration.blocks import Blocks, find_blocks

PREFIXES = {"gpt2": "transformer.h", "opt": "model.decoder.layers", "bert": "bert.encoder.layer"}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layers_of_families(family: str):
    model = build_model(family)
    expected = Blocks(PREFIXES.get(family, "model.layers"), 2)
    assert find_blocks(model) == expected
    assert find_blocks(prepare(model)) == expected


def test_layers_that_are_wrapped_in_part_are_still_the_blocks():
    model = build_model("llama")
    prepared = prepare(model, PTQConfig(overrides={"model.layers.1": None}))
    assert type(prepared.model.layers[0]) is not type(prepared.model.layers[1])
    assert find_blocks(prepared) == Blocks("model.layers", 2)


def test_index_of_a_name():
    blocks = Blocks("model.layers", 12)
    names = ["model.layers.0", "model.layers.11.mlp", "model.layers", "model.layers.x", "xmodel.layers.1", "lm_head"]
    assert [blocks.index(name) for name in names] == [0, 11, None, None, None, None]
    assert blocks.names()[10] == "model.layers.10"
    assert Blocks().index("0.weight") is None and Blocks().names() == ()


def test_the_largest_list_of_equal_modules_wins():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small = nn.ModuleList(nn.Linear(2, 2) for _ in range(5))
            self.mixed = nn.ModuleList([nn.Linear(99, 99), nn.Conv1d(9, 9, 9)])
            self.layers = nn.ModuleList(self.layer() for _ in range(2))
            self.empty = nn.ModuleList()

        @staticmethod
        def layer() -> nn.Module:
            return nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(8, 8) for _ in range(4))})

    assert find_blocks(Model()) == Blocks("layers", 2)


def test_one_layer_of_experts_is_the_block_not_its_experts():
    layer = nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(8, 8) for _ in range(4))})
    assert find_blocks(nn.ModuleDict({"layers": nn.ModuleList([layer])})) == Blocks("layers", 1)


def test_none():
    assert find_blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) == Blocks()
    assert find_blocks(nn.Linear(2, 2)).count == 0
