"""Rotations: orthogonal, of the widths that the theory promises, the same for the same seed."""

from __future__ import annotations

import pytest
import torch

from wrapq.quant.hadamard import around_ones, hadamard, rotation

WITHOUT = {92, 116, 156, 172, 184, 188, 232, 236, 260, 268, 292, 324, 356, 372, 376}
"""The multiples of four up to 400 that neither Sylvester nor Paley reaches."""


def test_all_widths_that_sylvester_and_paley_reach_have_one() -> None:
    missing = set()
    for width in (1, 2, *range(4, 401, 4)):
        matrix = hadamard(width)
        if matrix is None:
            missing.add(width)
            continue
        assert bool((matrix.abs() == 1).all())
        assert torch.equal(matrix @ matrix.t(), width * torch.eye(width, dtype=torch.double))
    assert missing == WITHOUT


@pytest.mark.parametrize("width", [0, 3, 6, 30, 92])
def test_other_widths_have_none(width: int) -> None:
    assert hadamard(width) is None


@pytest.mark.parametrize("width", [1, 2, 12, 30, 64, 92, 172])
@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
def test_rotations_are_orthogonal_and_follow_their_seed(width: int, kind: str) -> None:
    matrix = rotation(width, kind, 3)  # type: ignore[arg-type]
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(width, dtype=torch.double), rtol=0, atol=1e-12)
    assert torch.equal(matrix, rotation(width, kind, 3))  # type: ignore[arg-type]
    assert width < 12 or not torch.equal(matrix, rotation(width, kind, 4))  # type: ignore[arg-type]


@pytest.mark.parametrize("width", [2, 13, 64, 65])
def test_around_ones_keeps_the_ones(width: int) -> None:
    matrix = around_ones(width, "hadamard", 0)
    ones = torch.ones(width, dtype=torch.double)
    torch.testing.assert_close(ones @ matrix, ones, rtol=0, atol=1e-12)
    torch.testing.assert_close(matrix @ ones, ones, rtol=0, atol=1e-12)
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(width, dtype=torch.double), rtol=0, atol=1e-12)
    assert width < 13 or bool((matrix.abs() < 0.99).all())
