"""Products of matrices in 16 bits on an x86 CPU, as fast as it can: for a run to decide, not for a library call.

With matrix units (AMX) bfloat16 is the faster one, and with AMD's AVX-512 BF16: measured, float32 takes 2.4 times as
long. On others it is slower than float32, which takes three fifths of the time with Intel's AVX-512 BF16, a fifth
without. Both sum in float32 and round the sum once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

_LEAST_ROWS = 128  # with fewer, to widen the weight takes longer than the product
_AT_ONCE = 1 << 23  # elements of a weight that are widened at a time
_ROWS_OF = {linear: 0, torch.matmul: 0, Tensor.matmul: 0, Tensor.__matmul__: 0, torch.mm: 0, torch.addmm: 1}
"""Which argument has the rows."""

_fast = False


@contextmanager
def fast_half_products() -> Iterator[None]:
    """While this holds, matrix units make what products they can, and `in_products` does what it says."""
    global _fast
    before, _fast = _fast, True
    try:
        yield
    finally:
        _fast = before


def use_matrix_units() -> bool:
    """Whether products may be left to matrix units, where torch has to be told for all of the process."""
    return _fast


def in_products() -> AbstractContextManager[object]:
    """While this holds, a CPU without matrix units makes products in 16 bits in float32, if `fast_half_products` holds.
    Each call of torch takes a microsecond longer; a forward must not be suspended meanwhile."""
    if not _fast or torch.compiler.is_compiling():  # a graph is for other machines
        return nullcontext()
    return _Widened() if _widens(torch.bfloat16) or _widens(torch.float16) else nullcontext()


@cache
def _widens(dtype: torch.dtype) -> bool:
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    units = {torch.bfloat16: "amx_bf16", torch.float16: "amx_fp16"}.get(dtype)
    if not units or capabilities.get("architecture") != "x86_64" or capabilities.get(units):
        return False
    is_amd = str(capabilities.get("cpu_name")).startswith("AMD")
    return not (is_amd and dtype == torch.bfloat16 and capabilities.get("avx512_bf16"))


class _Widened(TorchFunctionMode):
    """Makes products of many rows in float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        place = _ROWS_OF.get(func)
        if place is None or types or kwargs or len(args) < place + 2 or not _is_slow(args[place]):
            return func(*args, **kwargs)
        if args[place + 1].numel() <= _AT_ONCE:
            return func(*(_wide(x) for x in args)).to(args[place].dtype)
        return func(*args) if func is not linear or torch.is_grad_enabled() else _in_parts(*args)


def _is_slow(rows: Tensor) -> bool:
    return rows.device.type == "cpu" and _widens(rows.dtype) and rows.numel() >= _LEAST_ROWS * rows.shape[-1]


def _wide(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.is_floating_point() else x


def _in_parts(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` by a large weight, such as a head's, of which a part of the rows at a time is widened."""
    wide, made = x.float(), x.new_empty(*x.shape[:-1], len(weight))
    size = max(1, _AT_ONCE // weight.shape[1])
    for start in range(0, len(weight), size):
        part = slice(start, start + size)
        made[..., part] = linear(wide, weight[part].float(), None if bias is None else bias[part].float())
    return made
