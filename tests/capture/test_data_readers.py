"""Functions that read data stay calls, so that other data take their own way."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Net(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(self.fc, *args)


def _signed(x: Tensor) -> Tensor:
    return x * 2.0 if x.sum() > 0 else x - 1.0


def _limited(x: Tensor) -> Tensor:
    return x.clamp(max=1.0) if x.abs().amax().item() > 1.0 else -x


def _resized(row: Tensor, width: Tensor) -> Tensor:
    size = max(int(width), 1)
    return F.interpolate(row[None, None], size=size)[0, 0].sum()


def _pasted(rows: Tensor, widths: Tensor) -> Tensor:
    """As the masks of detected objects are: one for each, as wide as its box."""
    done = [_resized(row, width) for row, width in zip(rows, widths, strict=True)]
    return torch.stack(done) if done else rows.new_zeros(0)


def _pairs(x: Tensor) -> tuple[Tensor, list[Tensor]]:
    kept = [row for row in x if bool(row[0] > 0)]
    return x.sum(), [torch.stack([*kept, x[0]]).sum(0)]


def _written(x: Tensor) -> Tensor:
    if bool(x[0, 0] > 0):
        x.mul_(3.0)
    return x + 1.0


# A loop that the example does not enter reads no data: some rows must be in it.
_X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).abs()
assert (_X[:, 0] > 0.5).any()
_READERS = {
    "branch": (lambda m, x: m(_signed(x) * 2.0), "_signed"),
    "item": (lambda m, x: m(_limited(x)), "_limited"),
    "loop": (
        lambda m, x: (
            _pasted(x[x[:, 0] > 0.5], x.square().sum(1)[x[:, 0] > 0.5]) * m(x).sum()
        ),
        "_pasted",
    ),
    "list": (lambda m, x: [m(part[None]) for part in _pairs(x)[1]], "_pairs"),
    "written": (lambda m, x: (_written(y := x * 1.0) + m(y), y), "_written"),
}


@pytest.mark.parametrize("case", _READERS)
def test_a_function_that_reads_data_is_one_call(
    case: str, same: Any, operations: Any
) -> None:
    function, name = _READERS[case]
    others = tuple((torch.randn(3, 4) * s,) for s in (1.0, -1.0, 0.1, 3.0, 20.0))
    captured = same(_Net(function), _X, others=(*others, (-_X,)))
    assert operations(captured).count(name) == 1
    assert not [s for s in captured.facts.specialized if s.kind == "data"]
    twin = pickle.loads(pickle.dumps(copy.deepcopy(captured)))
    assert operations(twin) == operations(captured)


def test_the_function_that_reads_is_found_under_its_name_again(same: Any) -> None:
    before = _signed
    same(_Net(_READERS["branch"][0]), _X)
    assert _signed is before


def _projected(layer: nn.Module, x: Tensor) -> Tensor:
    return x @ x.t() if x.sum() > 0 else x * 2.0


def _decided(x: Tensor) -> bool:
    return bool(x.sum() > 0)


@dataclass
class _Settings:
    factor: float = 2.0


def _configured(x: Tensor, settings: _Settings) -> Tensor:
    return x * settings.factor if x.sum() > 0 else x


def _maybe(x: Tensor) -> Tensor | None:
    return x * 2.0 if x.sum() > 0 else None


_SETTINGS = _Settings()
_OPENED = {
    "an object that is configured": lambda m, x: m(_configured(x, _SETTINGS)),
    "perhaps nothing": lambda m, x: m(x if (y := _maybe(x)) is None else y),
    "something to quantize": lambda m, x: m(_projected(m, x)[:, :1].expand(-1, 4)),
    "no tensor handed out": lambda m, x: m(x) if _decided(x) else x,
}


@pytest.mark.parametrize("case", _OPENED)
def test_a_function_that_must_be_opened_is_fixed_and_noted(
    case: str, same: Any, operations: Any
) -> None:
    captured = same(_Net(_OPENED[case]), _X, others=((_X + 1.0,),))
    names = {"_projected", "_decided", "_configured", "_maybe"}
    assert not names & set(operations(captured))
    assert [s.kind for s in captured.facts.specialized] == ["data"]
