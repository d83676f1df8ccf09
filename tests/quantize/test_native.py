"""Kernels in C: the levels and gradients of torch, and what is left to it."""

from __future__ import annotations

import logging
import math
import os
import subprocess
import sys
from collections.abc import Generator
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import gdnsq_fx
from gdnsq_fx.channels import ChannelLayout
from gdnsq_fx.quantize import levels, native, native_library, traced_gradients
from gdnsq_fx.quantize.activation_quantizer import ActivationQuantizer
from gdnsq_fx.quantize.extremes import extremes_of, native_extremes_of
from gdnsq_fx.quantize.kernels import Kernels, is_native, is_native_rows
from gdnsq_fx.quantize.native_functions import quantize_activation, quantize_weight
from gdnsq_fx.quantize.weight_quantizer import WeightQuantizer
from gdnsq_fx.sites import weight_sites
from gdnsq_fx.spec import Estimator, Offset, QuantSpec

needs_compiler = pytest.mark.skipif(
    native_library.library() is None, reason="needs a C compiler"
)
# Around the length of a piece, and of a vector register.
LENGTHS = st.sampled_from([1, 7, 33, 4095, 4096, 4097, 9000])
ESTIMATORS = st.sampled_from(get_args(Estimator))
SPECIAL = [0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-42, 3e38, -3e38]


