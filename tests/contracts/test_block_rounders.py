"""What every registered rounder of whole blocks promises, those of other packages among them."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from tests.contracts.algorithm import DEVICES, variants
from wrapq import PTQConfig, prepare
from wrapq.algorithms.base import BLOCK, BlockProblem, BlockRounder, Rounded
from wrapq.algorithms.rtn import RTN
from wrapq.calibration.block_reconstruction import BlockInput, BlockReconstruction
from wrapq.quant.spec import QuantSpec
from wrapq.wrappers.model import iter_wrapped

EVERY = variants(BlockRounder)
SPECS = [
    "int3:channel:sym",
    "uint3:channel:asym",
    "int4:g8:sym",
    "uint2:g8:asym",
    "int2:g8:sym:signed",
    "int8:tensor:sym",
]
SPECS += ["int4:b4x8", "fp8_e4m3:channel", "nf4:g16", "mxfp4", "nvfp4", "uint4:g8:asym:zero=float"]

pytestmark = pytest.mark.parametrize("name", EVERY)


class Block(nn.Module):
    """A residual pair of linears, as a feed-forward block is."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.silu(self.up(x)))


def problem(
    spec: str = SPECS[0], batches: int = 3, only: str = "", seed: int = 3, device: torch.device = DEVICES[0]
) -> BlockProblem:
    """The block's weights whose names hold `only`, its inputs [B, T, K] and what the float block makes of them."""
    torch.manual_seed(8)
    block = Block().requires_grad_(False).to(device)
    inputs = [torch.randn(2, 12, 16, device=device) * torch.linspace(0.2, 3, 16, device=device) for _ in range(batches)]
    targets = [block(x) for x in inputs]
    prepared = prepare(block, PTQConfig(weight=spec, activation=None))
    modules = {f"{n}.weight": m for n, m in iter_wrapped(prepared) if only in n}
    return BlockReconstruction(prepared, modules, [BlockInput((x,), {}) for x in inputs], targets, seed)


def dequantized(rounded: Mapping[str, Rounded]) -> dict[str, Tensor]:
    return {where: r.qparams.dequantize(r.integers, torch.float32) for where, r in rounded.items()}


def hasty(name: str) -> BlockRounder:
    """The rounder with few steps, where it has steps, for tests that do not ask how well it learns."""
    rounder = EVERY[name]
    if "iterations" not in type(rounder).Options.model_fields:
        return rounder
    return type(rounder)(rounder.options.model_copy(update={"iterations": 20}))


def nearest(given: BlockProblem) -> dict[str, Tensor]:
    return dequantized({where: RTN().round(w.matrix, w.spec, where) for where, w in given.weights.items()})


def loss(given: BlockProblem, weights: Mapping[str, Tensor]) -> float:
    return sum(float(given.loss(i, weights)) for i in range(given.batches))


def same(first: Mapping[str, Rounded], second: Mapping[str, Rounded]) -> bool:
    pairs = [(first[where], second[where]) for where in first]
    return all(torch.equal(a.integers, b.integers) and a.qparams.digest() == b.qparams.digest() for a, b in pairs)


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_rounds_every_weight_on_each_grid_that_it_does_not_refuse(name: str, spec: str, device: torch.device) -> None:
    rounder, parsed = hasty(name), QuantSpec.parse(spec)
    assert (rounder.phase, rounder.handles) == ("round", "weight") and BLOCK in rounder.needs
    reason = rounder.unsupported(parsed)
    if reason is not None:
        assert reason
        return
    given = problem(spec, device=device)
    rounded = rounder.round_block(given)
    assert set(rounded) == set(given.weights)
    for where, (matrix, _) in given.weights.items():
        codes, qparams, report = rounded[where]
        assert qparams.spec == parsed and codes.shape == matrix.shape and codes.device.type == device.type
        assert not codes.is_floating_point() or parsed.dtype.kind != "int"
        if parsed.dtype.kind == "int":
            assert parsed.dtype.qmin <= int(codes.min()) and int(codes.max()) <= parsed.dtype.qmax
        assert all(isinstance(value, float) for value in report.values())
        assert bool(torch.isfinite(qparams.dequantize(codes, torch.float32)).all())


@pytest.mark.parametrize("only", ["", "up", "down"])
@pytest.mark.parametrize("spec", ["int3:channel:sym", "uint2:g8:asym"])
def test_the_block_is_off_less_than_with_the_nearest(name: str, spec: str, only: str) -> None:
    given = problem(spec, only=only)
    assert loss(given, dequantized(EVERY[name].round_block(given))) < loss(given, nearest(given))


def test_one_batch_is_enough(name: str) -> None:
    given = problem(batches=1)
    assert loss(given, dequantized(EVERY[name].round_block(given))) <= loss(given, nearest(given))


def test_the_same_is_the_same_to_the_bit_whatever_the_random_state(name: str, threads: None) -> None:
    torch.manual_seed(1)
    rounder = hasty(name)
    first = rounder.round_block(problem())
    given = problem()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert same(first, rounder.round_block(given))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("grad", [True, False])
def test_changes_nothing_that_it_is_given(name: str, grad: bool) -> None:
    given = problem()
    parameters = list(given._layer.parameters())
    held = [*parameters, *given._targets, *(w.matrix for w in given.weights.values())]
    before = [tensor.clone() for tensor in held]
    with torch.set_grad_enabled(grad):
        rounded = hasty(name).round_block(given)
        assert torch.is_grad_enabled() is grad
    assert all(torch.equal(tensor, kept) for tensor, kept in zip(held, before, strict=True))
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in parameters)
    assert not any(r.integers.requires_grad or r.qparams.scale.requires_grad for r in rounded.values())
