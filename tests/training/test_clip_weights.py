"""Weights start where few levels do best; the rest of the model stays as it is."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

import gdnsq_fx
from gdnsq_fx.sites import weight_sites
from gdnsq_fx.training.clip_weights import clip_outliers


def _prepared(bits: int, **config: object) -> GraphModule:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, groups=2))
    with torch.no_grad():
        for conv in (model[0], model[2]):
            conv.weight.normal_()  # type: ignore[union-attr,operator]
    x = torch.randn(4, 3, 8, 8)
    chosen = gdnsq_fx.QuantConfig(bits, bits, first_last=None, **config)  # type: ignore[arg-type]
    return gdnsq_fx.prepare(model, x, chosen, [x])


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("offset", ["free", "half_step", "integer"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_error_falls_and_the_target_is_met(
    bits: int, offset: str, per_channel: bool
) -> None:
    qmodel = _prepared(bits, offset=offset, per_channel=per_channel)
    sites = weight_sites(qmodel)
    exact = [site.weight().detach().clone() for site in sites]
    before = [s.quantizer.quantize(w) - w for s, w in zip(sites, exact, strict=True)]
    clip_outliers(sites, 1.0)
    for site, weight, error in zip(sites, exact, before, strict=True):
        quantized = site.quantizer.quantize(site.weight()).detach()
        after = float((quantized - weight).square().sum())
        worst = {2: 0.75, 3: 0.95}.get(bits, 1.05)
        assert after <= worst * float(error.detach().square().sum())
        capacity = site.quantizer.capacity(site.weight())
        assert float(capacity.max()) <= bits + 1e-4
        assert int(site.quantizer.levels(site.weight()).max()) <= 2**bits


def test_inliers_stay_to_the_bit() -> None:
    qmodel = _prepared(2)
    (site, *_) = weight_sites(qmodel)
    before = site.weight().detach().clone()
    clip_outliers([site], 1.0)
    after = site.weight().detach()
    low, high = site.quantizer.extremes(after)
    inside = (before > low) & (before < high)
    assert 0.5 < float(inside.float().mean()) < 1.0
    assert torch.equal(after[inside], before[inside])


@pytest.mark.parametrize("bits", [1, 12])
def test_signs_and_fine_grids_are_left_alone(bits: int) -> None:
    qmodel = _prepared(bits)
    before = {name: t.clone() for name, t in qmodel.state_dict().items()}
    clip_outliers(weight_sites(qmodel), 1.0)
    assert all(torch.equal(t, before[n]) for n, t in qmodel.state_dict().items())


def test_frozen_weights_and_constant_channels_stay() -> None:
    qmodel = _prepared(2)
    first, second = weight_sites(qmodel)
    frozen, learning = first.weight(), second.weight()
    frozen.requires_grad_(False)
    with torch.no_grad():
        learning[1] = 0.25
    second.quantizer.open_to(learning.detach(), 2.0)
    step = second.quantizer.log2_step.detach().clone()
    before = frozen.clone(), learning.detach().clone()
    clip_outliers([first, second], 1.0)
    assert torch.equal(frozen, before[0])
    assert torch.equal(learning[1], before[1][1])
    assert torch.equal(second.quantizer.log2_step[1], step[1])
    assert not torch.equal(learning[0], before[1][0])


def test_shifted_channels_keep_their_side() -> None:
    qmodel = _prepared(2)
    (site, *_) = weight_sites(qmodel)
    weight = site.weight()
    with torch.no_grad():
        weight.abs_().add_(3.0)
    site.quantizer.open_to(weight.detach(), 2.0)
    clip_outliers([site], 1.0)
    assert float(weight.min()) > 2.5
