"""Errors of quantizers: what is kept from batch to batch, and what must not be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import gdnsq_fx
from gdnsq_fx.analysis.edge_errors import ErrorsAt, ErrorsNow
from gdnsq_fx.errors import CalibrationError
from gdnsq_fx.sites import activation_sites, weight_sites


class Net(nn.Module):
    """One layer, whose input may be made NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.sqrt(x))


def _prepared() -> torch.fx.GraphModule:
    torch.manual_seed(0)
    x = torch.rand(8, 4)
    config = gdnsq_fx.QuantConfig(2, 2, first_last=None)
    return gdnsq_fx.prepare(Net(), x, config, [x])


def test_the_error_of_a_parameter_is_kept_until_the_parameter_changes() -> None:
    (site,) = weight_sites(_prepared())
    weight, now = site.weight(), ErrorsNow(keep=True)
    afresh = ErrorsNow(keep=False)
    first = now(site.quantizer, weight)
    assert torch.equal(first, site.quantizer.quantize(weight) - weight)
    assert now(site.quantizer, weight) is first
    with torch.no_grad():
        weight.mul_(1.5)
    changed = now(site.quantizer, weight)
    assert not torch.equal(changed, first)
    assert torch.equal(changed, afresh(site.quantizer, weight))
    # Another tensor under the same name, as a weight computed from parameters is.
    other = nn.Parameter(weight.detach() + 0.1)
    assert torch.equal(now(site.quantizer, other), afresh(site.quantizer, other))
    computed = weight.detach() * 0.5
    assert now(site.quantizer, computed) is not now(site.quantizer, computed)
    assert afresh(site.quantizer, weight) is not changed


def test_errors_at_another_width_are_kept_apart() -> None:
    (site,) = weight_sites(_prepared())
    edge, weight, now = site.edge, site.weight(), ErrorsNow(keep=True)
    same = ErrorsAt({edge: 2}, {edge: 2}, now, keep=True)
    more = ErrorsAt({edge: 5}, {edge: 2}, now, keep=True)
    assert same(site.quantizer, weight) is now(site.quantizer, weight)
    finer = more(site.quantizer, weight)
    assert more(site.quantizer, weight) is finer
    assert finer.square().sum() < 0.1 * now(site.quantizer, weight).square().sum()


def test_errors_of_activations_are_not_kept() -> None:
    (site,) = activation_sites(_prepared())
    now = ErrorsNow(keep=True)
    for scale in (0.5, 1.0):
        x = torch.full((2, 4), scale)
        kept = x.clone()
        assert torch.equal(now(site.quantizer, x), site.quantizer.quantize(x) - x)
        assert torch.equal(x, kept)


def test_nan_inside_the_model_is_named() -> None:
    with pytest.raises(CalibrationError, match=r"layer\.input carries NaN"):
        gdnsq_fx.analyze(_prepared(), [-torch.ones(8, 4)], advice=False)
