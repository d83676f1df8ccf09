"""Block by block computes what the whole computes, whatever the layout in memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gdnsq_fx.quantize import blocks as blocks_module
from gdnsq_fx.quantize import clamp, gradients
from gdnsq_fx.quantize.blocks import blocks, is_dense
from gdnsq_fx.quantize.levels import activation_levels, clamped_codes, weight_levels

SHAPE = (6, 5, 4, 3)
LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.to(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced": lambda t: torch.cat([t, t], 3)[..., ::2],
    "expanded": lambda t: t[:1].expand(SHAPE),
    "half": lambda t: t.to(torch.bfloat16),
}


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS.keys())
def value(request: pytest.FixtureRequest) -> Tensor:
    drawn = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    laid_out: Tensor = request.param(drawn)
    return laid_out


@pytest.fixture(params=[1, 7, 64], ids=lambda size: f"{size} elements")
def small_blocks(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks_module, "BLOCK", request.param)
    monkeypatch.setattr(blocks_module, "FEW", 1)


def _scalars(*values: float) -> list[Tensor]:
    return [torch.tensor(v) for v in values]


def _per_channel(value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    low = value.float().amin((1, 2, 3), keepdim=True)
    step = torch.linspace(0.2, 0.4, len(value)).view_as(low)
    return step, low, torch.full_like(low, 7.0)


@pytest.mark.parametrize("lower", [None, -0.5])
def test_levels_and_codes(
    value: Tensor,
    lower: float | None,
    small_blocks: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step, range_ = _scalars(0.25, 2.0)
    bound = None if lower is None else torch.tensor(lower)
    per_channel = _per_channel(value)
    found = (
        activation_levels(value, step, range_, bound),
        clamped_codes(value, step, bound, torch.tensor(7.0)),
        weight_levels(value, *per_channel),
        clamped_codes(value, *per_channel),
    )
    monkeypatch.setattr(blocks_module, "FEW", 1 << 40)
    wanted = (
        activation_levels(value, step, range_, bound),
        clamped_codes(value, step, bound, torch.tensor(7.0)),
        weight_levels(value, *per_channel),
        clamped_codes(value, *per_channel),
    )
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other) and one.stride() == other.stride()


@pytest.mark.parametrize("lower", [None, -0.5])
@pytest.mark.parametrize("strides", ["alike", "plain"])
def test_gradients(
    value: Tensor,
    lower: float | None,
    strides: str,
    small_blocks: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    value = value.float()
    step, range_ = _scalars(0.25, 2.0)
    bound = None if lower is None else torch.tensor(lower)
    arriving = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    if strides == "alike":
        arriving = torch.empty_like(value).copy_(arriving)
    per_channel = _per_channel(value)

    def both() -> list[Tensor]:
        levels = activation_levels(value, step, range_, bound)
        activation = gradients.activation_gradients(
            value, levels, arriving, step, range_, bound, "lsq"
        )
        levels = weight_levels(value, *per_channel)
        weight = gradients.weight_gradients(
            value, levels, arriving, per_channel[0], (1, 2, 3), "lsq"
        )
        return [*activation, *weight]

    found = both()
    monkeypatch.setattr(blocks_module, "FEW", 1 << 40)
    for one, other in zip(found, both(), strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)


def test_blocks_cover_every_element_once(small_blocks: None) -> None:
    value = torch.zeros(SHAPE)
    scale = torch.arange(6.0).view(6, 1, 1, 1)
    count = 0
    for (part,), (rows, none) in blocks((value,), scale, None):
        part.add_(rows + 1.0)
        count += 1
        assert none is None
    assert count > 1
    assert torch.equal(value, (scale + 1.0).expand(SHAPE))


def test_what_fills_its_memory_is_dense() -> None:
    drawn = torch.zeros(SHAPE)
    dense = {name: is_dense(change(drawn)) for name, change in LAYOUTS.items()}
    assert [name for name, found in dense.items() if not found] == [
        "sliced",
        "expanded",
    ]


@pytest.mark.parametrize("lower", [None, -0.5])
def test_the_clamp_by_numbers_is_the_clamp_by_tensors(
    lower: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ends belong to the inside; what is infinite outside stays out."""
    step, range_ = _scalars(0.25, 2.0)
    bound = None if lower is None else torch.tensor(lower)
    low = 0.0 if lower is None else lower
    high = low + 1.75
    ends = torch.tensor([low, high])
    beyond = torch.nextafter(ends, torch.tensor([-1.0, 9.0]))
    x = torch.cat([ends, beyond, torch.tensor([torch.inf, -torch.inf, 0.3])])
    x = x if lower is not None else x[x >= 0.0]
    levels = activation_levels(x, step, range_, bound)
    arriving = torch.where(x.isinf(), torch.inf, torch.arange(1.0, len(x) + 1.0))

    def found() -> tuple[Tensor, ...]:
        return gradients.activation_gradients(
            x, levels.clone(), arriving, step, range_, bound, "lsq"
        )

    by_numbers = found()
    monkeypatch.setattr(clamp, "is_plain", lambda value: False)
    by_tensors = found()
    inside = (x >= low) & (x <= high)
    assert torch.equal(by_numbers[0], torch.where(inside, arriving, 0.0))
    for one, other in zip(by_numbers, by_tensors, strict=True):
        assert torch.allclose(one, other, equal_nan=True)
