"""The two operations of the integer graph, and their agreement with training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gdnsq_fx.channels import ChannelLayout
from gdnsq_fx.deploy.integer import dequantize, quantize
from gdnsq_fx.quantize.activation_quantizer import ActivationQuantizer
from gdnsq_fx.quantize.frozen import FrozenActivation, FrozenWeight
from gdnsq_fx.quantize.weight_quantizer import WeightQuantizer
from gdnsq_fx.spec import QuantSpec


def _scalar(value: float) -> Tensor:
    return torch.tensor(value)


def test_codes_and_levels_by_hand() -> None:
    """Step 0.5, lowest level -1, four levels: -1, -0.5, 0, 0.5."""
    x = torch.tensor([-9.0, -1.0, -0.76, -0.75, -0.74, -0.25, 0.0, 0.24, 0.5, 9.0])
    codes = quantize(x, _scalar(0.5), _scalar(-1.0), 3)
    # Halves go to the even code: -0.75 lies between 0 and 1, -0.25 between 1 and 2.
    assert codes.tolist() == [0, 0, 0, 0, 1, 2, 2, 2, 3, 3]
    values = dequantize(codes, _scalar(0.5), _scalar(-1.0), torch.float32)
    assert values.tolist() == [-1.0, -1.0, -1.0, -1.0, -0.5, 0.0, 0.0, 0.0, 0.5, 0.5]


@pytest.mark.parametrize(
    ("max_code", "dtype"),
    [(0, torch.uint8), (255, torch.uint8), (256, torch.int32), (65535, torch.int32)],
)
def test_types_of_codes(max_code: int, dtype: torch.dtype) -> None:
    codes = quantize(torch.tensor([1e9, -1e9]), _scalar(1.0), _scalar(0.0), max_code)
    assert codes.dtype == dtype and codes.tolist() == [max_code, 0]


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
def test_codes_are_computed_in_single_precision_at_least(dtype: torch.dtype) -> None:
    x = torch.arange(1000).to(dtype)
    codes = quantize(x, _scalar(1.0), _scalar(0.0), 65535)
    assert torch.equal(codes.double(), x.double())
    values = dequantize(codes, _scalar(1.0), _scalar(0.0), dtype)
    assert values.dtype == dtype and torch.equal(values, x)


def test_steps_and_offsets_broadcast_over_channels() -> None:
    x = torch.tensor([[0.0, 1.0, 2.0], [0.0, 10.0, 20.0]])
    step, offset = torch.tensor([[1.0], [10.0]]), torch.tensor([[0.0], [0.0]])
    codes = quantize(x, step, offset, 3)
    assert codes.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert torch.equal(dequantize(codes, step, offset, torch.float32), x)


def test_the_input_is_left_as_it_was() -> None:
    x = torch.randn(8)
    before = x.clone()
    codes = quantize(x, _scalar(0.1), _scalar(-1.0), 15)
    kept = codes.clone()
    dequantize(codes, _scalar(0.1), _scalar(-1.0), torch.float32)
    assert torch.equal(x, before) and torch.equal(codes, kept)


def test_empty_tensors() -> None:
    codes = quantize(torch.empty(0, 3), _scalar(1.0), _scalar(0.0), 3)
    assert codes.shape == (0, 3)
    assert dequantize(codes, _scalar(1.0), _scalar(0.0), torch.float32).shape == (0, 3)


_offsets = st.sampled_from(["free", "half_step", "integer"])
_dtypes = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])
_seeds = st.integers(0, 2**31)


@given(
    bits=st.integers(1, 16),
    offset=_offsets,
    dtype=_dtypes,
    seed=_seeds,
    shift=st.floats(-0.9, 0.9),
    nonnegative=st.booleans(),
)
def test_an_activation_is_exactly_what_was_trained(
    bits: int, offset: Any, dtype: Any, seed: int, shift: float, nonnegative: bool
) -> None:
    torch.manual_seed(seed)
    x = (3.0 * torch.randn(64)).to(dtype)
    learned = ActivationQuantizer(
        "x", QuantSpec(bits, "lsq", offset), nonnegative=nonnegative
    )
    learned.cover(-2.0, 3.0, bits)
    learned.log2_range.data += shift  # between whole numbers of levels
    frozen = FrozenActivation(learned)
    wanted = learned(x)
    codes = quantize(x, frozen.step, frozen.offset, frozen.max_code)
    assert int(codes.min()) >= 0 and int(codes.max()) <= frozen.max_code
    assert torch.equal(codes.double(), learned.codes(x).double())
    assert torch.equal(dequantize(codes, frozen.step, frozen.offset, dtype), wanted)


@given(
    bits=st.integers(1, 16),
    offset=_offsets,
    dtype=_dtypes,
    seed=_seeds,
    layout=st.sampled_from(
        [ChannelLayout(None), ChannelLayout(0), ChannelLayout(1), ChannelLayout(1, 2)]
    ),
)
def test_a_weight_is_exactly_what_was_trained(
    bits: int, offset: Any, dtype: Any, seed: int, layout: ChannelLayout
) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(4, 3, 2).to(dtype)
    learned = WeightQuantizer("w", QuantSpec(bits, "lsq", offset), layout, weight)
    learned.open_to(weight, bits)
    learned.log2_step.data += 0.3 * torch.rand_like(learned.log2_step)
    frozen = FrozenWeight(learned, weight)
    assert int(frozen.codes.max()) < 2**bits
    got = dequantize(frozen.codes, frozen.step, frozen.offset, dtype)
    assert torch.equal(got, learned(weight))
