"""Every kernel computes the same values and gradients; what cannot compile says so."""

from __future__ import annotations

import logging
import shutil
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gdnsq_fx
from gdnsq_fx.errors import ConfigError
from gdnsq_fx.quantize import gradients, kernels, traced_gradients
from gdnsq_fx.quantize.functions import quantize_activation, quantize_weight
from gdnsq_fx.quantize.levels import activation_levels, weight_levels
from gdnsq_fx.spec import Estimator

ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)


def _doubles(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@given(
    seed=st.integers(0, 2**31),
    shape=st.lists(st.integers(0, 4), max_size=3),
    estimator=st.sampled_from(ESTIMATORS),
    bits=st.integers(1, 6),
    signed=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_eager_gradients_of_activations_are_the_formulas(
    seed: int, shape: list[int], estimator: Estimator, bits: int, signed: bool
) -> None:
    x, gradient = _doubles(2, *shape, seed=seed)
    x = x if signed else x.abs()
    step = torch.tensor(0.11, dtype=torch.float64)
    lower = torch.tensor(-0.3, dtype=torch.float64) if signed else None
    scalars = (step, step * 2**bits, lower)
    torch.manual_seed(seed)
    wanted = traced_gradients.activation_gradients(x, gradient, *scalars, estimator)
    levels = activation_levels(x, *scalars)
    torch.manual_seed(seed)
    found = gradients.activation_gradients(x, levels, gradient, *scalars, estimator)
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-9)


@given(
    seed=st.integers(0, 2**31),
    channels=st.integers(1, 4),
    estimator=st.sampled_from(ESTIMATORS),
    per_channel=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_eager_gradients_of_weights_are_the_formulas(
    seed: int, channels: int, estimator: Estimator, per_channel: bool
) -> None:
    weight, gradient = _doubles(2, channels, 3, 2, seed=seed)
    dims = (1, 2) if per_channel else (0, 1, 2)
    lower = weight.amin(dims, keepdim=True)
    step = torch.full_like(lower, 0.13)
    torch.manual_seed(seed)
    wanted = traced_gradients.weight_gradients(
        weight, gradient, step, lower, dims, estimator
    )
    levels = weight_levels(weight, step, lower, None)
    torch.manual_seed(seed)
    found = gradients.weight_gradients(weight, levels, gradient, step, dims, estimator)
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-9)


def test_gradients_leave_input_and_gradient_alone() -> None:
    x, gradient = _doubles(2, 20, seed=0)
    step, range_, lower = (torch.tensor(v).double() for v in (0.1, 1.6, -0.5))
    before = x.clone(), gradient.clone()
    for estimator in ESTIMATORS:
        levels = activation_levels(x, step, range_, lower)
        gradients.activation_gradients(
            x, levels, gradient, step, range_, lower, estimator
        )
        levels = activation_levels(x, step, range_, lower)
        gradients.weight_gradients(x, levels, gradient, step, (0,), estimator)
    assert all(map(torch.equal, (x, gradient), before))


@pytest.mark.parametrize("lower", [None, -0.5])
def test_infinite_inputs_are_clamped(lower: float | None) -> None:
    x = torch.tensor(
        [0.3, torch.inf] if lower is None else [0.3, torch.inf, -torch.inf]
    )
    leaves = [t.requires_grad_() for t in (x, torch.tensor(0.1), torch.tensor(1.6))]
    bound = None if lower is None else torch.tensor(lower)
    levels = quantize_activation(*leaves, bound, "lsq")
    grads = torch.autograd.grad(levels.sum(), leaves)
    assert all(torch.isfinite(g).all() for g in (levels, *grads))
    assert grads[0].tolist() == [1.0] + [0.0] * (len(x) - 1)


def test_the_bounds_themselves_are_inside() -> None:
    x = torch.tensor([-0.5, 1.0], requires_grad=True)
    scalars = [torch.tensor(v) for v in (0.5, 2.0, -0.5)]
    levels = quantize_activation(x, *scalars, "lsq")
    assert torch.autograd.grad(levels.sum(), x)[0].tolist() == [1.0, 1.0]


def test_without_a_lower_bound_it_is_zero() -> None:
    x = _doubles(50, seed=1).abs()
    step, range_, zero = (torch.tensor(v).double() for v in (0.1, 1.6, 0.0))

    def all_of(lower: Tensor | None) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, step, range_)]
        levels = quantize_activation(*leaves, lower, "lsq")
        return [levels, *torch.autograd.grad(levels.square().sum(), leaves)]

    for one, other in zip(all_of(None), all_of(zero), strict=True):
        assert torch.allclose(one, other, rtol=1e-12)