def _values(length: int, seed: int, *, special: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(length, generator=generator)
    if special:
        values[: len(SPECIAL)] = torch.tensor(SPECIAL)[:length]
    return values


def _parameters(bits: int, lower: float | None) -> list[Tensor | None]:
    """Log2 of step and range, lowest level."""
    log2_step = torch.tensor(-1.43)
    return [log2_step, log2_step + bits, None if lower is None else torch.tensor(lower)]


def _grid(parameters: Any) -> Tensor:
    """Step and range, and the lowest level where there is one."""
    log2_step, log2_range, lower = parameters
    grid = [torch.exp2(log2_step), torch.exp2(log2_range), lower]
    return torch.stack([one for one in grid if one is not None])


def _quantized(x: Tensor, *parameters: Any) -> Tensor:
    return quantize_activation(x, *parameters, "free", "lsq")


def _same(one: Tensor, other: Tensor) -> bool:
    """Equal, NaN included."""
    return torch.allclose(one, other, rtol=0.0, atol=0.0, equal_nan=True)


@needs_compiler
@given(LENGTHS, st.integers(0, 2**31), st.integers(1, 16), st.booleans())
@settings(max_examples=100, deadline=None)
def test_levels_of_activations_are_the_same(
    length: int, seed: int, bits: int, signed: bool
) -> None:
    x = _values(length, seed, special=True)
    parameters = _parameters(bits, -0.61 if signed else None)
    assert is_native("auto", x, *parameters)
    grid = native.activation_grid(*parameters, "free")  # type: ignore[arg-type]
    assert torch.equal(grid, _grid(parameters))
    found, lower = native.activation_levels(x, grid), parameters[2]
    assert _same(found, levels.activation_levels(x, *grid[:2].unbind(), lower))


@needs_compiler
@given(LENGTHS, st.integers(1, 5), st.integers(0, 2**31), st.booleans())
@settings(max_examples=100, deadline=None)
def test_levels_of_weights_are_the_same(
    length: int, rows: int, seed: int, bounded: bool
) -> None:
    weight = _values(rows * length, seed, special=True).view(rows, length)
    step = torch.linspace(0.1, 0.9, rows).view(rows, 1)
    top = torch.full_like(step, 3.0 if bounded else torch.inf)
    grid = step, weight.nan_to_num(0.0, 9.0, -9.0).amin(1, keepdim=True), top
    assert is_native_rows("auto", weight, step)
    assert _same(
        native.weight_levels(weight, *grid), levels.weight_levels(weight, *grid)
    )


@needs_compiler
@given(LENGTHS, st.integers(0, 2**31), st.integers(1, 6), st.booleans(), ESTIMATORS)
@settings(max_examples=150, deadline=None)
def test_gradients_of_activations_are_the_formulas(
    length: int, seed: int, bits: int, signed: bool, estimator: Estimator
) -> None:
    x, gradient = _values(2 * length, seed).view(2, length)
    x = x if signed else x.abs()
    parameters = _parameters(bits, -0.61 if signed else None)
    leaves: Any = [t if t is None else t.clone() for t in (x, *parameters)]
    learned = [leaf.requires_grad_() for leaf in leaves if leaf is not None]
    with gdnsq_fx.recomputed_levels():
        made = quantize_activation(*leaves, "free", estimator)
    torch.manual_seed(seed)
    found = torch.autograd.grad(made, learned, gradient)
    step, range_, *_ = _grid(parameters).unbind()
    torch.manual_seed(seed)
    by_x, by_step, by_range, by_lower = traced_gradients.activation_gradients(
        x, gradient, step, range_, parameters[2], estimator
    )
    by_logs = by_step * step * math.log(2.0), by_range * range_ * math.log(2.0)
    _assert_close(found, (by_x, *by_logs, by_lower)[: len(found)], length)


@needs_compiler
@given(LENGTHS, st.integers(1, 5), st.integers(0, 2**31), ESTIMATORS)
@settings(max_examples=150, deadline=None)
def test_gradients_of_weights_are_the_formulas(
    length: int, rows: int, seed: int, estimator: Estimator
) -> None:
    weight, gradient = _values(2 * rows * length, seed).view(2, rows, length)
    log2_step = torch.linspace(-3.0, -0.1, rows).view(rows, 1).requires_grad_()
    step, lower = torch.exp2(log2_step).detach(), weight.amin(1, keepdim=True)
    grid = step, lower, torch.full_like(step, torch.inf)
    leaf = weight.clone().requires_grad_()
    made = quantize_weight(leaf, log2_step, grid, ChannelLayout(axis=0), estimator)
    torch.manual_seed(seed)
    found = torch.autograd.grad(made, (leaf, log2_step), gradient)
    torch.manual_seed(seed)
    by_weight, by_step = traced_gradients.weight_gradients(
        weight, gradient, step, lower, (1,), estimator
    )
    _assert_close(found, (by_weight, by_step * step * math.log(2.0)), length)


def _assert_close(found: Any, wanted: Any, length: int) -> None:
    for one, other in zip(found, wanted, strict=True):
        spread = 1e-6 * length  # sums of so many rounded terms
        torch.testing.assert_close(one, other, rtol=1e-4, atol=spread)


@needs_compiler
@given(
    low=st.floats(-50.0, 50.0, width=32),
    span=st.floats(0.0, 90.0, width=32),
    step=st.floats(2**-10, 8.0, width=32),
    bits=st.integers(1, 8),
    offset=st.sampled_from(get_args(Offset)),
)
@settings(max_examples=300, deadline=None)
def test_grids_are_the_same(
    low: float, span: float, step: float, bits: int, offset: Offset
) -> None:
    spec = QuantSpec(bits, "lsq", offset)
    activation = ActivationQuantizer("x", spec, nonnegative=False)
    values = torch.tensor([[low, low + span], [low, low]])
    weight = WeightQuantizer("w", spec, ChannelLayout(axis=0), values)
    with torch.no_grad():
        activation.lower.fill_(low)
        activation.log2_step.fill_(step).log2_()
        weight.log2_step.fill_(step).log2_()
    parameters = activation.log2_step, activation.log2_range, activation.lower
    mode = activation.offset_mode
    found = native.activation_grid(*parameters, mode)
    wanted = [activation.step, activation.range, activation.offset]
    assert _same(found, torch.stack(wanted).detach())  # the range was never set
    assert all(map(torch.equal, weight._native_grid(values), weight._grid(values)))


@needs_compiler
def test_infinite_inputs_are_clamped() -> None:
    x = torch.tensor([0.3, torch.inf, -torch.inf], requires_grad=True)
    leaves = [x, torch.tensor(-3.3, requires_grad=True), torch.tensor(0.7)]
    made = _quantized(*leaves, torch.tensor(-0.5))
    by_x, by_step = torch.autograd.grad(made.sum(), leaves[:2])
    assert by_x.tolist() == [1.0, 0.0, 0.0]
    assert by_step.isfinite()


@needs_compiler
def test_layouts_are_kept_and_a_gradient_of_another_is_taken() -> None:
    plain = torch.randn(2, 3, 4, 5)
    parameters = _parameters(3, -0.61)
    wanted = []
    for x in (plain, plain.to(memory_format=torch.channels_last)):
        leaf = x.clone().requires_grad_()
        made = _quantized(leaf, *parameters)
        assert made.stride() == x.stride()
        gradient = torch.arange(120.0).view(2, 3, 4, 5)
        wanted.append((made, *torch.autograd.grad(made, leaf, gradient)))
        assert wanted[-1][1].stride() == x.stride()
    assert all(map(torch.equal, *wanted))


@needs_compiler
def test_parts_of_a_tensor_and_repeated_values_are_read() -> None:
    quantizer = ActivationQuantizer("x", QuantSpec(3, "lsq"), nonnegative=False)
    quantizer.cover(-0.61, 2.2, 3.0)
    whole, fused = torch.randn(4, 5, 6), torch.randn(2, 5, 3, 4, 6)
    heads = fused.permute(2, 0, 3, 1, 4)[1]  # rows of 24, 72 apart
    parts = whole[:, 1:3], whole[..., :2], whole.unbind(1)[2].t(), whole.unbind(2)[1]
    for x in (heads, *parts, whole[:1].expand(3, 5, 6)):
        found: list[Any] = []
        for kernels in get_args(Kernels)[1:3]:
            quantizer.kernels = kernels
            leaf = x.detach().requires_grad_()
            made = quantizer(leaf)
            gradient = torch.arange(float(x.numel())).view(x.shape)
            learned = (leaf, *quantizer.parameters())
            found.append((made, *torch.autograd.grad(made, learned, gradient)))
        assert torch.equal(found[0][0], found[1][0])
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-4)


