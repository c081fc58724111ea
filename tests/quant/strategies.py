"""Random specs and tensors for the property tests."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from wrapq.quant.dtypes import DTYPES, SCALE_BITS, DType
from wrapq.quant.spec import QuantSpec

INTEGERS = [dtype for dtype in DTYPES.values() if dtype.kind == "int"]
all_dtypes = st.sampled_from(list(DTYPES.values()))
dtypes = st.sampled_from(INTEGERS)
options = st.dictionaries(
    st.sampled_from(["percentile", "momentum", "norm", "grid", "name_of"]),
    st.one_of(
        st.integers(-1000, 1000),
        st.floats(allow_nan=False),
        st.booleans(),
        st.sampled_from(["fast", "slow_one", "a-b"]),
    ),
    max_size=3,
)


@st.composite
def specs(draw: st.DrawFn) -> QuantSpec:
    granularity = draw(st.sampled_from(["tensor", "channel", "group", "token", "block", "head"]))
    dynamic = granularity == "token" or draw(st.booleans())
    dtype = draw(all_dtypes)
    symmetric = dtype.kind != "int" or draw(st.booleans())
    size = draw(st.one_of(st.integers(1, 4096), st.sampled_from([8, 16, 32, 256])))
    above = granularity == "group" and not dynamic and 256 % size == 0 and dtype.kind == "int"
    above = above and dtype.signed == symmetric
    kinds = [name for name in SCALE_BITS if (symmetric or name != "e8m0") and (above or "int" not in name)]
    scale_dtype = draw(st.sampled_from(kinds))
    free = not symmetric and not dynamic and scale_dtype in ("float32", "bfloat16", "float16")
    forced = "min" if "int" in scale_dtype and not symmetric else "int"
    global_scale = granularity == "group" and symmetric and scale_dtype == "fp8_e4m3" and draw(st.booleans())
    signed = symmetric and not dynamic and dtype.kind == "int" and dtype.signed
    return QuantSpec(
        dtype=dtype,
        signed_scale=signed and scale_dtype in ("float32", "bfloat16", "float16", "int8") and draw(st.booleans()),
        block_size=draw(st.tuples(st.integers(1, 512), st.integers(1, 512))) if granularity == "block" else None,
        scale_dtype=scale_dtype,
        zero_point=draw(st.sampled_from(["int", "float", "min"][: 2 if dtype.signed else 3])) if free else forced,
        global_scale=global_scale,
        local=global_scale and not dynamic and draw(st.booleans()),
        granularity=granularity,
        axis=draw(st.integers(-4, 4)) if granularity == "channel" else None,
        group_size=size if granularity == "group" else None,
        symmetric=symmetric,
        dynamic=dynamic,
        observer="minmax" if dynamic else draw(st.sampled_from(["minmax", "ema", "percentile", "mse"])),
        observer_options=() if dynamic else tuple(sorted(draw(options).items())),
    )


@st.composite
def weight_specs(draw: st.DrawFn, group_sizes: tuple[int, ...] = (1, 4, 8, 24)) -> QuantSpec:
    """Specs for a matrix whose width every one of `group_sizes` divides."""
    granularity = draw(st.sampled_from(["tensor", "channel", "group", "token"]))
    return QuantSpec(
        dtype=draw(dtypes),
        granularity=granularity,
        axis=draw(st.sampled_from([0, 1, -1, -2])) if granularity == "channel" else None,
        group_size=draw(st.sampled_from(group_sizes)) if granularity == "group" else None,
        symmetric=draw(st.booleans()),
        dynamic=granularity == "token",
    )


@st.composite
def matrices(draw: st.DrawFn, rows: int = 6, columns: int = 24, dtype: torch.dtype = torch.float32) -> Tensor:
    """Matrices of every scale, with outliers, zero rows and constant columns now and then."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(rows, columns, generator=generator) * 10.0 ** draw(st.integers(-6, 4))
    x = x + draw(st.sampled_from([0.0, 0.0, 1.0, -3.0]))
    if draw(st.booleans()):
        x[draw(st.integers(0, rows - 1))] = 0
    if draw(st.booleans()):
        x[:, draw(st.integers(0, columns - 1))] *= 50
    return x.to(dtype)


def grid_of(dtype: DType) -> Tensor:
    return torch.arange(dtype.qmin, dtype.qmax + 1)
