"""Bit packing: a stated bit order, no gaps, and an exact way back."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gdnsq_fx.deploy.packing import checked_numel, pack_bits, unpack_bits
from gdnsq_fx.errors import ConfigError, FileFormatError

_SHAPES = st.lists(st.integers(0, 5), max_size=4)
_BITS = st.integers(1, 16)


def _reference(codes: torch.Tensor, bits: int) -> bytes:
    """The same stream as one big integer, as the module docstring words it."""
    numbers = (int(code) for code in codes.flatten())
    stream = sum(code << (index * bits) for index, code in enumerate(numbers))
    return stream.to_bytes(math.ceil(codes.numel() * bits / 8), "little")


@given(_BITS, _SHAPES, st.integers(0, 2**32 - 1))
def test_round_trip_and_bit_order(bits: int, shape: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, shape, generator=generator)

    packed = pack_bits(codes, bits)
    unpacked = unpack_bits(packed, bits, shape)

    assert packed.dtype == torch.uint8
    assert packed.numpy().tobytes() == _reference(codes, bits)
    assert unpacked.dtype == (torch.uint8 if bits <= 8 else torch.int32)
    assert torch.equal(unpacked.long(), codes)


def test_docstring_example() -> None:
    packed = pack_bits(torch.tensor([5, 1, 2]), 3)
    assert packed.numpy().tobytes() == bytes([0b10001101, 0])


@pytest.mark.parametrize("bits", [1, 3, 8, 11, 16])
def test_round_trip_over_chunk_boundaries(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 16_389), dtype=torch.int32)
    unpacked = unpack_bits(pack_bits(codes, bits), bits, codes.shape)
    assert torch.equal(unpacked.int(), codes)


@pytest.mark.parametrize(
    "dtype",
    [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.uint32, torch.uint64],
)
def test_every_integer_dtype(dtype: torch.dtype) -> None:
    codes = torch.tensor([1, 0, 3, 2]).to(dtype)
    unpacked = unpack_bits(pack_bits(codes, 2), 2, [4])
    assert torch.equal(unpacked.to(dtype), codes)


def test_non_contiguous_scalar_and_empty() -> None:
    codes = torch.arange(12).reshape(3, 4).t()
    assert torch.equal(unpack_bits(pack_bits(codes, 4), 4, (4, 3)).long(), codes)
    assert unpack_bits(pack_bits(torch.tensor(6), 3), 3, ()).item() == 6
    assert unpack_bits(pack_bits(torch.zeros(0, 3).int(), 3), 3, (0, 3)).shape == (0, 3)


@pytest.mark.parametrize("bits", [0, -1, 17])
def test_bits_out_of_range(bits: int) -> None:
    with pytest.raises(ConfigError, match="1 to 16"):
        pack_bits(torch.tensor([0]), bits)
    with pytest.raises(ConfigError, match="1 to 16"):
        unpack_bits(torch.zeros(1, dtype=torch.uint8), bits, [1])


@pytest.mark.parametrize("value", [-1, 4, 2**40])
def test_code_out_of_range(value: int) -> None:
    with pytest.raises(ConfigError, match=r"2 bits hold 0\.\.3"):
        pack_bits(torch.tensor([0, value]), 2)


def test_uint64_codes_beyond_int64_are_out_of_range() -> None:
    with pytest.raises(ConfigError, match="bits hold"):
        pack_bits(torch.tensor([2**64 - 1], dtype=torch.uint64), 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64])
def test_codes_must_be_integers(dtype: torch.dtype) -> None:
    with pytest.raises(ConfigError, match="convert them to an integer dtype"):
        pack_bits(torch.ones(3, dtype=dtype), 2)


@pytest.mark.parametrize(
    "packed",
    [
        torch.zeros(2, dtype=torch.uint8),
        torch.zeros(4, dtype=torch.uint8),
        torch.zeros(3, dtype=torch.int8),
        torch.zeros(1, 3, dtype=torch.uint8),
    ],
)
def test_packed_data_of_another_size(packed: torch.Tensor) -> None:
    with pytest.raises(FileFormatError, match=r"shape \[8\] at 3 bits takes .* \[3\]"):
        unpack_bits(packed, 3, [8])


@pytest.mark.parametrize(
    "shape", [[-1], [-2, -4], [2**40, 2**40], [0, 2**62, 2**62], [1] * 65]
)
def test_absurd_shapes(shape: list[int]) -> None:
    with pytest.raises(ConfigError):
        checked_numel(shape)
    with pytest.raises(ConfigError):
        unpack_bits(torch.zeros(1, dtype=torch.uint8), 8, shape)


def test_a_huge_shape_allocates_nothing() -> None:
    with pytest.raises(FileFormatError):
        unpack_bits(torch.zeros(1, dtype=torch.uint8), 1, [2**60])
