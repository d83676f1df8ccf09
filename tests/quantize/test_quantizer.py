"""The quantizer modules: capacity, levels, projection, placement, the switch."""

from __future__ import annotations

import copy
import math
from typing import get_args

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gdnsq_fx.channels import PER_TENSOR, ChannelLayout
from gdnsq_fx.errors import CalibrationError
from gdnsq_fx.quantize.activation_quantizer import ActivationQuantizer
from gdnsq_fx.quantize.quantizer import quantization_disabled
from gdnsq_fx.quantize.weight_quantizer import WeightQuantizer
from gdnsq_fx.spec import Estimator, Offset, QuantSpec

LN2 = math.log(2.0)
OFFSETS: tuple[Offset, ...] = get_args(Offset)
ROWS = ChannelLayout(axis=0)
TRANSPOSED = ChannelLayout(axis=1)
GROUPED = ChannelLayout(axis=1, groups=2)
LAYOUTS = (ROWS, PER_TENSOR, TRANSPOSED, GROUPED)


def _activation(
    step: float = 0.5,
    range_: float = 2.0,
    lower: float = -0.25,
    *,
    bits: int = 2,
    offset: Offset = "free",
    estimator: Estimator = "lsq",
    nonnegative: bool = False,
) -> ActivationQuantizer:
    spec = QuantSpec(bits, estimator, offset)
    quantizer = ActivationQuantizer("layer.input", spec, nonnegative=nonnegative)
    with torch.no_grad():
        quantizer.log2_step.fill_(math.log2(step))
        quantizer.log2_range.fill_(math.log2(range_))
        quantizer.lower.fill_(0.0 if nonnegative else lower)
    return quantizer


def _weight(
    weight: Tensor,
    step: float | None = None,
    *,
    layout: ChannelLayout = ROWS,
    bits: int = 2,
    offset: Offset = "free",
) -> WeightQuantizer:
    """Levels at ``step``, or placed for ``bits``."""
    spec = QuantSpec(bits, "lsq", offset)
    quantizer = WeightQuantizer("layer.weight", spec, layout, weight)
    if step is None:
        quantizer.open_to(weight, bits)
        return quantizer
    with torch.no_grad():
        quantizer.log2_step.fill_(math.log2(step))
    return quantizer


def _groups(quantizer: WeightQuantizer, value: Tensor) -> Tensor:
    """``[scale groups, elements]``."""
    view = quantizer.layout.grouped(value)
    kept = [d for d in range(view.ndim) if d not in quantizer.dims]
    count = math.prod(view.shape[d] for d in kept)
    return view.permute(*kept, *quantizer.dims).reshape(count, -1)


def _most_levels(quantizer: WeightQuantizer, weight: Tensor) -> int:
    """Counted from what comes out, not from what `levels` says."""
    rows = _groups(quantizer, quantizer.quantize(weight).detach())
    return max(row.unique().numel() for row in rows)


# --- capacity ---


def test_activation_capacity_is_log2_of_range_over_step() -> None:
    quantizer = _activation(0.5, 3.0)
    assert quantizer.capacity().item() == pytest.approx(math.log2(6.0))
    quantizer.capacity().backward()
    assert (
        quantizer.log2_range.grad is not None and quantizer.log2_step.grad is not None
    )
    assert (quantizer.log2_range.grad.item(), quantizer.log2_step.grad.item()) == (
        1,
        -1,
    )


def test_weight_capacity_is_log2_of_span_over_step_plus_one() -> None:
    weight = torch.tensor([[-1.0, 0.0, 3.0], [0.0, 0.5, 1.0]])
    capacity = _weight(weight, 0.5).capacity(weight)
    assert capacity.shape == (2, 1)
    wanted = torch.tensor([[math.log2(9.0)], [math.log2(3.0)]])
    assert torch.allclose(capacity, wanted)
    per_tensor = _weight(weight, 0.5, layout=PER_TENSOR).capacity(weight)
    assert per_tensor.item() == pytest.approx(math.log2(9.0))


def test_weight_capacity_pulls_its_extremes_in() -> None:
    """d cap / d max = 1 / (s (span/s + 1) ln 2), and so on."""
    weight = torch.tensor([[-1.0, 0.0, 3.0]], requires_grad=True)
    quantizer = _weight(weight.detach(), 0.5)
    quantizer.capacity(weight).sum().backward()
    pull = 2.0 / 9.0 / LN2
    assert weight.grad is not None and quantizer.log2_step.grad is not None
    assert torch.allclose(weight.grad, torch.tensor([[-pull, 0.0, pull]]))
    # d cap / d s = -(span/s^2) / (span/s + 1) / ln 2, and ds/dlog2_step = s ln 2.
    assert quantizer.log2_step.grad.item() == pytest.approx(-8.0 / 9.0)


