"""Rotations at each forward, for tensors whose makers cannot take them into their weights.

R3 and R4 of Liu et al., "SpinQuant: LLM Quantization with Learned Rotations", arXiv:2405.16406, section 3.2: what the
tensor is multiplied with afterwards takes the inverse, so that the function stays.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from wrapq.errors import ModelError
from wrapq.quant.hadamard import Kind, factors, rotation

ONLINE = "online_rotation"
"""The name under which a module holds the rotation of what comes to it."""


class OnlineRotation(nn.Module):
    """`x Q` for x [..., K], each block of `A B` channels by the same orthogonal Q.

    A Hadamard matrix is kept as `diag(signs) (left kron right) / sqrt(A B)` in bytes, which are exact in every dtype,
    and takes 2 (A + B) FLOPs an element; a random one is `right` [K, K] itself, in float32.

    Attributes:
        signs: int8 [A B], 1 or -1.
        left: int8 [A, A].
        right: int8 or float32 [B, B].
    """

    signs: Tensor
    left: Tensor
    right: Tensor

    def __init__(self, signs: Tensor | None = None, left: Tensor | None = None, right: Tensor | None = None) -> None:
        super().__init__()
        for name, tensor in (("signs", signs), ("left", left), ("right", right)):
            self.register_buffer(name, tensor)

    @classmethod
    def make(cls, width: int, kind: Kind, seed: int) -> OnlineRotation:
        """The rotation of blocks of `width` channels, the same for the same seed."""
        found = factors(width) if kind == "hadamard" else None
        if found is None:
            return cls.dense(rotation(width, "orthogonal", seed))
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(2, (width,), generator=generator, dtype=torch.int8) * 2 - 1
        return cls(signs, *(factor.to(torch.int8) for factor in found))

    @classmethod
    def dense(cls, matrix: Tensor) -> OnlineRotation:
        """The rotation of blocks by an orthogonal `matrix` [K, K], kept in float32."""
        ones = torch.ones(len(matrix), dtype=torch.int8)
        return cls(ones, ones[:1, None].clone(), matrix.float())

    def sharing(self) -> OnlineRotation:
        """Another one with the very same tensors."""
        return OnlineRotation(self.signs, self.left, self.right)

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., K] rotated; raises `ModelError` where K is no multiple of the block."""
        sizes, size = (len(self.left), len(self.right)), len(self.signs)
        if x.shape[-1] % size:
            raise ModelError(f"{x.shape[-1]} channels are no multiple of the {size} that are turned at a time")
        left, right = self.left.to(x.dtype), self.right.to(x.dtype)
        if not self.right.is_floating_point():
            right = right * size**-0.5
        blocks = x.unflatten(-1, (-1, size)) * self.signs
        rotated = blocks.unflatten(-1, sizes) @ right
        return (rotated if sizes[0] == 1 else left.t() @ rotated).flatten(-2).flatten(-2)

    def extra_repr(self) -> str:
        return f"{len(self.left)} x {len(self.right)} channels"


def rotate_inputs(module: nn.Module) -> Any:
    """Let `module`, which holds a rotation, rotate the first argument of its forward; returns the handle that ends it.

    It is a hook, so that whatever stands in for the module later, while it is calibrated and once it is converted,
    gets its input rotated, kernels included.
    """
    return module.register_forward_pre_hook(_rotated)


_TURNED: Any = WeakTensorKeyDictionary()
"""For inputs that are still in use: their version, the matrices that turned them, and what came of it."""


def _rotated(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with the first one rotated: once for all modules that read one tensor and share their matrices, so
    that these read one tensor again."""
    rotation, x = module._modules[ONLINE], args[0]
    # a result with a gradient keeps its input, inference tensors do not count their changes, and tracing must not see
    # state that outlives it
    if x.requires_grad or x.is_inference() or torch.compiler.is_compiling():
        return (rotation(x), *args[1:])
    key = (x._version, *(tensor.data_ptr() for tensor in (rotation.signs, rotation.left, rotation.right)))
    held, rotated = _TURNED.get(x, (None, None))
    if held != key:
        rotated = rotation(x)
        _TURNED[x] = key, rotated
    return (rotated, *args[1:])
