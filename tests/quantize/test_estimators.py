"""Each estimator is two choices: the noise of the step, the factor of the input."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gdnsq_fx.quantize.estimators import input_factor, step_derivative
from gdnsq_fx.spec import Estimator

HALF_OVER_ROOT_3 = 0.5 / math.sqrt(3.0)
RANDOM_SIGNS: tuple[Estimator, ...] = ("ste", "ewgs", "aewgs")


def _doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _factor(gradient: Tensor, error: Tensor, estimator: Estimator) -> Tensor:
    factor = input_factor(gradient, error, estimator, range(error.ndim))
    assert factor is not None
    return factor


def test_lsq_takes_the_rounding_error_itself() -> None:
    error = _doubles(0.3, -0.5, 0.0)
    assert torch.equal(step_derivative(error, "lsq"), error)


@pytest.mark.parametrize("estimator", RANDOM_SIGNS)
def test_random_signs_have_the_variance_of_uniform_noise(estimator: Estimator) -> None:
    torch.manual_seed(0)
    noise = step_derivative(torch.zeros(200, 500, dtype=torch.float64), estimator)
    assert torch.allclose(noise.abs(), _doubles(HALF_OVER_ROOT_3), rtol=1e-15)
    # 100,000 fair signs: the mean is within 5 standard errors of 0.
    assert abs(float(noise.mean())) < 5 * HALF_OVER_ROOT_3 / math.sqrt(noise.numel())
    assert float(noise.square().mean()) == pytest.approx(1 / 12, rel=1e-12)
    # Rows are independent draws, not one draw repeated.
    assert not torch.equal(noise[0], noise[1])


@pytest.mark.parametrize("estimator", RANDOM_SIGNS)
def test_random_signs_do_not_depend_on_the_error(estimator: Estimator) -> None:
    error = torch.linspace(-0.5, 0.5, 1000, dtype=torch.float64)
    torch.manual_seed(3)
    first = step_derivative(error, estimator)
    torch.manual_seed(3)
    assert torch.equal(first, step_derivative(-error, estimator))
    assert not torch.equal(first, step_derivative(error, estimator))


@pytest.mark.parametrize("estimator", RANDOM_SIGNS)
def test_random_signs_leave_the_error_alone(estimator: Estimator) -> None:
    error = _doubles(0.1, 0.2)
    step_derivative(error, estimator)
    assert error.tolist() == [0.1, 0.2]


@pytest.mark.parametrize("estimator", ["ste", "lsq"])
def test_ste_and_lsq_pass_the_gradient_whole(estimator: Estimator) -> None:
    assert input_factor(_doubles(1.0), _doubles(0.2), estimator, (0,)) is None


def test_ewgs_factor_by_hand() -> None:
    gradient = _doubles(2.0, -3.0, -1.0, 0.0)
    error = _doubles(0.3, -0.3, 0.5, 0.5)
    wanted = _doubles(1 - 0.0003, 1 - 0.0003, 1 + 0.0005, 1.0)
    assert torch.allclose(_factor(gradient, error, "ewgs"), wanted, rtol=1e-14)


def test_aewgs_factor_by_hand() -> None:
    gradient, error = _doubles(1.0, 5.0, -1.0), _doubles(0.3, 0.1, -0.2)
    # sign(g)*n = (0.3, 0.1, 0.2): mean 0.2. var(n) = 0.14/3 - (0.2/3)^2 = 0.38/9.
    delta = 0.2 / (0.38 / 9)
    wanted = _doubles(1 - 0.99, 1 - 0.1 * delta, 1 - 0.2 * delta)
    assert delta * 0.3 > 0.99  # the first element meets the ceiling
    assert torch.allclose(_factor(gradient, error, "aewgs"), wanted, rtol=1e-12)


def test_aewgs_has_a_ceiling_but_no_floor() -> None:
    gradient = _doubles(1.0, 1.0, 1.0, -1.0)
    error = _doubles(0.4, 0.4, 0.4, 0.4)
    # var(n) = 0 counts as 1e-3; mean(sign(g)*n) = 0.2; delta = 200.
    wanted = _doubles(0.01, 0.01, 0.01, 1 + 200 * 0.4)
    assert torch.allclose(_factor(gradient, error, "aewgs"), wanted, rtol=1e-12)


def test_aewgs_variance_is_at_least_a_thousandth() -> None:
    # delta = 0.01 / 1e-3 = 10.
    factor = _factor(_doubles(1.0, 1.0), _doubles(0.01, 0.01), "aewgs")
    assert torch.allclose(factor, _doubles(0.9, 0.9), rtol=1e-12)


def test_aewgs_takes_its_factor_per_scale_group() -> None:
    gradient = torch.tensor([[1.0, 5.0, -1.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
    error = torch.tensor([[0.3, 0.1, -0.2], [0.01, 0.01, 0.01]], dtype=torch.float64)
    rows = [_factor(g, n, "aewgs") for g, n in zip(gradient, error, strict=True)]
    together = input_factor(gradient, error, "aewgs", (1,))
    assert together is not None
    assert torch.allclose(together, torch.stack(rows), rtol=1e-12)


@given(
    seed=st.integers(0, 2**31),
    size=st.integers(1, 40),
    estimator=st.sampled_from(["ewgs", "aewgs"]),
)
@settings(max_examples=50, deadline=None)
def test_factors_never_turn_a_gradient_round(
    seed: int, size: int, estimator: Estimator
) -> None:
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.randn(size, generator=generator, dtype=torch.float64)
    error = torch.rand(size, generator=generator, dtype=torch.float64) - 0.5
    assert (_factor(gradient, error, estimator) > 0.0099).all()


def test_aewgs_on_one_rank_is_that_of_no_ranks() -> None:
    gradient, error = _doubles(1.0, 5.0, -1.0), _doubles(0.3, 0.1, -0.2)
    wanted = _factor(gradient, error, "aewgs")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert torch.equal(_factor(gradient, error, "aewgs"), wanted)
    finally:
        dist.destroy_process_group()


def test_aewgs_averages_over_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks with half of the elements each get the factor of the whole."""
    gradient = _doubles(1.0, 5.0, -1.0, 1.0, -2.0, 1.0)
    error = _doubles(0.3, 0.1, -0.2, -0.4, 0.2, 0.1)
    wanted = _factor(gradient, error, "aewgs")
    sums: list[Tensor] = []

    def all_reduce(value: Tensor) -> None:
        sums.append(value.clone())
        if len(sums) == 2:
            value.copy_(sums[0] + sums[1])

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    _factor(gradient[:3], error[:3], "aewgs")
    second = _factor(gradient[3:], error[3:], "aewgs")
    assert torch.allclose(second, wanted[3:], rtol=1e-12)