@needs_compiler
def test_channels_that_are_no_rows_of_memory_are_left_to_torch() -> None:
    weight = torch.randn(3, 4, 5)
    second = torch.full((1, 4, 1), 0.2)
    first = torch.full((3, 1, 1), 0.2)
    assert is_native_rows("native", weight, first)
    assert not is_native_rows("native", weight, second)


@needs_compiler
@pytest.mark.parametrize(
    "layer", [nn.ConvTranspose2d(8, 8, 3, groups=8), nn.ConvTranspose2d(8, 1, 3)]
)
def test_one_channel_of_a_group_has_rows_in_every_layout(layer: nn.Module) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), layer)
    x = torch.randn(2, 3, 9, 9)
    config = gdnsq_fx.QuantConfig(3, 3, first_last=None)
    qmodel = gdnsq_fx.prepare(model, x, config, [x]).train()
    parameters, found = list(qmodel.parameters()), []
    for kernels in get_args(Kernels)[1:3]:
        gdnsq_fx.use_kernels(qmodel, kernels)
        output = qmodel(x).square().sum()
        sites = weight_sites(qmodel)
        capacity = sum(s.quantizer.capacity(s.weight()).sum() for s in sites)
        found.append(torch.autograd.grad(output + capacity, parameters))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@needs_compiler
def test_what_the_kernels_cannot_read_is_left_to_torch() -> None:
    parameters = _parameters(3, None)
    x = torch.rand(4, 6)
    imaginary = torch.complex(x, x).conj().imag  # a sign that memory does not show
    for other in (x.half(), x.double(), torch.empty(0), x.to("meta"), imaginary):
        assert not is_native("native", other, *parameters)
    wide = [None if s is None else s.double() for s in parameters]
    assert not is_native("native", x, *wide)
    assert not is_native("eager", x, *parameters)


