"""An edge that holds a mask loses its quantizer in calibration, and says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gdnsq_fx
from gdnsq_fx.sites import sites

_X = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
assert (_X[..., 0] > 1.0).any(), "something is to be masked"


class _Windowed(nn.Module):
    """As Longformer adds the mask of its neighbours: by a product with ones."""

    def __init__(self, lowest: float = torch.finfo(torch.float32).min) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(4, 4) for _ in range(3))
        self.lowest = lowest

    def forward(self, x: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).mT
        padded = x[..., :1].detach() > 1.0
        mask = padded.to(x.dtype).masked_fill(padded, self.lowest)
        scores = scores + torch.einsum("bxd,byd->bxy", torch.ones_like(mask), mask)
        return scores.softmax(-1) @ self.value(x)


def _prepared(model: nn.Module | None = None, **settings: Any) -> Any:
    config = gdnsq_fx.QuantConfig(weight_bits=4, act_bits=4, **settings)
    return gdnsq_fx.prepare(model or _Windowed(), _X, config, [_X])


def test_graph_and_coverage_agree_on_what_is_left() -> None:
    qmodel = _prepared()
    assert not [s.edge for s in sites(qmodel) if "einsum" in s.edge]
    assert not [key for key in qmodel.state_dict() if "einsum" in key]
    assert {s.edge for s in sites(qmodel)} > {"query.weight", "matmul.input"}
    coverage = gdnsq_fx.analyze(qmodel, [_X]).coverage
    (skip,) = coverage.skipped
    assert skip.name == "einsum" and skip.source.startswith("test_masks.py:")
    assert skip.reason == "its operands.1 holds values of a mask, |x| > 1.8e+19"
    assert 0.9 < coverage.macs < 1.0


def test_it_computes_what_eager_does_where_nothing_rounds() -> None:
    model = _Windowed().eval()
    qmodel = _prepared(model)
    with gdnsq_fx.quantization_disabled(qmodel):
        torch.testing.assert_close(qmodel(_X), model(_X))


def test_it_trains_converts_and_is_loaded_again(tmp_path: Path) -> None:
    qmodel = _prepared()
    qmodel.train()(_X).square().sum().backward()
    found = [p.grad for p in qmodel.parameters() if p.grad is not None]
    assert found and all(bool(g.isfinite().all()) for g in found)
    imodel = gdnsq_fx.convert(qmodel)
    assert torch.equal(imodel(_X), qmodel.eval()(_X))
    gdnsq_fx.save(imodel, tmp_path / "m.safetensors")
    again = gdnsq_fx.load(tmp_path / "m.safetensors", _Windowed(), _X)
    assert torch.equal(again(_X), imodel(_X))


def test_strict_names_it() -> None:
    with pytest.raises(
        gdnsq_fx.NotQuantizedError, match=r"einsum: its operands\.1 holds"
    ):
        _prepared(strict=True)
    qmodel = _prepared(strict=True, exclude=("op:einsum",))
    assert [s.name for s in gdnsq_fx.analyze(qmodel, [_X]).coverage.skipped]


@pytest.mark.parametrize("lowest", [-1e4, -1e9])
def test_a_mask_of_smaller_numbers_keeps_its_levels(lowest: float) -> None:
    qmodel = _prepared(_Windowed(lowest))
    assert [s.edge for s in sites(qmodel) if s.edge == "einsum.operands.1"]


class _Masked(nn.Module):
    """Only the scope ``full`` gives the inputs of a sum levels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.zeros_like(x).masked_fill(x > 0.0, -torch.inf)
        return self.last((self.first(x) + mask).exp())


class _Overflowing(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x.abs() * 1e3).exp())


def test_minus_infinity_is_a_mask_and_plus_infinity_an_overflow() -> None:
    qmodel = _prepared(_Masked(), scope="full")
    assert qmodel(_X).isfinite().all()
    assert torch.equal(gdnsq_fx.convert(qmodel)(_X), qmodel.eval()(_X))
    with pytest.raises(gdnsq_fx.CalibrationError, match="infinite values reach"):
        _prepared(_Overflowing())
