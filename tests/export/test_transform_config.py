"""Rotations as compressed-tensors' own code makes them of what a checkpoint says."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.transform import TransformConfig, apply_transform_config
from torch import nn

from wrapq.export.transform_config import transform_config
from wrapq.runtime.rotation import OnlineRotation
from wrapq.wrappers.model import add_rotation


@pytest.mark.parametrize(("width", "sizes"), [(64, (64, 16)), (48, (48, 12))])
def test_rotated_inputs_are_ours(width: int, sizes: tuple[int, int]) -> None:
    torch.manual_seed(0)
    theirs = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(3)))
    rotations = [OnlineRotation.make(sizes[i // 2], "hadamard", seed=i // 2) for i in range(3)]
    ours = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(3)))
    ours.load_state_dict(theirs.state_dict())
    for layer, rotation in zip(ours, rotations, strict=True):
        add_rotation(layer, rotation)
    section, tensors = transform_config(ours, ["0", "1", "2"], torch.bfloat16)
    assert [group["apply"][0]["targets"] for group in section["config_groups"].values()] == [["0", "1"], ["2"]]
    x = torch.randn(5, width)
    plain = theirs(x)
    apply_transform_config(theirs, TransformConfig.model_validate(section))
    for name, matrix in tensors.items():
        theirs.get_parameter(name).data.copy_(matrix)
    torch.testing.assert_close(theirs(x), ours(x))
    assert not torch.allclose(ours(x), plain)
