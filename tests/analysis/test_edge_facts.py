"""Joint divergence, divergence at other widths, cost and entropy of every edge."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from scipy.stats import entropy, spearmanr
from torch import Tensor, nn
from torch.fx import GraphModule

import gdnsq_fx
from gdnsq_fx.analysis.divergence import (
    Curvature,
    divergence_slope,
    jeffreys,
    vanishing_divergence,
)
from gdnsq_fx.analysis.report import EdgeReport
from gdnsq_fx.annotations import facts
from gdnsq_fx.errors import ConfigError
from gdnsq_fx.sites import ActivationSite, sites


class Net(nn.Module):
    """A convolution, a residual sum, a grouped convolution and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.block = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.head = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.block(x))
        return self.head(x.flatten(1))


def _batches(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(64, 2, 4, 4, generator=generator) for _ in range(count)]


def _prepared(bits: int, **settings: Any) -> GraphModule:
    torch.manual_seed(0)
    config = gdnsq_fx.QuantConfig(bits, bits, first_last=None, **settings)
    return gdnsq_fx.prepare(Net(), _batches()[0], config, _batches())


def _edges(qmodel: GraphModule, **options: Any) -> dict[str, EdgeReport]:
    report = gdnsq_fx.analyze(qmodel, _batches(), **options)
    return {edge.name: edge for edge in report.edges}


# --- joint divergence ---


def test_slope_is_the_gradient_of_the_divergence() -> None:
    generator = torch.Generator().manual_seed(0)
    z, reference, d = torch.randn(3, 4, 5, generator=generator).double()
    p, q = torch.softmax(reference, 1), torch.softmax(z, 1)
    moved = z - reference
    through = q * moved - q * (q * moved).sum(1, keepdim=True)
    slope = divergence_slope(z, reference, "softmax")
    assert torch.allclose(slope, q - p + through, atol=1e-5)
    small = 1e-2 * d
    change = jeffreys(z + small, reference) - jeffreys(z - small, reference)
    assert torch.allclose((2 * slope * small).sum(1), change.double(), atol=1e-4)
    squared = divergence_slope(z, reference, "identity")
    assert torch.allclose(squared, 2.0 * moved)


def test_what_vanishes_by_hand() -> None:
    # The parabola up to its top, where its slope is half used up; then the top.
    assert vanishing_divergence(1.0, 0.25) == 0.75
    assert vanishing_divergence(1.0, 0.5) == 0.5
    assert vanishing_divergence(1.0, 2.0) == 0.125
    assert vanishing_divergence(-1.0, 0.5) == -1.5
    assert vanishing_divergence(0.0, 0.0) == 0.0


@pytest.mark.parametrize(("bits", "least"), [(2, 0.8), (3, 0.8)])
def test_joint_divergence_ranks_like_the_measured_one(bits: int, least: float) -> None:
    edges = _edges(_prepared(bits), draws=16, confirm=99).values()
    predicted = [edge.joint_divergence for edge in edges]
    measured = [edge.measured_joint_divergence for edge in edges]
    assert len(predicted) == 6 and None not in predicted + measured
    assert spearmanr(predicted, measured).statistic >= least


@pytest.mark.parametrize("curvature", ["softmax", "identity"])
def test_joint_divergence_of_a_single_edge_is_its_own(curvature: Curvature) -> None:
    """With one edge quantized, both questions are the same one."""
    torch.manual_seed(0)
    config = gdnsq_fx.QuantConfig(6, 6, first_last=None)
    # One direction for each sample: many samples, lest its noise exceed 5 percent.
    batches = [batch.flatten(1) for batch in _batches(96)]
    qmodel = gdnsq_fx.prepare(nn.Linear(32, 5), batches[0], config, batches)
    qmodel.get_submodule("quantizers.linear_input").open_to(16)
    report = gdnsq_fx.analyze(qmodel, batches, draws=16, confirm=2, curvature=curvature)
    weight = next(edge for edge in report.edges if edge.name == "linear.weight")
    assert weight.measured_joint_divergence == pytest.approx(
        weight.measured_divergence, rel=1e-3
    )
    assert weight.joint_divergence is not None
    # From the far end: slope 2x, curvature x.
    assert weight.joint_divergence == pytest.approx(
        weight.predicted_divergence, rel=0.05
    )


def test_joint_divergence_can_be_left_out() -> None:
    edges = _edges(_prepared(3), joint=False, confirm=1)
    assert {edge.joint_divergence for edge in edges.values()} == {None}
    assert {edge.measured_joint_divergence for edge in edges.values()} == {None}


# --- other widths ---


