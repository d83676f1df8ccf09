"""Jeffreys divergence by hand, and its prediction against brute force."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gdnsq_fx
from gdnsq_fx.analysis.divergence import (
    LEAST_DOT,
    Curvature,
    curvature_root,
    jeffreys,
    primary_output,
    sample_products,
)
from gdnsq_fx.analysis.report import CapacityReport, EdgeReport
from gdnsq_fx.errors import CalibrationError, ConfigError, GdnsqError

# --- the divergence ---


def test_jeffreys_by_hand() -> None:
    """(p - q)(ln p - ln q) for p = (1/2, 1/2), q = (9/10, 1/10): 0.4 ln 9."""
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    assert jeffreys(p, q).item() == pytest.approx(0.4 * math.log(9.0), rel=1e-5)
    assert jeffreys(q, p).item() == pytest.approx(0.4 * math.log(9.0), rel=1e-5)


def test_jeffreys_is_per_sample_and_adds_positions_up() -> None:
    p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.9, 0.1]).log()
    wanted = 0.4 * math.log(9.0)
    flat = jeffreys(torch.stack([p, p]), torch.stack([q, p]))
    assert flat.tolist() == pytest.approx([wanted, 0.0], abs=1e-6)
    tokens = jeffreys(torch.stack([p, p, p])[None], torch.stack([q, p, q])[None])
    assert tokens.tolist() == pytest.approx([2 * wanted], rel=1e-5)
    dense = [v.reshape(1, 2, 1, 1).expand(1, 2, 3, 2) for v in (p, q)]
    assert jeffreys(*dense).tolist() == pytest.approx([6 * wanted], rel=1e-5)


@given(seed=st.integers(0, 2**31), shift=st.floats(-50, 50))
@settings(max_examples=30, deadline=None)
def test_jeffreys_is_a_symmetric_divergence(seed: int, shift: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 4, 5, generator=generator) * 5
    assert (jeffreys(a, b) >= 0).all()
    assert torch.allclose(jeffreys(a, b), jeffreys(b, a))
    assert torch.allclose(jeffreys(a + shift, b), jeffreys(a, b), atol=1e-3, rtol=1e-3)
    assert torch.equal(jeffreys(a, a), torch.zeros(4))


def test_jeffreys_of_masked_classes_is_finite() -> None:
    """Logits of -inf on both sides: a class that neither model can choose."""
    a = torch.tensor([[1.0, 2.0, -math.inf]], requires_grad=True)
    b = torch.tensor([[2.0, 1.0, -math.inf]])
    divergence = jeffreys(a, b)
    wanted = jeffreys(a[:, :2], b[:, :2])
    assert divergence.item() == pytest.approx(wanted.item(), rel=1e-5)
    divergence.sum().backward()
    assert a.grad is not None and torch.isfinite(a.grad).all()


def test_jeffreys_of_half_precision_logits_is_taken_in_single() -> None:
    a, b = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(jeffreys(a, b), jeffreys(a.float(), b.float()))


# --- its square root ---


@pytest.mark.parametrize("classes", [2, 7])
def test_root_times_its_transpose_is_the_curvature(classes: int) -> None:
    """S S' = diag(p) - p p', S from its action on unit vectors."""
    logits = torch.randn(classes, generator=torch.Generator().manual_seed(0)).double()
    rows = logits.expand(classes, classes)
    root = curvature_root(rows, torch.eye(classes).double(), "softmax").T
    p = torch.softmax(logits, 0)
    wanted = torch.diag(p) - torch.outer(p, p)
    assert torch.allclose(root @ root.T, wanted, atol=1e-6)
    hessian = torch.autograd.functional.hessian(lambda z: torch.logsumexp(z, 0), logits)
    assert torch.allclose(root @ root.T, hessian, atol=1e-6)


@pytest.mark.parametrize("shape", [(3,), (), (4, 1), (2, 1, 3, 3)])
def test_output_without_classes_is_an_error_that_names_the_remedy(
    shape: tuple[int, ...],
) -> None:
    """One output value has the softmax 1, and every divergence would be 0."""
    with pytest.raises(GdnsqError, match="squared_distillation_loss"):
        jeffreys(torch.randn(shape), torch.randn(shape))


def test_root_of_dense_maps_is_taken_over_the_channels() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, signs = torch.randn(2, 2, 5, 3, 4, generator=generator)
    dense = curvature_root(logits, signs, "softmax")
    flat = [v.permute(0, 2, 3, 1).reshape(-1, 5) for v in (logits, signs, dense)]
    assert torch.allclose(curvature_root(flat[0], flat[1], "softmax"), flat[2])


def test_root_of_a_squared_error_is_the_identity() -> None:
    signs = torch.tensor([[1.0, -1.0]])
    assert torch.equal(curvature_root(torch.randn(1, 2), signs, "identity"), signs)


def test_products_are_summed_within_a_sample_before_squaring() -> None:
    gradient = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    error = torch.tensor([[1.0, -1.0], [1.0, 1.0]])
    first, second = sample_products(gradient, [error, 2.0 * error], 2)
    assert first.tolist() == [-1.0, 7.0]
    assert second.tolist() == [-2.0, 14.0]
    # Tokens of one sample lie together: [B*T, ...].
    tokens = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    (one,) = sample_products(tokens, [torch.ones(4, 1)], 2)
    assert one.tolist() == [3.0, 7.0]
    # Samples that do not lead: one sum.
    (one,) = sample_products(torch.ones(3, 2), [torch.ones(3, 2)], 2)
    assert one.tolist() == [6.0]
    (one,) = sample_products(torch.tensor(2.0), [torch.tensor(3.0)], 2)
    assert one.tolist() == [6.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_products_of_many_values_are_those_of_few(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    # Strided, and so large that each sample has a dot product of its own.
    triple = torch.randn(3, 3, LEAST_DOT, 2, generator=generator).to(dtype)
    gradient, *errors = triple.transpose(2, 3)
    found = sample_products(gradient, errors, 3)
    for products, error in zip(found, errors, strict=True):
        wanted = (gradient.double() * error.double()).flatten(1).sum(1)
        assert torch.allclose(products.double(), wanted, atol=1e-3, rtol=0.0)


# --- which output ---


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: t,
        lambda t: (t, None),
        lambda t: [torch.zeros(2, dtype=torch.long), t],
        lambda t: {"loss": torch.zeros(()), "logits": t},
        lambda t: {"out": t},
        lambda t: SimpleNamespace(logits=t),
    ],
)
def test_primary_output(wrap: Any) -> None:
    logits = torch.randn(2, 3)
    assert primary_output(wrap(logits)) is logits


@pytest.mark.parametrize("output", [None, "text", (), torch.zeros(2, dtype=torch.long)])
def test_output_without_a_floating_tensor_is_an_error(output: Any) -> None:
    with pytest.raises(GdnsqError, match="floating-point tensor"):
        primary_output(output)


# --- prediction against brute force ---


class Tiny(nn.Module):
    """Convolution, residual, linear head: activations and weights of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(self.conv(x))
        return self.fc(x.flatten(1))


