"""Int8 codes found again as factor * levels + least, in the fewest bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gdnsq_fx.deploy.affine_codes import affine_codes
from gdnsq_fx.deploy.grids import int8_weight


@pytest.mark.parametrize("bits", range(1, 7))
@pytest.mark.parametrize("axis", [0, 1, None])
def test_what_int8_weights_are_made_of(bits: int, axis: int | None) -> None:
    """Each channel has steps, signs and offsets of its own, and the bits it had."""
    generator = torch.Generator().manual_seed(bits)
    levels = torch.randint(0, 2**bits, (16, 12, 30), generator=generator)
    levels[..., 0], levels[..., 1] = 0, 2**bits - 1
    shape = [1, 1, 1]
    if axis is not None:
        shape[axis] = levels.shape[axis]
    step = torch.randn(shape, generator=generator)
    offset = step * torch.randint(-(2**bits), 1, shape, generator=generator) / 2
    made = int8_weight(levels.to(torch.uint8), step, offset)
    assert made is not None and made.axis == axis
    found = affine_codes(made.codes, axis)
    assert torch.equal(found.codes(), made.codes)
    assert found.bits == bits and found.whole.numel() == 0
    assert int(found.levels.max()) == 2**bits - 1
    assert found.size <= levels.numel() * bits / 8 + 2 * max(shape) + 1


def test_a_channel_that_needs_more_bits_stays_whole() -> None:
    """One of 64, coarsened after the others: two bits for all, its codes beside."""
    codes = torch.randint(0, 4, (64, 100)) * 40 - 60
    codes[:, 0], codes[:, 1] = -60, 60
    codes[7] = torch.randint(-9, 9, (100,))
    codes[7, :2] = torch.tensor([-9, 8])
    found = affine_codes(codes.to(torch.int8), 0)
    assert found.bits == 2 and found.whole.tolist() == [7]
    assert torch.equal(found.codes(), codes.to(torch.int8))
    assert found.size == 64 * 100 // 4 + 2 * 64 + 100 + 8
    across = affine_codes(codes.t().contiguous().to(torch.int8), 1)
    assert across.bits == 5 and across.whole.numel() == 0
    assert torch.equal(across.codes(), codes.t().to(torch.int8))


@given(
    st.lists(st.lists(st.integers(-128, 127), min_size=3, max_size=3), min_size=1),
    st.sampled_from([0, 1, None]),
)
def test_any_codes_come_back(rows: list[list[int]], axis: int | None) -> None:
    codes = torch.tensor(rows, dtype=torch.int8)
    found = affine_codes(codes, axis)
    assert torch.equal(found.codes(), codes)
    assert 1 <= found.bits <= 8 and int(found.levels.max()) < 2**found.bits


def test_all_codes_and_constants() -> None:
    codes = torch.arange(-128, 128).to(torch.int8)[None].repeat(2, 1)
    assert affine_codes(codes, 0).bits == 8
    constant = affine_codes(torch.full((4, 5), -128, dtype=torch.int8), 0)
    assert constant.bits == 1 and int(constant.codes().max()) == -128
