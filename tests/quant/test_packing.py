import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.quant.strategies import all_dtypes as dtypes
from wrapq.errors import SpecError
from wrapq.quant import affine
from wrapq.quant.affine import storage_dtype
from wrapq.quant.dtypes import DTYPES, DType
from wrapq.quant.packing import pack, packed_columns, unpack


def integers(dtype: DType, *shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(dtype.least_code, dtype.largest_code + 1, shape, generator=generator).to(storage_dtype(dtype))


@given(dtypes, st.integers(0, 5), st.integers(1, 131), st.integers(0, 2**31))
def test_unpacking_gives_back_what_was_packed(dtype: DType, rows: int, columns: int, seed: int):
    q = integers(dtype, rows, columns, seed=seed)
    packed = pack(q, dtype)
    assert packed.dtype == torch.int32 and packed.shape == (rows, packed_columns(columns, dtype))
    back = unpack(packed, dtype, columns)
    assert back.dtype == q.dtype and torch.equal(back, q)


@pytest.mark.parametrize("name", DTYPES)
def test_every_width_at_its_ends(name: str):
    dtype = DTYPES[name]
    low, high = dtype.least_code, dtype.largest_code
    q = torch.tensor([[low, high] * 33, [high] * 66, [low] * 66]).to(storage_dtype(dtype))
    assert torch.equal(unpack(pack(q, dtype), dtype, 66), q)
    assert not pack(q, dtype)[2].any()


@given(dtypes, st.integers(1, 70), st.integers(0, 2**31))
def test_the_words_are_a_little_endian_stream_of_bits(dtype: DType, columns: int, seed: int):
    q = integers(dtype, 1, columns, seed=seed)
    stream = sum((int(v) - dtype.least_code) << (k * dtype.bits) for k, v in enumerate(q[0]))
    words = [int(word) & 0xFFFFFFFF for word in pack(q, dtype)[0]]
    assert sum(word << (32 * k) for k, word in enumerate(words)) == stream


def test_leading_dimensions_are_kept():
    q = integers(DTYPES["int4"], 2, 3, 40)
    assert torch.equal(pack(q, DTYPES["int4"])[1], pack(q[1], DTYPES["int4"]))
    assert torch.equal(unpack(pack(q, DTYPES["int4"]), DTYPES["int4"], 40), q)


@pytest.mark.parametrize("name", ["int8", "uint3", "int4"])
def test_parts_of_rows_are_packed_as_the_whole(name: str, monkeypatch: pytest.MonkeyPatch):
    dtype = DTYPES[name]
    q = integers(dtype, 17, 40)
    packed = pack(q, dtype)
    monkeypatch.setattr(affine, "_PIECE", 100)
    assert torch.equal(pack(q, dtype), packed) and torch.equal(unpack(packed, dtype, 40), q)


def test_a_value_off_the_grid_is_refused():
    with pytest.raises(SpecError, match="int4 holds -8 to 7, not 0 to 8"):
        pack(torch.tensor([[0, 8]]), DTYPES["int4"])


def test_the_wrong_number_of_words_is_refused():
    with pytest.raises(SpecError, match="33 columns of int4 are 5 words, not 4"):
        unpack(torch.zeros(2, 4, dtype=torch.int32), DTYPES["int4"], 33)