def test_channels_last_stays_channels_last() -> None:
    x = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    scalars = [torch.tensor(v) for v in (0.1, 1.6, -0.5)]
    levels = quantize_activation(x, *scalars, "lsq")
    assert levels.is_contiguous(memory_format=torch.channels_last)
    (gradient,) = torch.autograd.grad(levels.square().sum(), x)
    assert gradient.is_contiguous(memory_format=torch.channels_last)


def _prepared(estimator: Estimator = "lsq") -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(5, 6)
    config = gdnsq_fx.QuantConfig(4, 4, estimator=estimator)
    return gdnsq_fx.prepare(model, x, config, [x]).train(), x


def test_unknown_kernels_are_refused() -> None:
    qmodel, _ = _prepared()
    with pytest.raises(ConfigError, match="auto, eager, native, compile"):
        gdnsq_fx.use_kernels(qmodel, "fast")  # type: ignore[arg-type]


def test_without_a_compiler_eager_kernels_and_one_line_of_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none_here(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler\nand a long explanation")

    qmodel, x = _prepared()
    wanted = qmodel(x)
    kernels._compiler_works.cache_clear()
    monkeypatch.setattr(torch, "compile", none_here)
    gdnsq_fx.use_kernels(qmodel, "compile")
    with caplog.at_level(logging.WARNING):
        assert torch.equal(qmodel(x), wanted)
        assert torch.equal(qmodel(x), wanted)
    kernels._compiler_works.cache_clear()
    (record,) = caplog.records
    assert "no compiler" in record.getMessage()
    assert "explanation" not in record.getMessage()


def test_auto_compiles_nothing_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", None)
    qmodel, x = _prepared()
    qmodel(x).sum().backward()


def _step(qmodel: nn.Module, x: Tensor) -> list[Tensor]:
    with gdnsq_fx.recomputed_levels():
        output = qmodel(x)
    parameters = list(qmodel.parameters())
    return [output, *torch.autograd.grad(output.square().sum(), parameters)]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_regions_compute_the_same() -> None:
    qmodel, x = _prepared()
    gdnsq_fx.use_kernels(qmodel, "eager")
    wanted = _step(qmodel, x)
    gdnsq_fx.use_kernels(qmodel, "compile")
    found = _step(qmodel, x)
    assert torch.equal(found[0], wanted[0])
    for one, other in zip(found[1:], wanted[1:], strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_whole_model_is_one_graph_in_each_mode(estimator: Estimator) -> None:
    """As traced, without a C++ compiler; steps after the first compile nothing."""
    qmodel, x = _prepared(estimator)
    graphs: list[torch.fx.GraphModule] = []

    def counting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(qmodel, fullgraph=True, backend=counting)
    optimizer = torch.optim.SGD(qmodel.parameters(), lr=1e-3)
    for number, training in enumerate((False, True), start=1):
        qmodel.train(training)
        for _ in range(3):
            assert torch.equal(compiled(x), qmodel(x))
            optimizer.zero_grad()
            compiled(x).square().sum().backward()
            optimizer.step()
        assert len(graphs) == number


def test_weights_keep_their_layout() -> None:
    weight = torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last)
    low = weight.amin((1, 2, 3), keepdim=True)
    levels = quantize_weight(weight, torch.full_like(low, 0.1), low, (1, 2, 3), "lsq")
    assert levels.is_contiguous(memory_format=torch.channels_last)


class _Transposing(nn.Module):
    """Attention-like: quantized values whose strides are not those of their shape."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.conv = nn.Conv1d(6, 5, 3)
        self.conv.weight.data = self.conv.weight.data.transpose(1, 2).contiguous()
        self.conv.weight.data = self.conv.weight.data.transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x).view(len(x), 8, 2, 3).transpose(1, 2)
        y = (y @ y.transpose(2, 3)) @ y
        return self.conv(y.transpose(1, 2).reshape(len(x), 8, 6).transpose(1, 2))  # type: ignore[no-any-return]


def test_a_model_of_transposed_values_is_one_graph() -> None:
    """A compiler refuses ``out=`` in strides that are not the plain ones."""
    torch.manual_seed(0)
    x = torch.randn(3, 8, 6)
    qmodel = gdnsq_fx.prepare(
        _Transposing(), x, gdnsq_fx.QuantConfig(3, 3), [x]
    ).train()
    torch._dynamo.reset()
    compiled = torch.compile(qmodel, fullgraph=True, backend="aot_eager")
    parameters = list(qmodel.parameters())
    wanted = torch.autograd.grad(qmodel(x).square().sum(), parameters)
    found = torch.autograd.grad(compiled(x).square().sum(), parameters)
    assert torch.equal(compiled(x), qmodel(x))
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)