def test_equal_extremes_have_one_pull_between_them() -> None:
    """Which of them gets how much of it is open: each choice is a subgradient."""
    weight = torch.tensor([[-1.0, 3.0, 3.0]], requires_grad=True)
    _weight(weight.detach(), 0.5).capacity(weight).sum().backward()
    pull = 2.0 / 9.0 / LN2
    assert weight.grad is not None
    least, *largest = weight.grad[0].tolist()
    assert least == pytest.approx(-pull)
    assert min(largest) >= 0.0 and sum(largest) == pytest.approx(pull)


# --- chain rule through the logarithms ---


def test_activation_chain_rule() -> None:
    """ds = -2.5, dq = 4, db = 5 as in test_functions; times s ln 2 and q ln 2."""
    quantizer = _activation()
    x = torch.tensor([-1.0, 0.1, 0.9, 5.0])
    quantizer(x).backward(torch.tensor([1.0, 2.0, -3.0, 4.0]))
    grads = [p.grad for p in (quantizer.log2_step, quantizer.log2_range)]
    assert grads[0] is not None and grads[1] is not None
    assert grads[0].item() == pytest.approx(-2.5 * 0.5 * LN2, rel=1e-5)
    assert grads[1].item() == pytest.approx(4.0 * 2.0 * LN2, rel=1e-5)
    assert quantizer.lower.grad is not None
    assert quantizer.lower.grad.item() == pytest.approx(5.0)


@pytest.mark.parametrize("offset", OFFSETS)
def test_lower_learns_in_every_offset_mode(offset: Offset) -> None:
    quantizer = _activation(offset=offset)
    quantizer(torch.tensor([-9.0, 9.0])).sum().backward()
    assert quantizer.lower.grad is not None
    assert quantizer.lower.grad.item() == 2.0


def test_nonnegative_lower_is_fixed_at_zero() -> None:
    quantizer = _activation(nonnegative=True)
    assert [n for n, _ in quantizer.named_parameters()] == ["log2_step", "log2_range"]
    assert quantizer(torch.tensor([-3.0, 0.6])).tolist() == [0.0, 0.5]


def test_weight_chain_rule() -> None:
    """ds = (-0.2, -3.2) as in test_functions; times s ln 2 of each channel."""
    weight = torch.tensor([[-1.0, -0.6, 0.1], [0.0, 0.1, 0.7]], requires_grad=True)
    quantizer = _weight(weight.detach(), 0.5)
    with torch.no_grad():
        quantizer.log2_step[1] = -2.0
    g = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, -6.0]])
    quantizer(weight).backward(g)
    assert quantizer.log2_step.grad is not None and weight.grad is not None
    wanted = torch.tensor([[-0.2 * 0.5 * LN2], [-3.2 * 0.25 * LN2]])
    assert torch.allclose(quantizer.log2_step.grad, wanted, rtol=1e-4)
    assert torch.equal(weight.grad, g)


# --- levels, codes ---


@pytest.mark.parametrize(
    ("step", "range_", "wanted"),
    [(0.5, 2.0, 4), (0.5, 1.0, 2), (0.5, 1.75, 3), (0.5, 1.8, 4), (0.01, 2.56, 256)],
)
def test_activation_levels(step: float, range_: float, wanted: int) -> None:
    quantizer = _activation(step, range_)
    assert quantizer.levels() == wanted
    codes = quantizer.codes(torch.linspace(-9.0, 9.0, 10001))
    assert codes.unique().tolist() == list(range(wanted))


def test_weight_levels_are_those_that_the_weight_spans() -> None:
    weight = torch.tensor([[0.0, 0.9, 3.1], [5.0, 5.0, 5.4], [1.0, 1.0, 1.0]])
    quantizer = _weight(weight, 1.0)
    assert quantizer.levels(weight).flatten().tolist() == [4.0, 1.0, 1.0]
    assert quantizer.codes(weight).tolist() == [[0, 1, 3], [0, 0, 0], [0, 0, 0]]