class Shared(nn.Module):
    """One weight read twice: its two effects on the logits add up before squaring."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(torch.tanh(self.mix(x)))


def _report(
    model: nn.Module,
    batches: list[Tensor],
    bits: int,
    *,
    draws: int = 64,
    curvature: Curvature = "softmax",
) -> CapacityReport:
    config = gdnsq_fx.QuantConfig(bits, bits, first_last=None)
    qmodel = gdnsq_fx.prepare(model, batches[0], config, batches)
    return gdnsq_fx.analyze(
        qmodel, batches, draws=draws, confirm=99, curvature=curvature
    )


def _ratio(edge: EdgeReport) -> float:
    assert edge.measured_divergence is not None
    return edge.predicted_divergence / edge.measured_divergence


def _batches(*shape: int, count: int = 2, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(64, *shape, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("bits", [8, 6])
def test_prediction_is_right_at_small_errors(bits: int) -> None:
    torch.manual_seed(0)
    report = _report(Tiny(), _batches(2, 2, 2), bits)
    names = {e.name for e in report.edges}
    assert names == {"conv.input", "conv.weight", "fc.input", "fc.weight"}
    ratios = {e.name: _ratio(e) for e in report.edges}
    assert all(0.85 < r < 1.15 for r in ratios.values()), ratios


def test_prediction_is_right_for_a_shared_weight() -> None:
    torch.manual_seed(1)
    report = _report(Shared(), _batches(4), 8)
    names = [e.name for e in report.edges]
    assert sorted(names) == ["mix#2.input", "mix.input", "mix.weight"]
    ratios = {e.name: _ratio(e) for e in report.edges}
    assert all(0.85 < r < 1.15 for r in ratios.values()), ratios


def test_prediction_does_not_depend_on_how_samples_are_batched() -> None:
    torch.manual_seed(0)
    model, every = Tiny(), _batches(2, 2, 2, count=1)[0]
    one = _report(model, [every], 6, draws=256)
    config = gdnsq_fx.QuantConfig(6, 6, first_last=None)
    qmodel = gdnsq_fx.prepare(model, every, config, [every])
    several = gdnsq_fx.analyze(qmodel, list(every.split(10)), draws=256)
    wanted = {e.name: e for e in one.edges}
    for edge in several.edges:
        other = wanted[edge.name]
        assert edge.predicted_divergence == pytest.approx(
            other.predicted_divergence, rel=0.1
        )
        assert edge.entropy == pytest.approx(other.entropy)
        assert edge.sqnr_db == pytest.approx(other.sqnr_db)


def test_squared_error_of_a_linear_model_is_predicted_exactly() -> None:
    """One output: v^2 = 1, so a single draw has no variance at all."""
    torch.manual_seed(0)
    report = _report(
        nn.Sequential(nn.Linear(6, 1)), _batches(6), 4, draws=1, curvature="identity"
    )
    assert [_ratio(e) for e in report.edges] == pytest.approx([1.0, 1.0], rel=1e-4)


def test_squared_error_of_several_outputs() -> None:
    torch.manual_seed(0)
    report = _report(Tiny(), _batches(2, 2, 2), 8, curvature="identity")
    ratios = {e.name: _ratio(e) for e in report.edges}
    assert all(0.85 < r < 1.15 for r in ratios.values()), ratios


def test_prediction_ranks_edges_of_unequal_bits() -> None:
    torch.manual_seed(0)
    batches = _batches(2, 2, 2)
    overrides = {"conv": {"act_bits": 2}, "fc": {"weight_bits": 3}}
    config = gdnsq_fx.QuantConfig(8, 8, first_last=None, overrides=overrides)
    qmodel = gdnsq_fx.prepare(Tiny(), batches[0], config, batches)
    report = gdnsq_fx.analyze(qmodel, batches, confirm=4)
    measured = [e.measured_divergence for e in report.edges]
    assert None not in measured
    assert measured == sorted(measured, key=lambda m: m or 0.0, reverse=True)


def test_frozen_parameters_do_not_hinder_the_analysis() -> None:
    torch.manual_seed(0)
    batches, model = _batches(2, 2, 2), Tiny()
    wanted = _report(model, batches, 6)
    frozen = _report(model.requires_grad_(False), batches, 6)
    assert frozen.to_dict() == wanted.to_dict()


def test_analysis_runs_where_gradients_are_off() -> None:
    torch.manual_seed(0)
    batches = _batches(2, 2, 2)
    with torch.no_grad():
        report = _report(Tiny(), batches, 6, draws=1)
    assert all(e.predicted_divergence > 0 for e in report.edges)


def test_analysis_leaves_the_model_as_it_was() -> None:
    torch.manual_seed(0)
    batches = _batches(2, 2, 2)
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Dropout(0.5))
    model = nn.Sequential(model, nn.Flatten(), nn.Linear(12, 3))
    qmodel = gdnsq_fx.prepare(model, batches[0], calibration=batches).train()
    before = {k: v.clone() for k, v in qmodel.state_dict().items()}
    random = torch.get_rng_state()
    gdnsq_fx.analyze(qmodel, batches, confirm=2)
    assert torch.equal(torch.get_rng_state(), random)
    assert qmodel.training and all(m.training for m in qmodel.modules())
    after = qmodel.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert all(p.grad is None for p in qmodel.parameters())
    assert all(q.enabled for q in qmodel.quantizers.children())


@pytest.mark.parametrize(
    "options", [{"draws": 0}, {"confirm": -1}, {"curvature": "hessian"}]
)
def test_settings_that_make_no_sense_are_errors(options: dict[str, Any]) -> None:
    """Each would give a report, and a wrong one."""
    batches = _batches(2, 2, 2)
    qmodel = gdnsq_fx.prepare(Tiny(), batches[0], calibration=batches)
    with pytest.raises(ConfigError):
        gdnsq_fx.analyze(qmodel, batches, **options)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_batch_that_is_not_finite_is_an_error_that_says_so(value: float) -> None:
    batches = _batches(2, 2, 2)
    qmodel = gdnsq_fx.prepare(Tiny(), batches[0], calibration=batches)
    batches[1][0, 0, 0, 0] = value
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        gdnsq_fx.analyze(qmodel, batches)
