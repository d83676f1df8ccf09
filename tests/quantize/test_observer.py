"""What calibration sees, and the range it chooses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from gdnsq_fx.errors import CalibrationError
from gdnsq_fx.quantize.activation_quantizer import ActivationQuantizer
from gdnsq_fx.quantize.observer import SAMPLE_SIZE, Observer, _squared_errors
from gdnsq_fx.spec import QuantSpec


def _observer(*batches: Tensor) -> Observer:
    observer = Observer("layer.input")
    for batch in batches:
        observer.add(batch)
    return observer


def _placed(
    *batches: Tensor, bits: int = 2, nonnegative: bool = False
) -> ActivationQuantizer:
    spec = QuantSpec(bits, offset="free")
    quantizer = ActivationQuantizer("layer.input", spec, nonnegative=nonnegative)
    _observer(*batches).place(quantizer)
    return quantizer


def _error(quantizer: ActivationQuantizer, values: Tensor) -> float:
    return float((quantizer(values) - values).square().mean().detach())


def test_extremes_over_all_batches() -> None:
    quantizer = _placed(torch.tensor([1.0, -2.0]), torch.tensor([[5.0], [0.0]]))
    assert quantizer.observed.tolist() == [-2.0, 5.0]


def test_even_levels_are_found_exactly() -> None:
    values = torch.tensor([-1.0, 0.0, 1.0, 2.0]).repeat(50)
    quantizer = _placed(values)
    assert torch.allclose(quantizer(values), values, atol=1e-6)
    assert quantizer.levels() == 4


def test_outliers_are_clipped_where_that_errs_less() -> None:
    values = torch.randn(20000, generator=torch.Generator().manual_seed(0))
    values[0] = 50.0
    quantizer = _placed(values, bits=4)
    assert quantizer.observed[1].item() == 50.0
    full = ActivationQuantizer("full", quantizer.spec, nonnegative=False)
    full.cover(float(values.min()), 50.0, 4)
    assert _error(quantizer, values) < 0.25 * _error(full, values)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_chosen_range_is_never_worse_than_the_full_one(bits: int) -> None:
    values = torch.randn(5000, generator=torch.Generator().manual_seed(1))
    quantizer = _placed(values, bits=bits)
    full = ActivationQuantizer("full", quantizer.spec, nonnegative=False)
    full.cover(float(values.min()), float(values.max()), bits)
    assert _error(quantizer, values) <= _error(full, values) * (1 + 1e-5)


@pytest.mark.parametrize("bits", [1, 2, 5, 8])
def test_errors_of_all_ranges_equal_those_value_by_value(bits: int) -> None:
    values = torch.randn(3000, generator=torch.Generator().manual_seed(bits)).double()
    levels = torch.stack([torch.linspace(-s, 2 * s, 2**bits) for s in (0.1, 1, 3)])
    errors = _squared_errors(values.sort().values, levels.double())
    distances = (values[:, None, None] - levels.double()).abs().amin(2)
    torch.testing.assert_close(errors, distances.square().sum(0))


def test_nonnegative_values_start_at_zero() -> None:
    quantizer = _placed(torch.tensor([1.0, 2.0, 3.0]), nonnegative=True)
    assert quantizer.offset.item() == 0.0
    assert quantizer(torch.tensor([0.0, 3.0])).tolist() == pytest.approx([0.0, 3.0])


@pytest.mark.parametrize("value", [0.0, 2.5, -2.5])
@pytest.mark.parametrize("bits", [1, 2, 8])
def test_constant_values_are_kept(value: float, bits: int) -> None:
    values = torch.full((10,), value)
    assert torch.allclose(_placed(values, bits=bits)(values), values, rtol=1e-5)


def test_sample_is_bounded_and_still_even() -> None:
    observer = Observer("layer.input")
    for part in torch.linspace(0.0, 1.0, 40 * 10_000).split(10_000):
        observer.add(part)
    sample = observer._sample
    assert sample.numel() <= SAMPLE_SIZE
    # Every tenth of the stream is represented about equally.
    counts = torch.histc(sample, bins=10, min=0.0, max=1.0) / sample.numel()
    assert counts.min() > 0.05 and counts.max() < 0.2


@pytest.mark.parametrize("width", [32, 64, 96, 768])
def test_sample_sees_every_column(width: int) -> None:
    """A stride with a common factor of the width would see some features only."""
    columns = torch.arange(width, dtype=torch.float32)
    observer = _observer(*[columns.repeat(200_000 // width, 1) for _ in range(10)])
    seen = torch.bincount(observer._sample.long(), minlength=width).double()
    assert (seen > 0).all(), f"{int((seen == 0).sum())} of {width} columns never seen"
    assert seen.max() < 3 * seen.mean()


def test_range_fits_all_features_of_a_long_stream() -> None:
    """One wide feature of 64: choosing by the narrow ones would clip it away."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(4096, 64, generator=generator) for _ in range(20)]
    for batch in batches:
        batch[:, 1:] *= 20.0
    every = torch.cat(batches)
    quantizer = _placed(*batches, bits=4)
    few = _placed(every.reshape(-1)[torch.randperm(every.numel())[:60_000]], bits=4)
    assert _error(quantizer, every) < 1.2 * _error(few, every)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_not_finite_values_are_an_error_that_names_the_edge(bad: float) -> None:
    for others in (1.0, -math.inf):
        with pytest.raises(CalibrationError, match=r"layer\.input"):
            _observer(torch.tensor([others, bad]))


