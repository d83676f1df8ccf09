"""Extremes that are known already, and where their gradients go."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gdnsq_fx.channels import ChannelLayout
from gdnsq_fx.quantize.extremes import extremes_of, with_gradient
from gdnsq_fx.quantize.weight_quantizer import WeightQuantizer
from gdnsq_fx.spec import QuantSpec


@given(seed=st.integers(0, 2**31), distinct=st.integers(1, 9), rows=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_gradients_are_those_of_amin_and_amax(
    seed: int, distinct: int, rows: int
) -> None:
    """Few distinct values, so that extremes have ties."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(distinct, (rows, 3, 4), generator=generator).double()
    given_low, given_high = torch.randn(2, rows, 1, 1, generator=generator).double()
    weight = values.clone().requires_grad_()
    low, high = (f(weight, (1, 2), keepdim=True) for f in (torch.amin, torch.amax))
    wanted = torch.autograd.grad((low * given_low + high * given_high).sum(), weight)
    found = with_gradient(weight, low.detach(), high.detach(), (1, 2))
    assert torch.equal(found[0], low) and torch.equal(found[1], high)
    loss = (found[0] * given_low + found[1] * given_high).sum()
    assert torch.allclose(*torch.autograd.grad(loss, weight), *wanted, rtol=1e-12)


@given(
    seed=st.integers(0, 2**31),
    distinct=st.integers(1, 9),
    rows=st.integers(1, 4),
    per_channel=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_gradients_by_parts_reach_one_of_those_that_are_equal(
    seed: int, distinct: int, rows: int, per_channel: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(distinct, (rows, 3, 4), generator=generator).double()
    dims = (1, 2) if per_channel else (0, 1, 2)
    low, high, parts = extremes_of(values, dims)
    assert parts is not None
    assert torch.equal(low, values.amin(dims, keepdim=True))
    assert torch.equal(high, values.amax(dims, keepdim=True))
    by_low, by_high = torch.randn(2, *low.shape, generator=generator).double()
    weight = values.clone().requires_grad_()
    found = with_gradient(weight, low, high, dims, parts)
    loss = (found[0] * by_low + found[1] * by_high).sum()
    (gradient,) = torch.autograd.grad(loss, weight)
    varied = low < high
    for extreme, wanted in ((low, by_low), (high, by_high)):
        there = torch.where(values == extreme, gradient, 0.0)
        assert torch.equal(there.sum(dims, keepdim=True)[varied], wanted[varied])
        assert ((there != 0).sum(dims, keepdim=True)[varied] == 1).all()
    both = gradient.sum(dims, keepdim=True)
    assert torch.allclose(both, by_low + by_high, rtol=1e-12)


def test_no_parts_where_groups_are_no_rows() -> None:
    weight = torch.randn(3, 4, 5)
    assert extremes_of(weight, (0, 2))[2] is None
    assert extremes_of(weight.transpose(0, 1), (1, 2))[2] is None
    low, high, _ = extremes_of(weight, (0, 2))
    assert torch.equal(low, weight.amin((0, 2), keepdim=True))
    assert torch.equal(high, weight.amax((0, 2), keepdim=True))


def _quantizer(weight: nn.Parameter) -> WeightQuantizer:
    made = WeightQuantizer("w", QuantSpec(4), ChannelLayout(0), weight)
    made.open_to(weight, 4.0)
    return made.train()


def _walks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Notes every walk over a weight for its extremes."""
    walks: list[int] = []
    look = WeightQuantizer._look

    def noting(quantizer: WeightQuantizer, weight: torch.Tensor) -> object:
        walks.append(weight.numel())
        return look(quantizer, weight)

    monkeypatch.setattr(WeightQuantizer, "_look", noting)
    monkeypatch.setattr(WeightQuantizer, "extremes", None)
    return walks


def test_capacity_after_forward_walks_over_no_weight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = nn.Parameter(torch.randn(4, 9))
    quantizer = _quantizer(weight)
    wanted = quantizer.capacity(weight)
    walks = _walks(monkeypatch)
    quantizer(weight)
    assert len(walks) == 1
    assert torch.equal(quantizer.capacity(weight), wanted)
    assert len(walks) == 1


def test_a_weight_that_changed_is_walked_over_again() -> None:
    weight = nn.Parameter(torch.randn(4, 9))
    quantizer = _quantizer(weight)
    quantizer(weight)
    with torch.no_grad():
        weight.mul_(2.0)
    assert torch.equal(
        quantizer.learnable_extremes(weight)[1].detach(), weight.amax(1, keepdim=True)
    )
    other = nn.Parameter(weight.detach() * 3.0)
    assert torch.equal(
        quantizer.learnable_extremes(other)[1].detach(), other.amax(1, keepdim=True)
    )


def test_copies_forget_what_forward_saw() -> None:
    weight = nn.Parameter(torch.randn(4, 9))
    quantizer = _quantizer(weight)
    quantizer(weight)
    assert quantizer._looks.last is not None
    assert copy.deepcopy(quantizer)._looks.last is None


def test_forward_after_projection_walks_over_no_weight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = nn.Parameter(torch.randn(4, 9))
    quantizer = _quantizer(weight)
    wanted = quantizer(weight)
    walks = _walks(monkeypatch)
    quantizer.look_ahead(weight)
    assert torch.equal(quantizer(weight), wanted)
    assert len(walks) == 1
    quantizer(weight)  # what was found ahead is for one forward pass
    assert len(walks) == 2


def test_what_was_found_ahead_is_of_the_weight_as_it_was() -> None:
    weight = nn.Parameter(torch.randn(4, 9))
    quantizer = _quantizer(weight)
    quantizer.look_ahead(weight)
    with torch.no_grad():
        weight.mul_(2.0)
    found = quantizer(weight)
    assert torch.equal(found, copy.deepcopy(quantizer)(weight))
    quantizer.look_ahead(weight)
    assert copy.deepcopy(quantizer)._looks.ahead is None