def test_divergence_at_each_width_is_what_a_model_of_that_width_predicts() -> None:
    qmodel = _prepared(3)
    found = _edges(qmodel, widths=range(1, 9), joint=False)
    for width in (3, 8):
        others = _edges(_prepared(width), joint=False)
        for name, edge in found.items():
            # Calibration saw more values than the first batch, hence not the same.
            assert edge.divergence_at[width] == pytest.approx(
                others[name].predicted_divergence, rel=1e-6 if width == 3 else 0.3
            )
    for edge in found.values():
        assert list(edge.divergence_at) == list(range(1, 9))
        assert edge.divergence_at[8] < 0.02 * edge.divergence_at[3]
    assert all(site.quantizer.spec.bits == 3 for site in sites(qmodel))


def test_one_bit_more_is_predicted_by_default_as_any_width_is() -> None:
    qmodel = _prepared(3)
    raised = {name: edge.divergence_at for name, edge in _edges(qmodel).items()}
    asked = gdnsq_fx.analyze(qmodel, _batches(), widths=(4, 9)).edges
    for edge in asked:
        assert raised[edge.name] == {
            edge.bits + 1: pytest.approx(edge.divergence_at[edge.bits + 1], rel=1e-6)
        }
    without = gdnsq_fx.analyze(qmodel, _batches(), advice=False)
    assert without.advice == ()
    assert all(edge.divergence_at == {} for edge in without.edges)


def test_widths_are_checked() -> None:
    qmodel = _prepared(3)
    for widths in ((0,), (17,)):
        with pytest.raises(ConfigError, match="widths must lie between 1 and 16"):
            gdnsq_fx.analyze(qmodel, _batches(), widths=widths)


@pytest.mark.parametrize("draws", [0, -4, 3, 6])
def test_draws_are_a_power_of_two(draws: int) -> None:
    with pytest.raises(ConfigError, match="power of two"):
        gdnsq_fx.analyze(_prepared(3), _batches(), draws=draws)


# --- cost ---


def test_cost_of_every_edge_by_hand() -> None:
    overrides = {"block": {"weight_bits": 2}, "head": {"act_bits": 5}}
    edges = _edges(_prepared(3, overrides=overrides))
    pixels = 16
    stem, block, head = (4 * 2 * 9 * pixels, 4 * 2 * 9 * pixels, 64 * 5)
    wanted = {
        "stem.input": (stem, stem * 3 * 3, 0),
        "stem.weight": (stem, stem * 3 * 3, 4 * 2 * 9),
        "block.input": (block, block * 2 * 3, 0),
        "block.weight": (block, block * 2 * 3, 4 * 2 * 9),
        "head.input": (head, head * 3 * 5, 0),
        "head.weight": (head, head * 3 * 5, 64 * 5),
    }
    found = {k: (e.macs, e.bops, e.parameters) for k, e in edges.items()}
    assert found == wanted
    report = gdnsq_fx.analyze(_prepared(3, overrides=overrides), _batches())
    assert report.totals.bops == sum(found[f"{n}.weight"][1] for n in LAYERS)
    one = next(e for e in report.to_dict()["edges"] if e["name"] == "head.weight")
    assert (one["macs"], one["bops"], one["parameters"]) == wanted["head.weight"]


LAYERS = ("stem", "block", "head")


# --- one streaming pass ---


def test_entropy_is_that_of_scipy_on_the_codes() -> None:
    qmodel = _prepared(3)
    found = _edges(qmodel)
    codes: dict[str, list[Tensor]] = {}
    with gdnsq_fx.quantization_disabled(qmodel), torch.no_grad():
        handles = [
            site.quantizer.register_forward_hook(
                lambda module, args, output: codes.setdefault(module.edge, []).append(
                    module.codes(output)
                )
            )
            for site in sites(qmodel)
        ]
        for batch in _batches():
            qmodel(batch)
    for handle in handles:
        handle.remove()
    for site in sites(qmodel):
        if isinstance(site, ActivationSite):
            groups = [torch.cat(codes[site.edge]).flatten()]
            per_sample = 1 / sum(len(batch) for batch in _batches())
        else:
            groups = list(codes[site.edge][0].flatten(1))
            per_sample = 1.0
        wanted = sum(
            len(row) * entropy(torch.bincount(row.long()).numpy(), base=2)
            for row in groups
        )
        edge = facts(site.node).edge
        assert edge is not None
        assert edge.entropy == pytest.approx(wanted * per_sample, rel=1e-9)
        assert found[site.edge].entropy == edge.entropy


def test_batches_are_read_once_and_let_go() -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def stream() -> Iterator[Tensor]:
        nonlocal most
        for _ in range(6):
            gc.collect()
            most = max(most, sum(one() is not None for one in alive))
            batch = torch.randn(8, 2, 4, 4)
            alive.append(weakref.ref(batch))
            yield batch

    gdnsq_fx.analyze(_prepared(3), stream(), widths=(4,))
    assert len(alive) == 6
    assert most <= 2  # the one just analyzed, and the generator's own
