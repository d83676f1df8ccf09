"""What the next bit buys: gains, costs, and the best step for each."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gdnsq_fx
from gdnsq_fx.analysis.advice import best_per_bop, best_per_byte, next_steps
from gdnsq_fx.analysis.report import CapacityReport
from gdnsq_fx.passes import AssignBits, Calibrate

_X = torch.randn(64, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


def _prepared(model: nn.Module) -> torch.fx.GraphModule:
    config = gdnsq_fx.QuantConfig(3, 3, first_last=None)
    return gdnsq_fx.prepare(model, _X, config, [_X])


@pytest.fixture(scope="module")
def report(model: nn.Module) -> CapacityReport:
    return gdnsq_fx.analyze(_prepared(model), [_X])


def test_costs_are_what_raising_the_edge_really_costs(
    model: nn.Module, report: CapacityReport
) -> None:
    for step in report.advice:
        raised = _prepared(model)
        AssignBits({step.edge: step.raised_bits})(raised)
        Calibrate([_X], gdnsq_fx.InputStructure.of(_X))(raised)
        after = gdnsq_fx.analyze(raised, [_X])
        assert step.extra_bops == after.totals.bops - report.totals.bops
        assert step.extra_bytes == after.totals.size_bytes - report.totals.size_bytes
        found = {edge.name: edge for edge in after.edges}[step.edge]
        assert found.predicted_divergence == pytest.approx(
            step.raised_divergence, rel=1e-5
        )


def test_every_edge_has_a_step_and_the_largest_gain_comes_first(
    report: CapacityReport,
) -> None:
    assert {step.edge for step in report.advice} == {e.name for e in report.edges}
    gains = [step.gain for step in report.advice]
    assert gains == sorted(gains, reverse=True) and gains[0] > 0


def test_the_best_step_is_the_best_ratio(report: CapacityReport) -> None:
    by_byte, by_bop = best_per_byte(report.advice), best_per_bop(report.advice)
    assert by_byte is not None and by_bop is not None
    weights = [step for step in report.advice if step.extra_bytes]
    assert all(step.edge.endswith(".weight") for step in weights)
    best = by_byte.gain / by_byte.extra_bytes
    assert all(step.gain / step.extra_bytes <= best for step in weights)
    best = by_bop.gain / by_bop.extra_bops
    assert all(step.gain / step.extra_bops <= best for step in report.advice)


def test_text_and_page_show_it(report: CapacityReport) -> None:
    by_bop = best_per_bop(report.advice)
    text = " ".join(report.to_text().split())
    assert str(by_bop) in text
    assert "What the next bit buys" in report.to_html()
    assert str(report.advice[0]).replace(">", "&gt;") in report.to_html()


def test_no_prediction_no_advice(report: CapacityReport) -> None:
    assert next_steps([]) == () and best_per_byte([]) is None