def test_clipped_elements() -> None:
    x = torch.tensor([-0.26, -0.25, 0.0, 1.25, 1.26])
    assert _activation().clipped(x).tolist() == [True, False, False, False, True]
    assert int(_activation().clipped_count(x)) == 2
    assert int(_activation().clipped_count(x[0])) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_codes_are_those_of_the_quantized_weight(layout: ChannelLayout) -> None:
    weight = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(0))
    for offset in OFFSETS:
        quantizer = _weight(weight, layout=layout, bits=3, offset=offset)
        step = layout.expanded(quantizer.step, weight.shape)
        low = layout.expanded(quantizer.offset(weight), weight.shape)
        rebuilt = quantizer.codes(weight) * step + low
        assert torch.equal(rebuilt, quantizer.quantize(weight))
        top = _groups(quantizer, quantizer.codes(weight)).amax(1)
        assert torch.equal(top + 1.0, quantizer.levels(weight).flatten())


def test_grouped_transposed_weight_has_a_step_for_each_output_channel() -> None:
    weight = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    quantizer = _weight(weight, layout=GROUPED, bits=4)
    assert quantizer.log2_step.numel() == 2 * 3
    for group in (0, 1):
        rows = weight[2 * group : 2 * group + 2]
        alone = _weight(rows, layout=TRANSPOSED, bits=4)
        together = quantizer.quantize(weight)[2 * group : 2 * group + 2]
        assert torch.equal(together, alone.quantize(rows))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_weights(layout: ChannelLayout) -> None:
    dense = torch.randn(4, 6, 3, 2, generator=torch.Generator().manual_seed(0))
    strided = [
        dense.to(memory_format=torch.channels_last),
        dense.permute(1, 0, 3, 2).contiguous().permute(1, 0, 3, 2),
        torch.cat([dense, dense], 3)[..., :2],
    ]
    quantizer = _weight(dense, layout=layout)
    for weight in strided:
        assert torch.equal(quantizer.quantize(weight), quantizer.quantize(dense))
        assert torch.equal(quantizer.codes(weight), quantizer.codes(dense))
        assert torch.equal(quantizer.capacity(weight), quantizer.capacity(dense))


# --- projection ---


def test_projection_raises_the_step_just_enough() -> None:
    quantizer = _activation(2.0**-8, 2.0)
    quantizer.project(3.0)
    assert quantizer.step.item() == pytest.approx(0.25)
    assert quantizer.range.item() == 2.0
    weight = torch.tensor([[0.0, 1.0, 7.0], [0.0, 1.0, 3.5]])
    weights = _weight(weight, 2.0**-8)
    weights.project(weight, 3.0)
    assert torch.allclose(weights.step, torch.tensor([[1.0], [0.5]]))


def test_projection_leaves_what_is_under_the_cap() -> None:
    quantizer = _activation(0.5, 2.0)
    quantizer.project(2.5)
    assert quantizer.step.item() == 0.5
    weight = torch.tensor([[0.0, 1.0, 7.0], [0.0, 1.0, 3.0]])
    weights = _weight(weight, 1.0)
    weights.project(weight, 2.5)
    cap = 7.0 / (2.0**2.5 - 1.0)
    assert torch.allclose(weights.step, torch.tensor([[cap], [1.0]]))


def test_projection_keeps_at_least_one_bit() -> None:
    quantizer = _activation(5.0, 2.0)
    quantizer.project(4.0)
    assert quantizer.levels() == 2
    weight = torch.tensor([[0.0, 1.0, 7.0]])
    weights = _weight(weight, 100.0)
    weights.project(weight, 4.0)
    assert weights.levels(weight).item() == 2.0


@given(
    log2_step=st.floats(-20, 20),
    capacity=st.floats(-3, 20),
    lower=st.floats(-100, 100),
    bits=st.integers(1, 16),
    offset=st.sampled_from(OFFSETS),
)
@settings(max_examples=150, deadline=None)
def test_projected_activation_meets_any_target(
    log2_step: float, capacity: float, lower: float, bits: int, offset: Offset
) -> None:
    quantizer = _activation(2.0**log2_step, 2.0 ** (log2_step + capacity), lower)
    quantizer.spec = QuantSpec(bits, "lsq", offset)
    quantizer.project(bits)
    assert 2 <= quantizer.levels() <= 2**bits
    x = torch.linspace(-2.0, 2.0, 2001) * quantizer.range.item() + lower
    assert quantizer(x).unique().numel() <= 2**bits


def _random_weight(seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 6, 5, generator=generator) * scale


