"""Kernels in C: the levels and gradients of torch, and what is left to it."""

from __future__ import annotations

import logging
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
from gdnsq_fx.quantize.extremes import extremes_of
from gdnsq_fx.quantize.functions import quantize_activation, quantize_weight
from gdnsq_fx.quantize.kernels import (
    chosen_kernels,
    chosen_row_kernels,
    chosen_scale_kernels,
)
from gdnsq_fx.quantize.weight_quantizer import WeightQuantizer
from gdnsq_fx.spec import Offset, QuantSpec

needs_compiler = pytest.mark.skipif(
    native_library.library() is None, reason="needs a C compiler"
)
# Around the length of a piece, and of a vector register.
LENGTHS = st.sampled_from([1, 7, 33, 4095, 4096, 4097, 9000])
SPECIAL = [0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-42, 3e38, -3e38]


def _values(length: int, seed: int, *, special: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(length, generator=generator)
    if special:
        values[: len(SPECIAL)] = torch.tensor(SPECIAL)[:length]
    return values


def _scalars(bits: int, lower: float | None) -> list[Tensor | None]:
    step = torch.tensor(0.37)
    return [step, step * 2**bits, None if lower is None else torch.tensor(lower)]


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
    scalars: Any = _scalars(bits, -0.61 if signed else None)
    assert chosen_kernels("auto", x, *scalars) == "native"
    found = native.activation_levels(x, *scalars)
    assert _same(found, levels.activation_levels(x, *scalars))


@needs_compiler
@given(LENGTHS, st.integers(1, 5), st.integers(0, 2**31), st.booleans())
@settings(max_examples=100, deadline=None)
def test_levels_of_weights_are_the_same(
    length: int, rows: int, seed: int, bounded: bool
) -> None:
    weight = _values(rows * length, seed, special=True).view(rows, length)
    step = torch.linspace(0.1, 0.9, rows).view(rows, 1)
    top = torch.full_like(step, 3.0) if bounded else None
    grid = step, weight.nan_to_num(0.0, 9.0, -9.0).amin(1, keepdim=True), top
    assert chosen_row_kernels("auto", weight, *grid) == "native"
    assert _same(
        native.weight_levels(weight, *grid), levels.weight_levels(weight, *grid)
    )


@needs_compiler
@given(LENGTHS, st.integers(0, 2**31), st.integers(1, 6), st.booleans())
@settings(max_examples=100, deadline=None)
def test_gradients_of_activations_are_the_formulas(
    length: int, seed: int, bits: int, signed: bool
) -> None:
    x, gradient = _values(2 * length, seed).view(2, length)
    x = x if signed else x.abs()
    scalars: Any = _scalars(bits, -0.61 if signed else None)
    leaves = [t if t is None else t.clone().requires_grad_() for t in (x, *scalars)]
    with gdnsq_fx.recomputed_levels():
        made: Any = quantize_activation(*leaves, "lsq", "native")  # type: ignore[arg-type]
    learned = [leaf for leaf in leaves if leaf is not None]
    found = torch.autograd.grad(made, learned, gradient)
    wanted = traced_gradients.activation_gradients(x, gradient, *scalars, "lsq")
    _assert_close(found, wanted[: len(found)], length)


@needs_compiler
@given(LENGTHS, st.integers(1, 5), st.integers(0, 2**31))
@settings(max_examples=100, deadline=None)
def test_gradients_of_weights_are_the_formulas(
    length: int, rows: int, seed: int
) -> None:
    weight, gradient = _values(2 * rows * length, seed).view(2, rows, length)
    step = torch.linspace(0.1, 0.9, rows).view(rows, 1).requires_grad_()
    lower = weight.amin(1, keepdim=True)
    leaf = weight.clone().requires_grad_()
    made = quantize_weight(leaf, step, lower, (1,), "lsq", None, "native")
    found = torch.autograd.grad(made, (leaf, step), gradient)
    wanted = traced_gradients.weight_gradients(
        weight, gradient, step.detach(), lower, (1,), "lsq"
    )
    _assert_close(found, wanted, length)


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
    found = []
    for kernels in ("native", "eager"):
        activation.kernels = weight.kernels = kernels  # type: ignore[assignment]
        offset_found = activation.offset
        (slope,) = torch.autograd.grad(offset_found, activation.lower)
        found.append([offset_found, slope, *weight._grid(values)])
    assert all(map(torch.equal, *found))


@needs_compiler
def test_infinite_inputs_are_clamped() -> None:
    x = torch.tensor([0.3, torch.inf, -torch.inf], requires_grad=True)
    leaves = [x, torch.tensor(0.1, requires_grad=True), torch.tensor(1.6)]
    made = quantize_activation(*leaves, torch.tensor(-0.5), "lsq", "native")
    by_x, by_step = torch.autograd.grad(made.sum(), leaves[:2])
    assert by_x.tolist() == [1.0, 0.0, 0.0]
    assert by_step.isfinite()


@needs_compiler
def test_layouts_are_kept_and_a_gradient_of_another_is_taken() -> None:
    plain = torch.randn(2, 3, 4, 5)
    scalars: Any = _scalars(3, -0.61)
    wanted = []
    for x in (plain, plain.to(memory_format=torch.channels_last)):
        leaf = x.clone().requires_grad_()
        made = quantize_activation(leaf, *scalars, "lsq", "native")
        assert made.stride() == x.stride()
        gradient = torch.arange(120.0).view(2, 3, 4, 5)
        wanted.append((made, *torch.autograd.grad(made, leaf, gradient)))
        assert wanted[-1][1].stride() == x.stride()
    assert all(map(torch.equal, *wanted))


@needs_compiler
def test_parts_of_a_tensor_and_repeated_values_are_copied() -> None:
    scalars: Any = _scalars(3, -0.61)
    whole = torch.randn(4, 5, 6)
    for x in (whole[:, 1:3], whole.unbind(1)[2].t(), whole[:1].expand(3, 5, 6)):
        found = []
        for kernels in ("native", "eager"):
            leaf = x.detach().requires_grad_()
            made = quantize_activation(leaf, *scalars, "lsq", kernels)  # type: ignore[arg-type]
            gradient = torch.arange(float(x.numel())).view(x.shape)
            found.append((made, *torch.autograd.grad(made, leaf, gradient)))
        assert all(map(torch.equal, *found))


@needs_compiler
def test_channels_that_are_no_rows_of_memory_are_left_to_torch() -> None:
    weight = torch.randn(3, 4, 5)
    second = torch.full((1, 4, 1), 0.2)
    first = torch.full((3, 1, 1), 0.2)
    assert chosen_row_kernels("native", weight, first, first, None) == "native"
    assert chosen_row_kernels("native", weight, second, second, None) == "eager"


@needs_compiler
def test_what_the_kernels_cannot_read_is_left_to_torch() -> None:
    scalars: Any = _scalars(3, None)
    x = torch.rand(4, 6)
    for other in (x.half(), x.double(), torch.empty(0), x.to("meta")):
        assert chosen_kernels("native", other, *scalars) == "eager"
    imaginary = torch.complex(x, x).conj().imag  # a sign that memory does not show
    assert chosen_kernels("native", imaginary, *scalars) == "eager"
    wide = [None if s is None else s.double() for s in scalars]
    assert chosen_kernels("native", x, *wide) == "eager"
    assert chosen_kernels("eager", x, *scalars) == "eager"


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
    scalars: Any = _scalars(3, -0.61)

    def quantized(x: Tensor) -> Tensor:
        return quantize_activation(x, *scalars, "lsq", "native")

    x, other = torch.randn(2, 5, 7)
    traced = torch.jit.trace(quantized, x, check_trace=False)
    assert torch.equal(traced(other), quantized(other))
    with _Noting() as noting:
        quantized(x)
    assert "div" in noting.names or "div_" in noting.names


@needs_compiler
def test_sums_do_not_depend_on_the_number_of_threads() -> None:
    x = _values(50_000, 3).requires_grad_()
    step = torch.tensor(0.37, requires_grad=True)
    gradient = _values(50_000, 4)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            made = quantize_activation(
                x, step, step * 8, torch.tensor(-0.61), "lsq", "native"
            )
            found.append((made, *torch.autograd.grad(made, (x, step), gradient)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@needs_compiler
@pytest.mark.parametrize("shape", [(3, 5), (4, 2, 9, 9), (2, 6000)])
def test_extremes_are_those_of_torch(shape: tuple[int, ...]) -> None:
    weight, dims = torch.randn(shape), tuple(range(1, len(shape)))
    weight[1].view(-1)[0] = torch.nan
    found, wanted = (extremes_of(weight, dims, one) for one in ("native", "eager"))
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
    x, step = torch.randn(5000, requires_grad=True), torch.tensor(0.37).requires_grad_()
    scalars = step, torch.tensor(2.96), torch.tensor(-0.61)
    gradient, weight = torch.randn(5000), torch.randn(3, 5)
    found = []
    before = torch.get_default_dtype()
    try:
        for default in (before, dtype):
            torch.set_default_dtype(default)
            native_library.library.cache_clear()
            made = quantize_activation(x, *scalars, "lsq", "native")
            grads = torch.autograd.grad(made, (x, step), gradient)
            found.append((made, *grads, *extremes_of(weight, (1,), "native")[:2]))
            assert native_library.library() is not None
    finally:
        torch.set_default_dtype(before)
    assert all(map(torch.equal, *found))


@needs_compiler
def test_a_range_that_is_no_number_leaves_no_level() -> None:
    x, nan = torch.rand(9), torch.tensor(torch.nan)
    for scalars in ((torch.tensor(0.3), nan), (nan, torch.tensor(2.0))):
        for lower in (None, torch.tensor(-0.6)):
            found = native.activation_levels(x, *scalars, lower)
            assert found.isnan().all()


@needs_compiler
def test_scales_of_other_sizes_are_left_to_torch() -> None:
    weight, step = torch.randn(4, 6), torch.full((4, 1), 0.2)
    one = torch.zeros(1, 1)
    assert chosen_row_kernels("native", weight, step, one, None) == "eager"
    assert chosen_kernels("native", weight, step, step, None) == "eager"
    crossed = torch.randn(3, 2).t()
    assert chosen_scale_kernels("native", crossed, crossed) == "eager"


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_quantizes_too() -> None:
    """In a process of its own, which has a team of threads before it forks."""
    program = """
import os, torch
from gdnsq_fx.quantize.native import activation_levels
torch.set_num_threads(2)
scalars = torch.tensor(0.1), torch.tensor(1.6), None
activation_levels(torch.rand(10), *scalars)
child = os.fork()
activation_levels(torch.rand(10), *scalars)
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
    x, scalars = torch.rand(5), _scalars(3, None)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            assert chosen_kernels("auto", x, *scalars) == "eager"
    (record,) = caplog.records
    assert "eager kernels" in record.getMessage()


@needs_compiler
@pytest.mark.usefixtures("asked_again")
def test_a_compiler_that_computes_otherwise_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    flags = (*native_library._FLAGS, "-Dnearbyintf=floorf")
    monkeypatch.setattr(native_library, "_FLAGS", flags)
    with caplog.at_level(logging.INFO):
        assert native_library.library() is None
    assert "other levels" in caplog.text
