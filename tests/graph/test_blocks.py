"""Which modules are the repeated blocks."""

import pytest
from torch import nn

from tests.conftest import FAMILIES, build_model
from wrapq import PTQConfig, prepare
from wrapq.graph.blocks import Blocks, find_blocks, replaced_forward

PREFIXES = {"gpt2": "transformer.h", "opt": "model.decoder.layers", "bert": "bert.encoder.layer"}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layers_of_families(family: str):
    model = build_model(family)
    expected = Blocks(PREFIXES.get(family, "model.layers"), 2)
    assert find_blocks(model) == expected
    assert find_blocks(prepare(model)) == expected


def test_layers_that_are_wrapped_in_part_are_still_the_blocks():
    model = build_model("llama")
    prepared = prepare(model, PTQConfig(activations="int8:tensor:asym", overrides={"model.layers.1": None}))
    assert type(prepared.model.layers[0]) is not type(prepared.model.layers[1])
    assert find_blocks(prepared) == Blocks("model.layers", 2)


def test_experts_are_no_blocks():
    hybrid = {"layers": nn.ModuleList([nn.Linear(4, 4), nn.LayerNorm(4)]), "experts": nn.ModuleList([nn.Linear(4, 4)])}
    assert find_blocks(nn.ModuleDict(hybrid)) == Blocks()


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


def test_positions_of_names_in_and_around_the_blocks():
    names = ["embed", "layers.0.mlp", "layers.1", "norm", "layers.1.mlp", "head"]
    assert dict(Blocks("layers", 2).positions(names)) == {
        "embed": -1,
        "layers.0.mlp": 0,
        "layers.1": 1,
        "norm": 2,
        "layers.1.mlp": 1,
        "head": 2,
    }
    assert set(dict(Blocks().positions(names)).values()) == {-1}


def test_a_replaced_forward_is_put_back_hooks_run_and_an_own_one_survives():
    plain, patched, seen = nn.Identity(), nn.Identity(), []
    own = patched.forward = lambda x: x + 1
    plain.register_forward_hook(lambda *_: seen.append(1))
    with pytest.raises(ZeroDivisionError), replaced_forward({plain: lambda x: x * 2, patched: lambda x: x * 3}):
        assert (plain(5), patched(5), seen) == (10, 15, [1])
        raise ZeroDivisionError
    assert (plain(5), patched(5)) == (5, 6)
    assert "forward" not in plain.__dict__ and patched.__dict__["forward"] is own
