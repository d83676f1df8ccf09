"""The two quantizing functions: forward by METHOD's formula, gradients by hand."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gdnsq_fx.quantize.functions import quantize_activation, quantize_weight
from gdnsq_fx.quantize.levels import from_codes, max_code, snap_offset, to_codes
from gdnsq_fx.spec import Estimator, Offset

ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)
OFFSETS: tuple[Offset, ...] = get_args(Offset)
NOISE = 0.5 / math.sqrt(3.0)


def _doubles(values: Any, *, learns: bool = False) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=learns)


def _literal_activation(x: Tensor, s: Tensor, q: Tensor, b: Tensor) -> Tensor:
    """METHOD section 1 word for word."""
    clamped = torch.minimum(torch.maximum(x, b), b + q - s)
    return s * torch.round((clamped - b) / s) + b


# --- forward ---


def test_activation_levels_by_hand() -> None:
    x = _doubles([-9.0, -0.25, -0.01, 0.1, 0.9, 1.25, 9.0])
    y = quantize_activation(x, _doubles(0.5), _doubles(2.0), _doubles(-0.25), "lsq")
    assert y.tolist() == [-0.25, -0.25, -0.25, 0.25, 0.75, 1.25, 1.25]


def test_ties_round_to_even() -> None:
    x = _doubles([0.5, 1.5, 2.5, 3.5, 4.5])
    y = quantize_activation(x, _doubles(1.0), _doubles(16.0), _doubles(0.0), "lsq")
    assert y.tolist() == [0.0, 2.0, 2.0, 4.0, 4.0]
    w = quantize_weight(x, _doubles([1.0]), _doubles([0.0]), (0,), "lsq")
    assert w.tolist() == [0.0, 2.0, 2.0, 4.0, 4.0]


@pytest.mark.parametrize(
    ("range_", "top"), [(2.0, 1.5), (1.75, 1.0), (1.8, 1.5), (1.7, 1.0), (1.25, 1.0)]
)
def test_top_level_where_range_over_step_is_not_whole(
    range_: float, top: float
) -> None:
    """k = round((q - s)/s), half to even: 3, 2.5, 2.6, 2.4 and 1.5 steps of 0.5."""
    x, s, b = _doubles([7.0]), _doubles(0.5), _doubles(0.0)
    assert quantize_activation(x, s, _doubles(range_), b, "lsq").item() == top


@given(
    seed=st.integers(0, 2**31),
    shape=st.lists(st.integers(0, 4), max_size=4),
    log2_step=st.floats(-12, 12),
    bits=st.floats(0.0, 10.0),
    lower=st.floats(-8, 8),
)
@settings(max_examples=100, deadline=None)
def test_activation_is_clamp_then_round(
    seed: int, shape: list[int], log2_step: float, bits: float, lower: float
) -> None:
    s, q = _doubles(2.0**log2_step), _doubles(2.0 ** (log2_step + bits))
    # The top of the clamp must not lie on a tie, where the order of operations shows.
    assume(abs((2.0**bits - 1.0) % 1.0 - 0.5) > 1e-6)
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(shape, generator=generator, dtype=torch.float64)
    x, b = spread * q * 2.0 + lower, _doubles(lower)
    y = quantize_activation(x, s, q, b, "lsq")
    assert y.shape == x.shape
    assert torch.allclose(y, _literal_activation(x, s, q, b), rtol=1e-12, atol=0.0)
    assert y.unique().numel() <= round(2.0**bits - 1.0) + 1


@given(
    seed=st.integers(0, 2**31),
    channels=st.integers(1, 5),
    log2_step=st.floats(-12, 12),
    per_channel=st.booleans(),
)
@settings(max_examples=50, deadline=None)
def test_weight_rounds_without_a_clamp(
    seed: int, channels: int, log2_step: float, per_channel: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(channels, 3, 2, generator=generator, dtype=torch.float64)
    dims = (1, 2) if per_channel else (0, 1, 2)
    b = w.amin(dims, keepdim=True)
    s = torch.full_like(b, 2.0**log2_step)
    y = quantize_weight(w, s, b, dims, "lsq")
    assert torch.equal(y, s * torch.round((w - b) / s) + b)
    assert ((y - w).abs() <= s / 2 * (1 + 1e-9)).all()


def test_weight_outlier_is_kept() -> None:
    w = _doubles([[0.0, 1.0, 1000.0]])
    y = quantize_weight(w, _doubles([[1.0]]), _doubles([[0.0]]), (1,), "lsq")
    assert y.tolist() == [[0.0, 1.0, 1000.0]]


def test_codes_and_levels_are_inverse() -> None:
    step, offset = _doubles(0.125), _doubles(-3.0)
    codes = torch.arange(20, dtype=torch.float64)
    assert torch.equal(to_codes(from_codes(codes, step, offset), step, offset), codes)


def test_codes_leave_the_value_alone() -> None:
    value = _doubles([0.3, 0.7])
    to_codes(value, _doubles(0.5), _doubles(0.0))
    from_codes(value, _doubles(0.5), _doubles(0.0))
    assert value.tolist() == [0.3, 0.7]


def test_largest_code() -> None:
    steps = [max_code(_doubles(0.5), _doubles(q)).item() for q in (1.0, 2.0, 8.0)]
    assert steps == [1.0, 3.0, 15.0]


# --- gradients of the activation ---
#
# s = 0.5, q = 2, b = -0.25. Below; at 0.7 and 2.3 steps (n = 0.3, -0.3); above.

X = [-1.0, 0.1, 0.9, 5.0]
G = [1.0, 2.0, -3.0, 4.0]


def _activation_gradients(
    estimator: Estimator, x: list[float], g: list[float], range_: float = 2.0
) -> tuple[Tensor, float, float, float]:
    leaves = (
        _doubles(x, learns=True),
        _doubles(0.5, learns=True),
        _doubles(range_, learns=True),
        _doubles(-0.25, learns=True),
    )
    y = quantize_activation(*leaves, estimator)
    dx, ds, dq, db = torch.autograd.grad(y, leaves, _doubles(g))
    return dx, float(ds), float(dq), float(db)


def test_lsq_activation() -> None:
    dx, ds, dq, db = _activation_gradients("lsq", X, G)
    assert dx.tolist() == [0.0, 2.0, -3.0, 0.0]
    assert ds == pytest.approx(2 * 0.3 + -3 * -0.3 - 4)
    assert (dq, db) == (4.0, 1.0 + 4.0)


@pytest.mark.parametrize("estimator", ["ste", "ewgs", "aewgs"])
def test_random_sign_activation(estimator: Estimator) -> None:
    """ds is +-2/(2 sqrt 3) +- 3/(2 sqrt 3) inside, and -4 above; the rest is exact."""
    seen: set[float] = set()
    for seed in range(40):
        torch.manual_seed(seed)
        _, ds, dq, db = _activation_gradients(estimator, X, G)
        seen.add(round((ds + 4.0) / NOISE, 9))
        assert (dq, db) == (4.0, 5.0)
    assert seen == {-5.0, -1.0, 1.0, 5.0}


def test_ste_activation_passes_the_gradient() -> None:
    assert _activation_gradients("ste", X, G)[0].tolist() == [0.0, 2.0, -3.0, 0.0]


def test_ewgs_activation() -> None:
    dx = _activation_gradients("ewgs", X, G)[0]
    # sign(g)*n = 0.3 for both elements inside.
    wanted = _doubles([0.0, 2 * (1 - 3e-4), -3 * (1 - 3e-4), 0.0])
    assert torch.allclose(dx, wanted, rtol=1e-12)


def test_aewgs_activation() -> None:
    dx = _activation_gradients("aewgs", X, G)[0]
    # sign(g)*n = (0, 0.3, 0.3, 0), mean 0.15; var(n) = 0.18/4; delta*0.3 = 1 > 0.99.
    assert torch.allclose(dx, _doubles([0.0, 0.02, -0.03, 0.0]), rtol=1e-9)


def test_aewgs_activation_below_its_ceiling() -> None:
    dx = _activation_gradients("aewgs", [0.1, 0.2, 0.9], [2.0, -2.0, -3.0])[0]
    # n = (0.3, 0.1, -0.3); sign(g)*n = (0.3, -0.1, 0.3), mean 0.5/3;
    # var(n) = 0.19/3 - (0.1/3)^2 = 0.56/9.
    delta = (0.5 / 3) / (0.56 / 9)
    wanted = [2 * (1 - 0.3 * delta), -2 * (1 + 0.1 * delta), -3 * (1 - 0.3 * delta)]
    assert 0.3 * delta < 0.99
    assert torch.allclose(dx, _doubles(wanted), rtol=1e-9)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_clamped_gradients_where_range_over_step_is_not_whole(
    estimator: Estimator,
) -> None:
    """q/s = 3.5: clamped above 1.0, where the level is 0.75 but the formulas hold."""
    dx, ds, dq, db = _activation_gradients(estimator, [-1.0, 1.05, 5.0], G[:3], 1.75)
    assert dx.tolist() == [0.0, 0.0, 0.0]
    assert (ds, dq, db) == (-(2.0 - 3.0), 2.0 - 3.0, 1.0 + 2.0 - 3.0)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_ends_of_the_clamp_are_inside(estimator: Estimator) -> None:
    """x = b and x = b + q - s are levels: dy/dx = 1, and no gradient to b or q."""
    dx, _, dq, db = _activation_gradients(estimator, [-0.25, 1.25], [2.0, 3.0])
    assert dx.tolist() == [2.0, 3.0]
    assert (dq, db) == (0.0, 0.0)


def test_parameters_learn_where_the_input_needs_no_gradient() -> None:
    s = _doubles(0.5, learns=True)
    y = quantize_activation(_doubles(X), s, _doubles(2.0), _doubles(-0.25), "lsq")
    y.backward(_doubles(G))
    assert s.grad is not None
    assert s.grad.item() == pytest.approx(-2.5)


# --- gradients of the weight ---
#
# Channel 0: s = 0.5, b = -1, at 0, 0.8, 2.2 steps (n = 0, 0.2, -0.2).
# Channel 1: s = 0.25, b = 0, at 0, 0.4, 2.8 steps (n = 0, -0.4, 0.2).

W = [[-1.0, -0.6, 0.1], [0.0, 0.1, 0.7]]
GW = [[1.0, 2.0, 3.0], [4.0, 5.0, -6.0]]


def _weight_gradients(
    estimator: Estimator, *, per_channel: bool = True
) -> tuple[Tensor, Tensor]:
    w = _doubles(W, learns=True)
    if per_channel:
        s, b, dims = _doubles([[0.5], [0.25]], learns=True), [[-1.0], [0.0]], (1,)
    else:
        s, b, dims = _doubles([[0.5]], learns=True), [[-1.0]], (0, 1)
    y = quantize_weight(w, s, _doubles(b), dims, estimator)
    dw, ds = torch.autograd.grad(y, (w, s), _doubles(GW))
    return dw, ds


def test_lsq_weight_per_channel() -> None:
    dw, ds = _weight_gradients("lsq")
    assert dw.tolist() == GW
    wanted = [[2 * 0.2 - 3 * 0.2], [5 * -0.4 - 6 * 0.2]]
    assert torch.allclose(ds, _doubles(wanted), rtol=1e-9)


def test_lsq_weight_per_tensor() -> None:
    """Channel 1 now lies at 2, 2.2, 3.4 steps: n = 0, -0.2, -0.4."""
    dw, ds = _weight_gradients("lsq", per_channel=False)
    assert dw.tolist() == GW
    wanted = 2 * 0.2 - 3 * 0.2 + 5 * -0.2 + -6 * -0.4
    assert ds.shape == (1, 1)
    assert ds.item() == pytest.approx(wanted)


@pytest.mark.parametrize("estimator", ["ste", "ewgs", "aewgs"])
def test_random_sign_weight_sums_per_channel(estimator: Estimator) -> None:
    seen: tuple[set[float], set[float]] = (set(), set())
    for seed in range(60):
        torch.manual_seed(seed)
        _, ds = _weight_gradients(estimator)
        for channel in (0, 1):
            seen[channel].add(round(ds[channel].item() / NOISE, 9))
    assert seen[0] == {-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0}
    assert seen[1] == {-15.0, -7.0, -5.0, -3.0, 3.0, 5.0, 7.0, 15.0}


def test_ste_weight_passes_the_gradient() -> None:
    assert _weight_gradients("ste")[0].tolist() == GW


def test_ewgs_weight() -> None:
    # sign(g)*n: (0, 0.2, -0.2) and (0, -0.4, -0.2).
    wanted = [
        [1.0, 2 * (1 - 2e-4), 3 * (1 + 2e-4)],
        [4.0, 5 * (1 + 4e-4), -6 * (1 + 2e-4)],
    ]
    assert torch.allclose(_weight_gradients("ewgs")[0], _doubles(wanted), rtol=1e-12)


def test_aewgs_weight_per_channel() -> None:
    # Channel 0: mean(sign(g)*n) = 0, so the factor is 1.
    # Channel 1: mean = -0.6/3; var(n) = 0.2/3 - (0.2/3)^2 = 0.56/9.
    delta = -0.2 / (0.56 / 9)
    factor = [1.0, 1 - min(delta * -0.4, 0.99), 1 - min(delta * -0.2, 0.99)]
    wanted = [GW[0], [g * f for g, f in zip(GW[1], factor, strict=True)]]
    assert torch.allclose(_weight_gradients("aewgs")[0], _doubles(wanted), rtol=1e-9)


def test_aewgs_weight_per_tensor() -> None:
    # n = (0, 0.2, -0.2, 0, -0.2, -0.4), sign(g)*n = (0, 0.2, -0.2, 0, -0.2, 0.4).
    delta = (0.2 / 6) / (0.28 / 6 - 0.01)
    signed = _doubles([[0.0, 0.2, -0.2], [0.0, -0.2, 0.4]])
    wanted = _doubles(GW) * (1 - delta * signed)
    got = _weight_gradients("aewgs", per_channel=False)[0]
    assert torch.allclose(got, wanted, rtol=1e-9)


def test_weight_offset_gets_no_gradient() -> None:
    w, b = _doubles(W, learns=True), _doubles([[-1.0], [0.0]], learns=True)
    quantize_weight(w, _doubles([[0.5], [0.25]]), b, (1,), "lsq").sum().backward()
    assert b.grad is None


# --- offsets ---


@pytest.mark.parametrize(
    ("mode", "offset", "wanted"),
    [
        ("free", -0.33, -0.33),
        ("half_step", -0.33, -0.25),
        ("half_step", -0.4, -0.5),
        ("integer", -0.33, -0.5),
        ("integer", -0.2, 0.0),
        ("integer", 1.3, 1.5),
    ],
)
def test_offset_moves_to_the_nearest_multiple(
    mode: Offset, offset: float, wanted: float
) -> None:
    assert snap_offset(_doubles(offset), _doubles(0.5), mode).item() == wanted


@given(
    mode=st.sampled_from(["half_step", "integer"]),
    offset=st.floats(-1e3, 1e3, width=32),
    log2_step=st.floats(-8, 8, width=32),
)
@settings(max_examples=100, deadline=None)
def test_snapped_offset_lies_exactly_on_its_grid(
    mode: Offset, offset: float, log2_step: float
) -> None:
    step = torch.exp2(torch.tensor(log2_step))
    unit = step if mode == "integer" else step / 2
    snapped = snap_offset(torch.tensor(offset), step, mode)
    multiple = torch.round(snapped / unit)
    assert torch.equal(multiple * unit, snapped)
    tolerance = 1e-6 * max(abs(offset), float(step))
    assert abs(float(snapped) - offset) <= float(unit) / 2 + tolerance


@pytest.mark.parametrize("mode", OFFSETS)
def test_snapping_is_straight_through(mode: Offset) -> None:
    offset, step = _doubles(-0.33, learns=True), _doubles(0.5, learns=True)
    (snap_offset(offset, step, mode) * 3.0).backward()
    assert offset.grad is not None
    assert offset.grad.item() == 3.0
    assert step.grad is None


# --- dtypes, layouts, corner cases ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_half_precision_computes_in_the_precision_of_the_step(
    dtype: torch.dtype, estimator: Estimator
) -> None:
    x = torch.linspace(-1.0, 3.0, 301).to(dtype).requires_grad_()
    s = torch.tensor(2.0 / 255.0, requires_grad=True)
    q, b = torch.tensor(2.0), torch.tensor(-0.3)
    y = quantize_activation(x, s, q, b, estimator)
    assert torch.equal(y, quantize_activation(x.float(), s, q, b, estimator).to(dtype))
    y.float().sum().backward()
    assert x.grad is not None and s.grad is not None
    assert (x.grad.dtype, s.grad.dtype) == (dtype, torch.float32)
    assert torch.isfinite(x.grad).all() and torch.isfinite(s.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weight(dtype: torch.dtype) -> None:
    w = torch.linspace(-1.0, 1.0, 60).reshape(4, 15).to(dtype).requires_grad_()
    s = torch.full((4, 1), 0.013, requires_grad=True)
    b = w.detach().float().amin(1, keepdim=True)
    y = quantize_weight(w, s, b, (1,), "lsq")
    assert torch.equal(y, quantize_weight(w.float(), s, b, (1,), "lsq").to(dtype))
    y.float().sum().backward()
    assert w.grad is not None and s.grad is not None
    assert (w.grad.dtype, s.grad.dtype) == (dtype, torch.float32)


def _layouts() -> list[Tensor]:
    base = torch.randn(4, 3, 6, 5, generator=torch.Generator().manual_seed(0))
    return [
        base.to(memory_format=torch.channels_last),
        base.transpose(1, 3),
        base[:, :, ::2, 1:],
        base[:, :1].expand(-1, 3, -1, -1),
    ]


@pytest.mark.parametrize("which", range(4))
def test_layout_does_not_matter(which: int) -> None:
    x = _layouts()[which]
    assert not x.is_contiguous()
    s, q, b = torch.tensor(0.2), torch.tensor(1.6), torch.tensor(-0.5)
    results: list[tuple[Tensor, ...]] = []
    for value in (x, x.contiguous()):
        value = value.detach().requires_grad_()
        step = s.clone().requires_grad_()
        y = quantize_activation(value, step, q, b, "lsq")
        results.append((y, *torch.autograd.grad(y.square().sum(), (value, step))))
    for given_, wanted in zip(*results, strict=True):
        assert torch.allclose(given_, wanted, rtol=1e-5)
    steps = torch.full((x.shape[0], 1, 1, 1), 0.2)
    low = x.amin((1, 2, 3), keepdim=True)
    strided = quantize_weight(x, steps, low, (1, 2, 3), "lsq")
    dense = quantize_weight(x.contiguous(), steps, low, (1, 2, 3), "lsq")
    assert torch.equal(strided, dense)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0, 4)])
def test_empty_activation(shape: tuple[int, ...], estimator: Estimator) -> None:
    x = torch.empty(shape, requires_grad=True)
    parameters = [torch.tensor(v, requires_grad=True) for v in (0.5, 2.0, 0.0)]
    y = quantize_activation(x, *parameters, estimator)
    assert y.shape == shape
    y.sum().backward()
    assert [float(p.grad) for p in parameters if p.grad is not None] == [0.0] * 3


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_scalar_activation(estimator: Estimator) -> None:
    x = torch.tensor(0.7, requires_grad=True)
    s, q, b = torch.tensor(0.5), torch.tensor(2.0), torch.tensor(0.0)
    y = quantize_activation(x, s, q, b, estimator)
    y.backward()
    assert y.item() == 0.5
    assert x.grad is not None and torch.isfinite(x.grad)


@pytest.mark.parametrize("kind", ["activation", "weight"])
def test_second_derivative_is_an_error_that_says_so(kind: str) -> None:
    x = _doubles([[0.3, 0.7]], learns=True)
    s = _doubles([[0.5]], learns=True)
    if kind == "activation":
        y = quantize_activation(x, s.reshape(()), _doubles(2.0), _doubles(0.0), "lsq")
    else:
        y = quantize_weight(x, s, _doubles([[0.0]]), (1,), "lsq")
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()
