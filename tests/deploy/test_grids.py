"""Learned grids in eight bits: exact where they can be, near elsewhere, and honest."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gdnsq_fx.channels import ChannelLayout
from gdnsq_fx.deploy.grids import Int8Weight, int8_weight, uint8_grid
from gdnsq_fx.quantize.activation_quantizer import ActivationQuantizer
from gdnsq_fx.quantize.frozen import FrozenWeight
from gdnsq_fx.quantize.weight_quantizer import WeightQuantizer
from gdnsq_fx.spec import QuantSpec


def _made(codes: Tensor, step: Tensor, offset: Tensor) -> tuple[Int8Weight, Tensor]:
    found = int8_weight(codes, step, offset)
    assert found is not None
    assert found.codes.dtype == torch.int8 and found.codes.shape == codes.shape
    return found, found.scales().double() * found.codes.double()


@settings(deadline=None)  # time is that of whatever else runs
@given(
    bits=st.integers(1, 6),
    half=st.booleans(),
    axis=st.sampled_from([0, 1]),
    seed=st.integers(0, 2**31),
)
def test_weights_on_half_steps_are_exact(
    bits: int, half: bool, axis: int, seed: int
) -> None:
    torch.manual_seed(seed)
    codes = torch.randint(0, 2**bits, (4, 3, 2), dtype=torch.uint8)
    shape = [1, 1, 1]
    shape[axis] = codes.shape[axis]
    step = torch.rand(shape) + 0.1
    step = step * torch.where(torch.rand(shape) < 0.3, -1.0, 1.0)
    unit = 2 if half else 1
    whole = torch.randint(-(2**bits - 1) * unit, 1, shape)
    offset = step * whole / unit
    made, values = _made(codes, step, offset)
    assert made.axis == axis and made.moved < 1e-5
    wanted = step.double() * codes + offset.double()
    # The given offset is a float32 of up to 70: it is itself off its grid by 4e-6.
    torch.testing.assert_close(values, wanted, rtol=1e-6, atol=1e-5)


@settings(deadline=None)  # time is that of whatever else runs
@given(bits=st.integers(1, 8), seed=st.integers(0, 2**31))
def test_any_offset_moves_no_further_than_it_says(bits: int, seed: int) -> None:
    torch.manual_seed(seed)
    codes = torch.randint(0, 2**bits, (5, 40), dtype=torch.uint8)
    step = torch.rand(5, 1) + 0.1
    offset = -step * (2**bits - 1) * torch.rand(5, 1)
    made, values = _made(codes, step, offset)
    moved = (values - (step.double() * codes + offset.double())).abs() / step
    assert float(moved.max()) <= made.moved + 1e-5
    # Codes span at most 2^bits steps, and int8 has 254 of its own.
    assert made.moved <= max(2**bits / 254, 1.0 / 127)


def test_eight_bits_that_start_at_half_a_step_move_and_say_so() -> None:
    codes = torch.arange(256, dtype=torch.uint8).reshape(1, -1)
    made, _ = _made(codes, torch.ones(1, 1), torch.full((1, 1), -127.5))
    assert 0.25 < made.moved <= 0.51
    exact, _ = _made(codes, torch.ones(1, 1), torch.full((1, 1), -128.0))
    assert exact.moved == 0.0


def test_a_step_of_zero_is_a_channel_of_zeros() -> None:
    codes = torch.ones(2, 3, dtype=torch.uint8)
    step, offset = torch.tensor([[0.0], [0.5]]), torch.tensor([[0.0], [-0.5]])
    made, values = _made(codes, step, offset)
    assert torch.equal(values, torch.zeros(2, 3).double())
    assert bool((made.scale > 0).all())


def test_one_step_for_the_tensor() -> None:
    codes = torch.tensor([[0, 1], [1, 0]], dtype=torch.uint8)
    made, values = _made(codes, torch.full((1, 1), 0.5), torch.full((1, 1), -0.25))
    assert made.axis is None and made.scale.shape == (1,)
    wanted = torch.tensor([[-0.25, 0.25], [0.25, -0.25]]).double()
    torch.testing.assert_close(values, wanted, rtol=1e-6, atol=0)


def test_what_is_no_int8_weight() -> None:
    codes = torch.ones(2, 3, dtype=torch.uint8)
    assert int8_weight(codes, torch.ones(2, 3), torch.ones(2, 3)) is None
    assert int8_weight(codes.int() * 256, torch.ones(1), torch.ones(1)) is None


@pytest.mark.parametrize(
    ("offset", "max_code", "factor", "least", "zero_point"),
    [
        (0.0, 255, 1, 0, 0),
        (-2.0, 15, 1, 0, 4),  # four steps of 0.5 below 0
        (-0.25, 1, 2, 0, 1),  # {-s/2, s/2}
        (-1.75, 7, 2, 0, 7),
        (0.5, 3, 1, 1, 0),  # all levels above 0
        (-127.5 / 2, 255, 1, 0, 128),  # no room for half steps
    ],
)
def test_activation_grids(
    offset: float, max_code: int, factor: int, least: int, zero_point: int
) -> None:
    found = uint8_grid(0.5, offset, max_code)
    assert found is not None
    assert (found.factor, found.least, found.zero_point) == (factor, least, zero_point)
    assert found.lowest == pytest.approx(offset, abs=0.25 + 1e-9)
    assert found.moved == pytest.approx(abs(found.lowest - offset) / 0.5, abs=1e-9)


@settings(deadline=None)  # time is that of whatever else runs
@given(step=st.floats(1e-3, 10), offset=st.floats(-2, 0), max_code=st.integers(1, 100))
def test_free_offsets_move_by_at_most_a_fraction(
    step: float, offset: float, max_code: int
) -> None:
    found = uint8_grid(step, offset * step * max_code, max_code)
    if found is None:  # 0 lies further off than 255 codes
        assert offset < -1.0
        return
    assert found.moved <= 0.5 / found.factor + 1e-9


def test_activations_without_a_grid() -> None:
    assert uint8_grid(1.0, 0.0, 256) is None
    assert uint8_grid(1.0, -1000.0, 3) is None


@settings(deadline=None)  # time is that of whatever else runs
@given(
    bits=st.integers(1, 8),
    seed=st.integers(0, 2**31),
    log2_scale=st.floats(-20, 20),
    drift=st.floats(0, 3),
    flipped=st.booleans(),
)
def test_learned_weights_do_not_move(
    bits: int, seed: int, log2_scale: float, drift: float, flipped: bool
) -> None:
    """Wherever training takes weights and steps, lopsided channels included."""
    torch.manual_seed(seed)
    skew = torch.rand(4, 1)
    draws = torch.randn(4, 30)
    weight = torch.where(draws > 0, draws * skew, draws) * 2.0**log2_scale
    spec = QuantSpec(bits, "lsq", "half_step")
    quantizer = WeightQuantizer("w", spec, ChannelLayout(axis=0), weight)
    quantizer.open_to(weight, bits)
    with torch.no_grad():
        quantizer.log2_step.sub_(torch.rand(4, 1) * drift)
        weight += torch.randn_like(weight) * weight.std() * 0.1
    quantizer.project(weight, bits)
    frozen = FrozenWeight(quantizer, weight)
    sign = -1.0 if flipped else 1.0  # of a normalization folded into the steps
    made, values = _made(frozen.codes, frozen.step * sign, frozen.offset * sign)
    assert made.moved < 1e-3
    wanted = sign * frozen(weight).double()
    span = float(weight.abs().max())
    torch.testing.assert_close(values, wanted, rtol=0, atol=1e-5 * span)


@settings(deadline=None)  # time is that of whatever else runs
@given(
    bits=st.integers(1, 8),
    low=st.floats(-100, 0),
    high=st.floats(0.01, 100),
    drift=st.floats(-1, 1),
)
def test_learned_activations_do_not_move(
    bits: int, low: float, high: float, drift: float
) -> None:
    spec = QuantSpec(bits, "lsq", "half_step")
    quantizer = ActivationQuantizer("x", spec, nonnegative=False)
    quantizer.cover(low, high, bits)
    with torch.no_grad():
        quantizer.log2_step.add_(drift)
        quantizer.project(bits)
    top = quantizer.levels() - 1
    step, offset = float(quantizer.step.detach()), float(quantizer.offset.detach())
    found = uint8_grid(step, offset, top)
    assert found is not None and found.moved < 1e-3
    # No float rounding decides which level 0 falls to.
    assert abs((-offset / step) % 1.0 - 0.5) > 1 / 100
