"""Balanced signs leave no cross terms, and tell the change of each logit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gdnsq_fx.analysis.directions import Directions, hadamard
from gdnsq_fx.analysis.divergence import jeffreys


def _directions(logits: Tensor, draws: int, seed: int = 0) -> Directions:
    generator = torch.Generator().manual_seed(seed)
    return Directions(logits, draws, "softmax", generator)


def _products(directions: Directions, change: Tensor) -> Tensor:
    """(S v)' d of each sample and draw, ``[draws, B]``."""
    rows = [(one * change).flatten(1).sum(1) for one in directions]
    return torch.stack(rows)


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("order", [1, 2, 4, 16])
def test_columns_are_orthogonal(order: int) -> None:
    matrix = hadamard(order, torch.device("cpu"))
    assert torch.equal(matrix.abs(), torch.ones(order, order))
    assert torch.equal(matrix.T @ matrix, order * torch.eye(order))


def test_as_many_draws_as_classes_are_exact_whatever_the_size_of_the_change() -> None:
    logits, change = _normal(5, 4), 5.0 * _normal(5, 4, seed=1)
    directions = _directions(logits, 4)
    found = directions.divergences(_products(directions, change))
    assert torch.allclose(found, jeffreys(logits + change, logits).double(), rtol=1e-4)
    # The second order alone is not.
    second = _products(directions, change).square().mean(0)
    assert ((second / found - 1.0).abs() > 0.1).all()


def test_fewer_draws_are_right_where_few_classes_are_likely() -> None:
    """Four likely classes of twelve: the rest only adds what it is worth."""
    logits, change = _normal(64, 12), _normal(64, 12, seed=1)
    logits[:, 4:] -= 12.0
    shuffled = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    logits, change = logits[:, shuffled], change[:, shuffled]
    directions = _directions(logits, 4)
    found = directions.divergences(_products(directions, change))
    wanted = jeffreys(logits + change, logits).double()
    assert torch.allclose(found, wanted, rtol=0.05, atol=0.02)


def test_classes_too_unlikely_to_divide_by_stay_finite() -> None:
    logits = torch.tensor([[0.0, -50.0, -60.0, -90.0], [0.0, 1.0, -200.0, -300.0]])
    directions = _directions(logits, 4)
    noisy = _products(directions, _normal(2, 4).float()) + 1e-7
    found = directions.divergences(noisy)
    assert torch.isfinite(found).all() and (found >= 0.0).all()
    assert found[0] < 1e-5


@pytest.mark.parametrize("shape", [(3, 6, 20), (3, 20, 2, 3)])
def test_positions_of_one_sample_have_the_right_mean(shape: tuple[int, ...]) -> None:
    logits, change = _normal(*shape), 0.01 * _normal(*shape, seed=1)
    wanted = jeffreys(logits + change, logits).double()
    found = torch.zeros(3).double()
    for seed in range(400):
        directions = _directions(logits, 4, seed)
        found += directions.divergences(_products(directions, change)) / 400
    assert torch.allclose(found, wanted, rtol=0.1)


def test_balanced_signs_have_the_mean_of_independent_ones_and_less_variance() -> None:
    logits, change = 3.0 * _normal(256, 10), 0.1 * _normal(256, 10, seed=1)
    wanted = float(jeffreys(logits + change, logits).mean())
    balanced, independent = torch.zeros(100), torch.zeros(100)
    for seed in range(100):
        drawn = _directions(logits, 4, seed)
        balanced[seed] = drawn.divergences(_products(drawn, change)).mean()
        each = [_directions(logits, 1, 4 * seed + n) for n in range(4)]
        products = torch.cat([_products(one, change) for one in each])
        independent[seed] = products.square().mean()
    for found in (balanced, independent):
        assert float(found.mean()) == pytest.approx(wanted, rel=0.02)
    assert balanced.var() < independent.var() / 2


def test_outputs_of_a_regression_are_summed_exactly() -> None:
    """Two outputs, two draws: orthogonal, so no randomness is left."""
    logits, change = _normal(6, 2), _normal(6, 2, seed=1)
    generator = torch.Generator().manual_seed(0)
    directions = Directions(logits, 2, "identity", generator)
    found = directions.divergences(_products(directions, change))
    assert torch.allclose(found, change.square().sum(1))
    scalar = Directions(torch.tensor(2.0), 1, "identity", generator)
    assert [one.abs().item() for one in scalar] == [1.0]