@pytest.mark.parametrize("lowest", [-math.inf, torch.finfo(torch.float32).min])
def test_a_mask_is_noted_and_leaves_the_range_alone(lowest: float) -> None:
    observer = _observer(torch.tensor([-1.0, 2.0]), torch.tensor([0.0, lowest]))
    assert observer.is_mask
    assert (observer.low, observer.high) == (-1.0, 2.0)


def test_nothing_seen_is_an_error_that_names_the_edge() -> None:
    with pytest.raises(CalibrationError, match=r"layer\.input"):
        _placed()
    with pytest.raises(CalibrationError, match=r"layer\.input"):
        _placed(torch.empty(0, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_floating_dtype(dtype: torch.dtype) -> None:
    quantizer = _placed(torch.tensor([-1.0, 0.0, 1.0, 2.0]).to(dtype))
    assert quantizer.observed.tolist() == [-1.0, 2.0]


def test_hook_sees_the_input_of_a_module() -> None:
    observer, layer = Observer("layer.input"), nn.Identity()
    handle = layer.register_forward_pre_hook(observer.hook)
    layer(torch.tensor([3.0, 4.0]))
    handle.remove()
    assert (observer.low, observer.high) == (3.0, 4.0)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_levels_off_a_lattice_still_reach_all_of_it(sign: float) -> None:
    values = sign * (100.0 + torch.arange(7.0).repeat(50) / 6.0)
    quantizer = _placed(values)
    worst = float((quantizer(values) - values).detach().abs().max())
    assert worst <= 0.51 * float(quantizer.step)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_levels_keep_off_the_midst_of_a_lattice(bits: int) -> None:
    """8/16 is midway between two of 256 levels over 0..1."""
    pixels = torch.arange(17.0).repeat(50) / 16.0
    spec = QuantSpec(bits, "lsq", "half_step")
    quantizer = ActivationQuantizer("x", spec, nonnegative=True)
    observer = Observer("x")
    observer.add(pixels)
    observer.place(quantizer)
    step = quantizer.step.detach()
    places = pixels / step
    inside = places < quantizer.levels() - 1
    assert float((((places % 1.0) - 0.5).abs() < 1e-4)[inside].float().sum()) == 0.0
    bytes_ = torch.arange(256.0) / 255.0
    observer = Observer("x")
    observer.add(bytes_)
    observer.place(quantizer)
    if bits == 8:  # uint8 images stay exact
        torch.testing.assert_close(quantizer.quantize(bytes_).detach(), bytes_)
