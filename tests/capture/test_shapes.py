"""Arithmetic on shapes stays symbolic: the graph takes other sizes than the example."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdnsq_fx.capture.capture import capture


class _Apply(nn.Module):
    """Applies a function; has parameters for it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.pos = nn.Parameter(torch.randn(1, 16, 4))
        self.register_buffer("mask", torch.ones(16, 16).tril().bool()[None])
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(self, *args)


# --- sequences: (batch, length, 4) ------------------------------------------------


def _heads(m: Any, x: Tensor) -> Tensor:
    b, t, c = x.shape
    q = x.view(b, t, 2, c // 2).transpose(1, 2)
    scores = q @ q.transpose(-2, -1) * (c // 2) ** -0.5
    scores = scores.masked_fill(~m.mask[:, :t, :t], float("-inf"))
    return (scores.softmax(-1) @ q).transpose(1, 2).contiguous().view(b, t, -1)


def _buckets(m: Any, x: Tensor) -> Tensor:
    t = x.size(1)
    distance = torch.arange(t)[:, None] - torch.arange(t)[None, :]
    return m.pos[0, distance.abs().clamp(max=7)].mean(1) + x


def _sinusoids(m: Any, x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    rate = torch.exp(torch.arange(half, dtype=x.dtype) * -(math.log(10_000) / half))
    angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * rate[None]
    return x + torch.cat([angle.sin(), angle.cos()], dim=-1)


def _rotary(m: Any, x: Tensor) -> Tensor:
    b, t, c = x.shape
    angle = torch.outer(torch.arange(t).float(), 0.1 ** torch.arange(c // 2).float())
    turn = torch.polar(torch.ones_like(angle), angle)
    pairs = torch.view_as_complex(x.reshape(b, t, -1, 2))
    return torch.view_as_real(pairs * turn).flatten(2)


def _shifted(m: Any, x: Tensor) -> Tensor:
    out = torch.zeros(x.shape, dtype=x.dtype)
    out[:, 1:] = x[:, :-1]
    out[:, 0] = m.pos[:, x.shape[1] - 1]
    return out


def _chunks(m: Any, x: Tensor) -> Tensor:
    padded = F.pad(x, (0, 0, 0, -x.size(1) % 4))
    chunks = padded.reshape(x.size(0), math.ceil(x.size(1) / 4), 4, x.size(2))
    return (chunks - chunks.mean(2, keepdim=True)).flatten(1, 2)[:, : x.shape[1]]


_SEQUENCES: dict[str, Callable[..., Any]] = {
    "unpacked shape": lambda m, x: x.view(x.shape[0], -1),
    "positions": lambda m, x: x + m.pos[:, : x.size(1)],
    "scale": lambda m, x: m.fc(x) * x.size(-1) ** -0.5,
    "scale by length": lambda m, x: x.sum(1) / x.shape[1] + x.shape[1] ** 0.5,
    "arange": lambda m, x: m.pos[0][torch.arange(x.size(1))] + x,
    "arange steps": lambda m, x: x * torch.arange(0, 2 * x.size(1), 2)[:, None],
    "linspace": lambda m, x: x * torch.linspace(0, 1, x.shape[1])[None, :, None],
    "zeros": lambda m, x: torch.cat([torch.zeros(x.size(0), 1, x.size(2)), x], dim=1),
    "new_full": lambda m, x: x.new_full((x.size(0), x.size(1)), 2.0)[..., None] * x,
    "eye": lambda m, x: torch.eye(x.shape[1]) @ x,
    "random": lambda m, x: x + torch.rand(x.shape[0], x.shape[1], 1),
    "mask": lambda m, x: x.mean(-1) * m.mask[0, x.shape[1] - 1, : x.shape[1]],
    "last": lambda m, x: x[:, x.shape[1] - 1] + x[:, -1],
    "middle": lambda m, x: x[:, x.shape[1] // 2],
    "halves": lambda m, x: x[: x.shape[0] // 2].sum(0) + x[-(-x.size(0) // 2) :].sum(0),
    "expanded": lambda m, x: m.pos[:, :1].expand(x.shape[0], x.shape[1], -1) + x,
    "repeated": lambda m, x: m.pos[:, :2].repeat(x.size(0), 1, 1).flatten() * x.size(1),
    "broadcast": lambda m, x: torch.broadcast_to(m.pos[:, :1], x.shape) * x,
    "divmod": lambda m, x: x * divmod(x.shape[1], 3)[0] + x.shape[1] % 3,
    "rounded": lambda m, x: x * round(x.shape[1] / 4) + math.ceil(x.shape[1] / 4),
    "int": lambda m, x: x[:, : int(x.shape[1] * 0.5)],
    "float": lambda m, x: x / float(x.shape[1]),
    "float on the left": lambda m, x: x * (0.5 * x.shape[1]) + 1.0 / x.size(1),
    "length": lambda m, x: x.reshape(len(x), -1) * len(x[0]),
    "numpy": lambda m, x: x / np.sqrt(x.shape[-1]),
    "bits": lambda m, x: x * (x.shape[1] >> 1) + (x.shape[1] & 1),
    "strides": lambda m, x: x.as_strided(x.shape, x.stride()) * x.stride(1),
    "square root": lambda m, x: x * math.sqrt(x.shape[1]),
    "logarithm": lambda m, x: x * math.log(x.shape[1] + 1),
    "floor": lambda m, x: x * math.floor(x.shape[1] / 2.0),
    "min and max": lambda m, x: x[:, : min(x.shape[1], 16)] * max(x.shape[1], 2),
    "either of two": lambda m, x: x[:, : min(4, x.size(1))] * max([len(x), 3.0]),
    "product": lambda m, x: x.reshape(math.prod(x.shape[:2]), x.shape[-1]),
    "numel": lambda m, x: x.reshape(x.numel() // x.size(-1), -1),
    "shape and more": lambda m, x: x.reshape(*x.shape[:-1], 2, 2).sum(-1),
    "shape as list": lambda m, x: x.view([*list(x.shape[:2]), 2, 2]),
    "shape plus tuple": lambda m, x: torch.ones(x.shape[:2] + (1,)) * x,  # noqa: RUF005
    "of a result": lambda m, x: x.flatten(1) / x.flatten(1).shape[1],
    "tensor of a size": lambda m, x: x / torch.tensor(x.shape[1]),
    "tensor of sizes": lambda m, x: torch.tensor([x.shape[0], x.shape[1]]) * 2,
    "size in a tensor": lambda m, x: x * torch.full((1,), 0.5 * x.size(1)),
    "size as a number": lambda m, x: torch.add(x, x.shape[1], alpha=2),
    "unflatten": lambda m, x: x.flatten(0, 1).unflatten(0, (x.size(0), x.size(1))),
    "rows in a list": lambda m, x: torch.cat([torch.stack(list(x)), x]) * x.size(0),
    "rows along time": lambda m, x: torch.cat(x.unbind(1), dim=0) / len(x[0]),
    "chunks in a list": lambda m, x: (
        torch.stack([*x.split(1, dim=1)], 1) * x[:, -1:, None]
    ),
    "numbers returned": lambda m, x: (x, x.shape[1] * 2, x.size(0)),
    "shape returned": lambda m, x: (x, x.shape),
    "text": lambda m, x: {f"of {x.ndim}": x},
    "heads": _heads,
    "buckets": _buckets,
    "sinusoids": _sinusoids,
    "rotary": _rotary,
    "shifted": _shifted,
    "chunks": _chunks,
}


@pytest.mark.parametrize("case", _SEQUENCES)
def test_other_batches_and_lengths(case: str, same: Any) -> None:
    others = [(torch.randn(*shape, 4),) for shape in ((4, 6), (2, 9), (3, 5))]
    same(_Apply(_SEQUENCES[case]), torch.randn(2, 6, 4), others=others)


# --- images: (batch, 4, height, width) --------------------------------------------


def _window_partition(m: Any, x: Tensor) -> Tensor:
    """Windows of 2 x 2, shifted by one and merged again, as in Swin."""
    x = x.permute(0, 2, 3, 1)
    b, h, w, c = x.shape
    x = F.pad(x, (0, 0, 0, (2 - w % 2) % 2, 0, (2 - h % 2) % 2))
    _, tall, wide, _ = x.shape
    x = torch.roll(x, shifts=(-1, -1), dims=(1, 2))
    windows = x.view(b, tall // 2, 2, wide // 2, 2, c).transpose(2, 3)
    windows = m.fc(windows.reshape(-1, 4, c).softmax(dim=1))
    regions = torch.zeros(1, tall, wide, 1)
    for number, rows in enumerate((slice(0, -2), slice(-2, -1), slice(-1, None))):
        regions[:, rows, :, :] = number
    x = windows.view(-1, tall // 2, wide // 2, 2, 2, c).transpose(2, 3)
    x = x.reshape(b, tall, wide, -1) + regions
    return torch.roll(x, shifts=(1, 1), dims=(1, 2))[:, :h, :w, :].contiguous()


def _same_padding(m: Any, x: Tensor) -> Tensor:
    h, w = x.size()[-2:]
    tall = max((math.ceil(h / 2) - 1) * 2 + 3 - h, 0)
    wide = max((math.ceil(w / 2) - 1) * 2 + 3 - w, 0)
    x = F.pad(x, (wide // 2, wide - wide // 2, tall // 2, tall - tall // 2))
    return F.max_pool2d(x, 3, 2)


_IMAGES: dict[str, Callable[..., Any]] = {
    "flat": lambda m, x: x.flatten(2).transpose(1, 2) @ m.fc.weight,
    "view": lambda m, x: x.view(x.size(0), -1),
    "half": lambda m, x: x[:, :, : x.shape[2] // 2 * 2, : math.ceil(x.shape[3] / 2)],
    "area": lambda m, x: x.sum((2, 3)) / (x.shape[2] // 2 * x.shape[3]),
    "resized to input": lambda m, x: F.interpolate(
        F.avg_pool2d(x, 2), size=x.shape[-2:], mode="bilinear"
    ),
    "doubled": lambda m, x: F.interpolate(x, size=(2 * x.size(2), 2 * x.size(3))),
    "whole pool": lambda m, x: F.avg_pool2d(x, kernel_size=x.size()[2:]),
    "adaptive pool": lambda m, x: F.adaptive_avg_pool2d(x, (1, x.shape[3])),
    "grid": lambda m, x: torch.stack(
        torch.meshgrid(torch.arange(x.size(2)), torch.arange(x.size(3)), indexing="ij")
    ),
    "shuffled channels": lambda m, x: (
        x.view(x.size(0), 2, x.size(1) // 2, *x.shape[2:])
        .transpose(1, 2)
        .reshape(x.shape)
    ),
    "cropped": lambda m, x: x[..., 1 : x.shape[-2] - 1, 1 : x.shape[-1] - 1],
    "padding": _same_padding,
    "windows": _window_partition,
}


@pytest.mark.parametrize("case", _IMAGES)
def test_other_image_sizes(case: str, same: Any) -> None:
    others = [(torch.randn(b, 4, h, w),) for b, h, w in ((3, 6, 6), (1, 5, 8))]
    same(_Apply(_IMAGES[case]), torch.randn(2, 4, 6, 4), others=others)


def test_sizes_equal_by_chance_stay_apart(same: Any) -> None:
    """Batch, length and width are all 4 in the example."""
    case = _SEQUENCES["heads"]
    others = ((torch.randn(2, 7, 4),),)
    same(_Apply(case), torch.randn(4, 4, 4), others=others)


def test_a_batch_of_one(same: Any) -> None:
    captured = same(_Apply(_heads), torch.randn(1, 6, 4))
    assert captured(torch.randn(3, 5, 4)).shape == (3, 5, 4)


def test_a_shape_keeps_its_type() -> None:
    def typed(m: Any, x: Tensor) -> Tensor:
        b, _, c = x.shape
        assert isinstance(x.shape, torch.Size) and isinstance(b, int)
        assert isinstance(x.size(), torch.Size) and isinstance(b * c, int)
        assert isinstance(x, Tensor) and isinstance(m.fc(x), Tensor)
        return x.view(b, -1)

    captured = capture(_Apply(typed), (torch.randn(2, 6, 4),), {})
    assert captured(torch.randn(3, 5, 4)).shape == (3, 20)