class _Noting(TorchDispatchMode):
    """Notes the operations that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@needs_compiler
def test_who_watches_operations_sees_those_of_torch() -> None:
    quantizer = ActivationQuantizer("x", QuantSpec(3, "lsq"), nonnegative=False)
    quantizer.cover(-0.61, 2.2, 3.0)
    x, other = torch.randn(2, 5, 7)
    traced = torch.jit.trace(quantizer, x, check_trace=False)
    assert torch.equal(traced(other), quantizer(other))
    with _Noting() as noting:
        quantizer(x)
    assert "div" in noting.names or "div_" in noting.names


@needs_compiler
def test_sums_do_not_depend_on_the_number_of_threads() -> None:
    x = _values(50_000, 3).requires_grad_()
    log2_step = torch.tensor(-1.43, requires_grad=True)
    gradient = _values(50_000, 4)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            made = _quantized(x, log2_step, torch.tensor(1.57), torch.tensor(-0.61))
            found.append((made, *torch.autograd.grad(made, (x, log2_step), gradient)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@needs_compiler
@pytest.mark.parametrize("shape", [(3, 5), (3, 2, 9, 9), (3, 6000)])
def test_extremes_are_those_of_torch(shape: tuple[int, ...]) -> None:
    weight, dims = torch.randn(shape), tuple(range(1, len(shape)))
    weight[1].view(-1)[0] = torch.nan
    found = native_extremes_of(weight, weight.new_ones([3, 1, 1, 1][: weight.ndim]))
    wanted = extremes_of(weight, dims)
    for one, other in zip(found[:2], wanted[:2], strict=True):
        assert one.shape == other.shape
        assert _same(one, other)
    assert found[2] is not None and wanted[2] is not None
    assert _same(found[2].lows, wanted[2].lows)


@needs_compiler
def test_a_step_of_a_model_is_that_of_eager_kernels() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)
    )
    x = torch.randn(2, 3, 9, 9)
    config = gdnsq_fx.QuantConfig(3, 3, first_last=None)
    qmodel = gdnsq_fx.prepare(model, x, config, [x]).train()
    parameters, found = list(qmodel.parameters()), []
    for kernels in ("eager", "native"):
        gdnsq_fx.use_kernels(qmodel, kernels)  # type: ignore[arg-type]
        with gdnsq_fx.recomputed_levels():
            output = qmodel(x)
        found.append([output, *torch.autograd.grad(output.square().sum(), parameters)])
    assert torch.equal(found[0][0], found[1][0])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_default_dtype_changes_nothing(dtype: torch.dtype) -> None:
    x, gradient = torch.randn(5000, requires_grad=True), torch.randn(5000)
    log2_step = torch.tensor(-1.43, requires_grad=True)
    parameters = log2_step, torch.tensor(1.57), torch.tensor(-0.61)
    weight, step = torch.randn(3, 5), torch.ones(3, 1)
    found = []
    before = torch.get_default_dtype()
    try:
        for default in (before, dtype):
            torch.set_default_dtype(default)
            native_library.library.cache_clear()
            made = _quantized(x, *parameters)
            grads = torch.autograd.grad(made, (x, log2_step), gradient)
            found.append((made, *grads, *native_extremes_of(weight, step)[:2]))
            assert native_library.library() is not None
    finally:
        torch.set_default_dtype(before)
    assert all(map(torch.equal, *found))


@needs_compiler
def test_a_range_that_is_no_number_leaves_no_level() -> None:
    x, nan = torch.rand(9), torch.tensor(torch.nan)
    for logs in ((torch.tensor(-1.7), nan), (nan, torch.tensor(1.0))):
        for lower in (None, torch.tensor(-0.6)):
            assert _quantized(x, *logs, lower).isnan().all()


@needs_compiler
def test_scales_of_other_sizes_are_left_to_torch() -> None:
    weight, step = torch.randn(4, 6), torch.full((4, 1), 0.2)
    assert not is_native("native", weight, step, step, None)
    assert not is_native_rows("native", weight, torch.ones(8, 1)[::2])


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_quantizes_too() -> None:
    """In a process of its own, which has a team of threads before it forks."""
    program = """
import os, torch
from gdnsq_fx.quantize.native import activation_levels
torch.set_num_threads(2)
grid = torch.tensor([0.1, 1.6])
activation_levels(torch.rand(10), grid)
child = os.fork()
activation_levels(torch.rand(10), grid)
if child:
    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


@pytest.fixture
def asked_again() -> Generator[None]:
    """Whether there is a compiler is found out anew, before and after."""
    native_library.library.cache_clear()
    yield
    native_library.library.cache_clear()


@pytest.mark.usefixtures("asked_again")
@pytest.mark.parametrize(
    "command", ["no-such-compiler", "false", '"', "cc -fvisibility=hidden"]
)
def test_without_a_compiler_eager_kernels_and_one_line_of_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, command: str
) -> None:
    monkeypatch.setenv("CC", command)
    x, parameters = torch.rand(5), _parameters(3, None)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            assert not is_native("auto", x, *parameters)
    (record,) = caplog.records
    assert "eager kernels" in record.getMessage()


@needs_compiler
@pytest.mark.usefixtures("asked_again")
@pytest.mark.parametrize("other", ["-Dnearbyintf=floorf", "-Dexp2f=expf"])
def test_a_compiler_that_computes_otherwise_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, other: str
) -> None:
    flags = (*native_library._FLAGS, other)
    monkeypatch.setattr(native_library, "_FLAGS", flags)
    with caplog.at_level(logging.INFO):
        assert native_library.library() is None
    assert "other levels" in caplog.text