@given(
    seed=st.integers(0, 2**31),
    log2_scale=st.floats(-30, 30),
    mean=st.floats(-3, 3),
    drift=st.floats(0, 4),
    bits=st.integers(1, 16),
    offset=st.sampled_from(OFFSETS),
    layout=st.sampled_from(LAYOUTS),
)
@settings(max_examples=300, deadline=None)
def test_projected_weight_meets_any_target(
    seed: int,
    log2_scale: float,
    mean: float,
    drift: float,
    bits: int,
    offset: Offset,
    layout: ChannelLayout,
) -> None:
    """From wherever training took the steps, the levels end within 2^target."""
    weight = (_random_weight(seed) + mean) * 2.0**log2_scale
    quantizer = _weight(weight, layout=layout, bits=bits, offset=offset)
    quantizer.open_to(weight, max(bits, 8))
    with torch.no_grad():
        torch.manual_seed(seed)
        quantizer.log2_step.add_(torch.randn_like(quantizer.log2_step) * drift)
    quantizer.project(weight, bits)
    levels = quantizer.levels(weight)
    assert levels.max() <= 2**bits
    assert _most_levels(quantizer, weight) <= 2**bits
    # One bit on whole multiples of s cannot tell -s/2 from s/2: see below.
    if offset != "integer" or bits > 1:
        assert levels.min() >= 2


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8, 12, 16])
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("ratio", [1e2, 1e3, 1e4, 1e5])
def test_target_is_met_where_the_mean_dwarfs_the_span(
    ratio: float, offset: Offset, bits: int
) -> None:
    """w = ratio +- 1: (w - b)/s loses digits, the target must hold all the same."""
    weight = _random_weight(0).repeat(4, 1, 1) + ratio
    quantizer = _weight(weight, bits=bits, offset=offset)
    quantizer.project(weight, bits)
    assert quantizer.levels(weight).max() <= 2**bits
    assert _most_levels(quantizer, weight) <= 2**bits


