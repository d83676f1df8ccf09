"""Formulas of one channel on cases counted by hand."""

from __future__ import annotations

import math

import pytest
import torch

from gdnsq_fx.analysis import capacity
from gdnsq_fx.analysis.capacity import (
    MAX_SQNR_DB,
    PAIRED_CODES,
    PAIRED_LEVELS,
    capacity_bits,
    code_counts,
    entropy_bits,
    grouped_entropy_bits,
    sqnr_db,
    sum_of_squares,
)


def test_capacity_of_one_alphabet() -> None:
    assert capacity_bits(torch.tensor(10), torch.tensor(4)) == 20.0
    assert capacity_bits(torch.tensor(10), torch.tensor(1)) == 0.0
    assert capacity_bits(torch.tensor(7), torch.tensor(3)) == pytest.approx(
        7 * math.log2(3)
    )


def test_capacity_adds_up_over_channels() -> None:
    levels = torch.tensor([[2.0], [4.0], [1.0]])
    assert capacity_bits(torch.tensor(5.0), levels) == 5 * (1 + 2 + 0)
    elements = torch.tensor([[1.0], [2.0], [3.0]])
    assert capacity_bits(elements, levels) == 1 + 4 + 0


def test_entropy_of_even_codes_is_the_capacity() -> None:
    assert entropy_bits(torch.tensor([5, 5, 5, 5])) == 20 * 2.0


def test_entropy_of_one_code_is_zero() -> None:
    assert entropy_bits(torch.tensor([0, 9, 0])) == 0.0
    assert entropy_bits(torch.zeros(4, dtype=torch.long)) == 0.0


def test_entropy_by_hand() -> None:
    # 8 elements: 4 of one code, 2 of another, 1 and 1: 4*1 + 2*2 + 3 + 3 bits.
    assert entropy_bits(torch.tensor([4, 2, 1, 1])) == 14.0


def test_entropy_adds_up_over_rows() -> None:
    counts = torch.tensor([[4, 4, 0], [4, 2, 2]])
    assert entropy_bits(counts) == 8.0 + (4 * 1 + 2 * 2 + 2 * 2)


def test_each_channel_has_its_own_alphabet() -> None:
    """Code 0 of one channel and code 0 of another are different symbols."""
    codes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    assert grouped_entropy_bits(codes, 2) == 4.0
    assert grouped_entropy_bits(codes, 1) == pytest.approx(
        entropy_bits(torch.tensor([6, 2]))
    )


@pytest.mark.parametrize("count", [0, 7, 2 * PAIRED_CODES, 2 * PAIRED_CODES + 1])
@pytest.mark.parametrize(
    "levels", [2, PAIRED_LEVELS - 1, PAIRED_LEVELS, PAIRED_LEVELS + 1, 1 << 16]
)
def test_codes_are_counted_one_by_one_or_in_pairs(count: int, levels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(levels, (count, 1), generator=generator)
    codes[:1] = levels - 1
    wanted = torch.bincount(codes.reshape(-1), minlength=levels)
    assert torch.equal(code_counts(codes.float(), levels), wanted)


def test_grouped_entropy_is_that_of_the_histograms() -> None:
    codes = torch.randint(0, 5, (6, 40), generator=torch.Generator().manual_seed(0))
    counts = torch.stack([torch.bincount(row, minlength=5) for row in codes])
    wanted = entropy_bits(counts)
    assert grouped_entropy_bits(codes.float(), 6) == pytest.approx(wanted)


def test_sparse_alphabets_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(0, 999, (6, 40), generator=torch.Generator().manual_seed(0))
    wanted = grouped_entropy_bits(codes.float(), 6)
    monkeypatch.setattr(capacity, "MAX_BINS", 10)
    assert grouped_entropy_bits(codes.float(), 6) == pytest.approx(wanted)


@pytest.mark.parametrize("shape", [(), (5,), (3, 4096), (7, 3001), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_sum_of_squares_of_any_shape(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    value = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = sum_of_squares(value)
    assert found.dtype == torch.float64
    assert float(found) == pytest.approx(float(value.double().square().sum()), rel=1e-6)


def test_sqnr_in_decibels() -> None:
    assert sqnr_db(100.0, 1.0) == pytest.approx(20.0)
    assert sqnr_db(1.0, 10.0) == pytest.approx(-10.0)


@pytest.mark.parametrize(("signal", "noise"), [(1.0, 0.0), (0.0, 0.0), (1.0, 1e-300)])
def test_sqnr_of_an_exact_edge_is_bounded(signal: float, noise: float) -> None:
    assert sqnr_db(signal, noise) == MAX_SQNR_DB


def test_sqnr_without_a_signal_is_a_number() -> None:
    assert math.isfinite(sqnr_db(0.0, 1.0))
