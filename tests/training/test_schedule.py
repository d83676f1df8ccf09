"""Bits and rates come down within any number of steps."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdnsq_fx.errors import ConfigError
from gdnsq_fx.training.schedule import Schedule


def test_cap_by_hand() -> None:
    """10 steps, 8 bits to 2 in the first 4, as (1 - progress)^2."""
    schedule = Schedule(10, start_bits=8.0, descent=0.4, slow_down=2.0)
    caps = [schedule.cap(step, 2) for step in range(10)]
    wanted = [2 + 6 * 0.75**2, 2 + 6 * 0.5**2, 2 + 6 * 0.25**2, *[2.0] * 7]
    assert caps == pytest.approx(wanted)
    assert schedule.descent_steps == 4


@given(
    steps=st.integers(1, 3000),
    start=st.floats(1, 16),
    descent=st.floats(0, 1),
    slow_down=st.floats(0.1, 8),
    target=st.integers(1, 16),
)
@settings(max_examples=200, deadline=None)
def test_cap_comes_down_to_the_target_and_stays(
    steps: int, start: float, descent: float, slow_down: float, target: int
) -> None:
    schedule = Schedule(steps, start, descent, slow_down)
    few = sorted({*range(min(steps, 30)), steps // 2, steps - 1})
    caps = [schedule.cap(step, target) for step in few]
    assert all(a >= b for a, b in itertools.pairwise(caps))
    assert max(caps) <= max(start, target) + 1e-9
    assert min(caps) >= target
    assert schedule.cap(steps - 1, target) == target
    assert schedule.cap(schedule.descent_steps - 1, target) == target
    assert schedule.progress(steps - 1) == 1.0


@pytest.mark.parametrize("target", [8, 12, 16])
def test_target_above_the_start_is_held_from_the_start(target: int) -> None:
    schedule = Schedule(100, start_bits=8.0)
    assert {schedule.cap(step, target) for step in range(100)} == {target}


@given(steps=st.integers(1, 3000), descent=st.floats(0, 1), warm_up=st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_learning_rate_factor_stays_within_zero_and_one(
    steps: int, descent: float, warm_up: float
) -> None:
    schedule = Schedule(steps, descent=descent, warm_up=warm_up)
    few = sorted({*range(min(steps, 30)), steps // 2, steps - 1})
    factors = [schedule.learning_rate_factor(step) for step in few]
    assert all(0.0 < factor <= 1.0 for factor in factors)


def test_learning_rate_warms_up_holds_and_anneals() -> None:
    schedule = Schedule(1000, descent=0.5, warm_up=0.1)
    factor = schedule.learning_rate_factor
    assert factor(0) == pytest.approx(0.01)
    assert factor(49) == pytest.approx(0.5)
    assert {factor(step) for step in range(100, 501)} == {1.0}
    assert factor(750) == pytest.approx(0.5)
    assert factor(999) < 1e-4


def test_quantizers_can_walk_the_descent_at_their_rate() -> None:
    """An adaptive optimizer moves about one rate a step."""
    schedule = Schedule(1000, start_bits=8.0, descent=0.5)
    assert schedule.quantizer_rate(2) == pytest.approx(6.0 / 500)
    assert schedule.quantizer_rate(1) * schedule.descent_steps == pytest.approx(7.0)
    # Nothing to lose: still able to move.
    assert schedule.quantizer_rate(8) == pytest.approx(1.0 / 500)
    assert schedule.quantizer_rate(16) > 0.0


def test_one_step_is_enough() -> None:
    schedule = Schedule(1)
    assert schedule.cap(0, 1) == 1.0
    assert schedule.learning_rate_factor(0) > 0.0
    assert math.isfinite(schedule.quantizer_rate(1))


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0},
        {"steps": -5},
        {"descent": -0.1},
        {"descent": 1.1},
        {"descent": math.nan},
        {"start_bits": 0.5},
        {"start_bits": math.nan},
        {"start_bits": math.inf},
        # (1 - progress)^0 never comes down; a negative exponent divides by zero.
        {"slow_down": 0.0},
        {"slow_down": -1.0},
        {"slow_down": math.nan},
        {"warm_up": -0.1},
        {"warm_up": math.nan},
    ],
)
def test_values_outside_their_domain_are_errors(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Schedule(**{"steps": 100, **options})


# --- the schedule of the paper ---


def test_paper_schedule_grows_for_ever_and_caps_nothing_before_the_last_step() -> None:
    schedule = Schedule.paper(1000, lr=2e-3)
    assert schedule.start_bits == 10.0
    assert schedule.growth(0) == pytest.approx(4e-3)
    assert schedule.growth(999) == pytest.approx(4.0)
    assert schedule.cap(998, 2) == math.inf
    assert schedule.cap(999, 2) == 2
    assert schedule.quantizer_rate(1) == 2e-3


def test_paper_schedule_anneals_once_the_targets_are_met() -> None:
    schedule = Schedule.paper(1000)
    assert schedule.learning_rate_factor(900) == 1.0
    assert schedule.learning_rate_factor(600, met_at=600) == 1.0
    assert schedule.learning_rate_factor(800, met_at=600) == pytest.approx(0.5)
    assert schedule.learning_rate_factor(1000, met_at=600) == pytest.approx(0.0)


def test_paper_schedule_refuses_a_rate_of_zero() -> None:
    with pytest.raises(ConfigError, match="lr must be above 0"):
        Schedule.paper(10, lr=0.0)


def test_no_penalty_presses_on_bits_that_start_at_their_targets() -> None:
    assert Schedule(10, start_bits=1.0).growth(9) == 0.0
    assert Schedule(10, start_bits=2.0).growth(9) == 1.0