@pytest.mark.parametrize("bits", [1, 4, 7, 8, 10, 12, 16])
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_target_is_met_in_every_precision_of_the_weight(
    dtype: torch.dtype, offset: Offset, bits: int
) -> None:
    """max - min must not be rounded to the weight's own precision."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 100, generator=generator).to(dtype)
    quantizer = _weight(weight, bits=bits, offset=offset)
    quantizer.project(weight, bits)
    assert quantizer.levels(weight).max() <= 2**bits


@pytest.mark.parametrize("bits", [1, 2, 8, 16])
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("scale", [1e30, 1e-20, 1e-30, 1e-37, 1e-40, 1e-44])
def test_dead_and_huge_channels_stay_finite(
    scale: float, offset: Offset, bits: int
) -> None:
    """Pretrained depthwise kernels do hold channels of 1e-40."""
    weight = _random_weight(0) * scale
    weight[0] = torch.randn(6, 5)
    weight.requires_grad_()
    quantizer = _weight(weight.detach(), bits=bits, offset=offset)
    quantizer.project(weight, bits)
    assert quantizer.is_calibrated
    quantized = quantizer(weight)
    assert torch.isfinite(quantized).all()
    assert quantizer.levels(weight.detach()).max() <= 2**bits
    (quantized.sum() + quantizer.capacity(weight).sum()).backward()
    assert weight.grad is not None and quantizer.log2_step.grad is not None
    assert torch.isfinite(quantizer.log2_step.grad).all()
    assert torch.isfinite(weight.grad).all()


def test_half_steps_hold_the_symmetric_binary_grid() -> None:
    weight = torch.tensor([[-0.5, 0.4, 0.5, -0.3]])
    quantizer = _weight(weight, bits=1, offset="half_step")
    assert quantizer(weight).tolist() == [[-0.5, 0.5, 0.5, -0.5]]


def test_half_step_offset_lies_on_half_steps() -> None:
    weight = _random_weight(1, 0.1)
    quantizer = _weight(weight, bits=3, offset="half_step")
    doubled = quantizer.quantize(weight) / (quantizer.step / 2)
    assert torch.allclose(doubled, doubled.round(), atol=1e-4)


def test_integer_offset_represents_zero() -> None:
    weight = _random_weight(1, 0.1)
    weight[:, 0] = 0.0
    quantizer = _weight(weight, bits=3, offset="integer")
    assert (quantizer.quantize(weight)[:, 0] == 0.0).all()


# --- placement ---


@given(
    low=st.floats(-100, 100, width=32),
    log2_span=st.floats(-6, 6, width=32),
    bits=st.integers(1, 16),
    offset=st.sampled_from(OFFSETS),
    nonnegative=st.booleans(),
)
@settings(max_examples=150, deadline=None)
@example(low=0.0, log2_span=0.0, bits=1, offset="half_step", nonnegative=False)
def test_cover_places_all_levels_over_the_range(
    low: float, log2_span: float, bits: int, offset: Offset, nonnegative: bool
) -> None:
    quantizer = _activation(bits=bits, offset=offset, nonnegative=nonnegative)
    low = 0.0 if nonnegative else low
    high = low + 2.0**log2_span
    quantizer.cover(low, high, bits)
    assert quantizer.levels() == 2**bits
    assert quantizer.capacity().item() == pytest.approx(bits, abs=1e-4)
    x = torch.linspace(low, high, 1001)
    worst = (quantizer(x) - x).abs().max().item()
    precision = 4e-6 * max(abs(low), abs(high))
    assert worst <= quantizer.step.item() * (0.5 + 0.02) + precision


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("bits", [1, 2, 5, 8, 16])
@pytest.mark.parametrize("value", [0.0, 3.0, -3.0, 1e-6, -1e6])
def test_constant_activation_is_kept(value: float, bits: int, offset: Offset) -> None:
    quantizer = _activation(bits=bits, offset=offset)
    quantizer.cover(value, value, bits)
    x = torch.full((5,), value, requires_grad=True)
    y = quantizer(x)
    assert torch.allclose(y, x, rtol=1e-5, atol=0.0)
    (y.sum() + quantizer.capacity()).backward()
    grads = [p.grad for p in (x, *quantizer.parameters())]
    assert all(g is not None and torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("value", [0.056, -3.0])
def test_float_rounding_of_a_constant_gets_no_levels(
    value: float, bits: int, offset: Offset
) -> None:
    """Another kernel, which rounds otherwise, has the same codes."""
    x = torch.full((64,), value)
    x[::2] = x[::2].nextafter(torch.tensor(torch.inf))
    quantizer = _activation(bits=bits, offset=offset)
    quantizer.cover(float(x.min()), float(x.max()), bits)
    assert len(quantizer.codes(x).unique()) == 1
    assert torch.allclose(quantizer(x), x, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("start", [4.0, 8.0, 16.0])
@pytest.mark.parametrize("low", [291.0, -1000.0])
def test_a_small_spread_keeps_its_levels_on_the_way_down(
    low: float, start: float, offset: Offset
) -> None:
    quantizer = _activation(bits=4, offset=offset)
    x = torch.linspace(low, low + 0.05, 200)
    quantizer.observed.copy_(torch.stack([x.min(), x.max()]))
    quantizer.open_to(start)
    quantizer.project(4.0)
    assert len(quantizer.codes(x).unique()) >= 12


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("bits", [1, 2, 5, 8, 16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [0.0, 0.3, -0.3, 1e-6, -1e6])
def test_constant_weight_is_kept(
    value: float, layout: ChannelLayout, bits: int, offset: Offset
) -> None:
    weight = torch.full((4, 6, 3), value, requires_grad=True)
    quantizer = _weight(weight.detach(), layout=layout, bits=bits, offset=offset)
    quantizer.project(weight, bits)
    y = quantizer(weight)
    assert torch.allclose(y, weight, rtol=1e-5, atol=0.0)
    assert quantizer.capacity(weight).abs().max() == 0.0
    (y.sum() + quantizer.capacity(weight).sum()).backward()
    assert weight.grad is not None and torch.isfinite(weight.grad).all()
    assert quantizer.log2_step.grad is not None
    assert torch.isfinite(quantizer.log2_step.grad).all()


def test_one_constant_channel_does_not_touch_the_others() -> None:
    weight = _random_weight(2)
    alone = _weight(weight, bits=3).quantize(weight)
    weight = weight.clone()
    weight[1] = 0.25
    mixed = _weight(weight, bits=3)
    mixed.project(weight, 3)
    y = mixed.quantize(weight)
    assert torch.allclose(y[1], weight[1], rtol=1e-5)
    assert torch.equal(y[[0, 2, 3]], alone[[0, 2, 3]])


@pytest.mark.parametrize("bits", [1, 4, 8, 16])
@pytest.mark.parametrize("offset", OFFSETS)
def test_opened_weight_is_rounded_by_at_most_half_a_step(
    offset: Offset, bits: int
) -> None:
    weight = _random_weight(3, 0.05)
    quantizer = _weight(weight, bits=bits, offset=offset)
    error = (quantizer.quantize(weight) - weight).abs()
    assert (error <= quantizer.step * 0.501 + 1e-7).all()


def test_open_to_covers_what_calibration_saw() -> None:
    quantizer = _activation()
    quantizer.observed.copy_(torch.tensor([-1.0, 3.0]))
    quantizer.open_to(8.0)
    assert quantizer.levels() == 256
    ends = quantizer(torch.tensor([-1.0, 3.0]))
    assert torch.allclose(ends, torch.tensor([-1.0, 3.0]), atol=1e-5)


def test_open_to_without_observations_keeps_its_own_range() -> None:
    quantizer = _activation(0.5, 2.0, -0.25)
    quantizer.open_to(8.0)
    ends = quantizer(torch.tensor([-9.0, 9.0]))
    assert torch.allclose(ends, torch.tensor([-0.25, 1.25]), atol=1e-5)


# --- state, the switch, errors ---


def _pair() -> nn.ModuleDict:
    weight = _random_weight(0)
    return nn.ModuleDict({"a": _activation(), "w": _weight(weight, 0.3)})


def test_state_dict_round_trip() -> None:
    source, weight = _pair(), _random_weight(0)
    twin = nn.ModuleDict(
        {
            "a": ActivationQuantizer("a", QuantSpec(2), nonnegative=False),
            "w": WeightQuantizer("w", QuantSpec(2, offset="free"), ROWS, weight),
        }
    )
    twin["a"].spec = source["a"].spec
    result = twin.load_state_dict(source.state_dict())
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(twin["a"](weight), source["a"](weight))
    assert torch.equal(twin["w"](weight), source["w"](weight))


def test_deepcopy_is_independent() -> None:
    source, weight = _pair(), _random_weight(0)
    twin = copy.deepcopy(source)
    before = source["w"](weight)
    with torch.no_grad():
        twin["w"].log2_step.add_(2.0)
    twin["a"].enabled = False
    assert torch.equal(source["w"](weight), before)
    assert source["a"].enabled


def test_disabled_quantizers_pass_their_input_on() -> None:
    pair, x = _pair(), torch.randn(3, 4)
    with quantization_disabled(pair):
        assert pair["a"](x) is x
        assert pair["w"](x) is x
    assert pair["a"].enabled and pair["w"].enabled


def test_disabling_restores_each_switch_also_after_an_error() -> None:
    pair = _pair()
    pair["a"].enabled = False
    with pytest.raises(ZeroDivisionError), quantization_disabled(pair):
        raise ZeroDivisionError
    assert (pair["a"].enabled, pair["w"].enabled) == (False, True)


def test_disabling_nests() -> None:
    pair = _pair()
    with quantization_disabled(pair):
        with quantization_disabled(pair):
            pass
        assert not pair["w"].enabled
    assert pair["w"].enabled


def test_uncalibrated_quantizers_say_so() -> None:
    weight = torch.randn(3, 4)
    activation = ActivationQuantizer("fc.input", QuantSpec(2), nonnegative=False)
    weights = WeightQuantizer("fc.weight", QuantSpec(2), ROWS, weight)
    assert not activation.is_calibrated and not weights.is_calibrated
    with pytest.raises(CalibrationError, match=r"fc\.input"):
        activation.levels()
    with pytest.raises(CalibrationError, match=r"fc\.input"):
        activation.open_to(8.0)
    with pytest.raises(CalibrationError, match=r"fc\.weight"):
        weights.levels(weight)
    weights.open_to(weight, 2)
    assert weights.is_calibrated


def test_printing_names_edge_target_and_state() -> None:
    quantizer = _activation()
    assert "layer.input, bits<=2, lsq, free" in repr(quantizer)
    quantizer.enabled = False
    assert "disabled" in repr(quantizer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_values(dtype: torch.dtype) -> None:
    quantizer = _activation(2.0 / 255.0, 2.0, -1.0)
    x = torch.linspace(-2.0, 2.0, 101).to(dtype)
    assert torch.equal(quantizer(x), quantizer(x.float()).to(dtype))
    assert torch.equal(quantizer.codes(x), quantizer.codes(x.float()))
    assert torch.equal(quantizer.clipped(x), quantizer.clipped(x.float()))
    assert int(quantizer.clipped_count(x)) == int(quantizer.clipped(x).sum()) > 0
