"""Frozen quantizers compute bit for bit what the learned ones do."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from gdnsq_fx.channels import PER_TENSOR, ChannelLayout
from gdnsq_fx.quantize.activation_quantizer import ActivationQuantizer
from gdnsq_fx.quantize.frozen import FrozenActivation, FrozenWeight, code_dtype
from gdnsq_fx.quantize.weight_quantizer import WeightQuantizer
from gdnsq_fx.spec import Offset, QuantSpec

OFFSETS: tuple[Offset, ...] = get_args(Offset)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = (
    ChannelLayout(axis=0),
    PER_TENSOR,
    ChannelLayout(axis=1),
    ChannelLayout(axis=1, groups=2),
)


def _activation(bits: int, offset: Offset) -> ActivationQuantizer:
    spec = QuantSpec(bits, offset=offset)
    quantizer = ActivationQuantizer("fc.input", spec, nonnegative=False)
    quantizer.cover(-0.7313, 1.3171, bits)
    with torch.no_grad():  # as training leaves them: nothing whole
        quantizer.log2_range.sub_(0.0371)
    return quantizer


def _weight(
    weight: Tensor, bits: int, offset: Offset, layout: ChannelLayout
) -> WeightQuantizer:
    spec = QuantSpec(bits, offset=offset)
    quantizer = WeightQuantizer("fc.weight", spec, layout, weight)
    quantizer.open_to(weight, bits)
    with torch.no_grad():
        quantizer.log2_step.add_(0.0371)
    return quantizer


def _kernel(dtype: torch.dtype) -> Tensor:
    return torch.randn(8, 6, 3, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("bits", [1, 4, 9])
def test_activation_is_bit_exact(bits: int, offset: Offset, dtype: torch.dtype) -> None:
    learned = _activation(bits, offset)
    frozen = FrozenActivation(learned)
    x = torch.randn(2000, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = frozen(x)
    assert y.dtype == dtype
    assert torch.equal(y, learned(x))
    assert y.unique().numel() <= frozen.max_code + 1 <= 2**bits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("bits", [1, 4, 9])
def test_weight_is_bit_exact(
    bits: int, offset: Offset, layout: ChannelLayout, dtype: torch.dtype
) -> None:
    weight = _kernel(dtype)
    learned = _weight(weight, bits, offset, layout)
    frozen = FrozenWeight(learned, weight)
    y = frozen(weight)
    assert y.dtype == dtype
    assert torch.equal(y, learned(weight))


@pytest.mark.parametrize(
    ("bits", "dtype"), [(1, torch.uint8), (8, torch.uint8), (9, torch.int32)]
)
def test_codes_take_the_smallest_type(bits: int, dtype: torch.dtype) -> None:
    weight = _kernel(torch.float32)
    frozen = FrozenWeight(_weight(weight, bits, "free", PER_TENSOR), weight)
    assert frozen.codes.dtype == dtype
    assert frozen.codes.shape == weight.shape
    assert frozen.codes.min() == 0
    assert int(frozen.codes.max()) == frozen.max_code < 2**bits


def test_code_dtype_bounds() -> None:
    assert [code_dtype(c) for c in (0, 255)] == [torch.uint8] * 2
    assert [code_dtype(c) for c in (256, 65535)] == [torch.int32] * 2


def test_frozen_ones_learn_nothing_and_keep_their_state() -> None:
    weight = _kernel(torch.float32)
    learned = _weight(weight, 3, "half_step", LAYOUTS[0])
    activation, kernel = _activation(3, "free"), learned
    frozen = FrozenActivation(activation), FrozenWeight(kernel, weight)
    assert [list(f.parameters()) for f in frozen] == [[], []]
    assert set(frozen[0].state_dict()) == {"step", "offset"}
    assert set(frozen[1].state_dict()) == {"codes", "step", "offset"}


def test_frozen_ones_are_copies() -> None:
    weight = _kernel(torch.float32)
    activation = _activation(3, "free")
    learned = _weight(weight, 3, "half_step", LAYOUTS[0])
    frozen = FrozenActivation(activation), FrozenWeight(learned, weight)
    x = torch.linspace(-1, 1, 50)
    before = frozen[0](x), frozen[1](weight)
    with torch.no_grad():
        for parameter in (*activation.parameters(), *learned.parameters(), weight):
            parameter.add_(1.0)
    assert torch.equal(frozen[0](x), before[0])
    assert torch.equal(frozen[1](weight), before[1])


def test_constant_weight_has_one_level() -> None:
    weight = torch.full((2, 3), 0.7)
    learned = WeightQuantizer("w", QuantSpec(2), ChannelLayout(axis=0), weight)
    learned.open_to(weight, 2)
    frozen = FrozenWeight(learned, weight)
    assert frozen.max_code == 0
    assert torch.allclose(frozen(weight), weight)


def test_printing_names_edge_and_levels() -> None:
    weight = _kernel(torch.float32)
    frozen = FrozenWeight(_weight(weight, 2, "free", PER_TENSOR), weight)
    assert "fc.weight, (8, 6, 3), levels=4" in repr(frozen)
    assert "fc.input, levels=4" in repr(FrozenActivation(_activation(2, "free")))
