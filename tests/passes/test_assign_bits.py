"""Targets of single edges: kept by calibration, conversion and files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gdnsq_fx
from gdnsq_fx.annotations import model_facts
from gdnsq_fx.errors import ConfigError, PassError
from gdnsq_fx.passes import AssignBits, Calibrate
from gdnsq_fx.sites import hard_bits

_X = torch.randn(64, 4)
_BITS = {
    "first.weight": 3,
    "first.input": 5,
    "last.weight": 1,
    "last.input": 2,
}


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu())


def _mixed(model: nn.Module) -> torch.fx.GraphModule:
    config = gdnsq_fx.QuantConfig(first_last=None)
    qmodel = gdnsq_fx.prepare(model, _X, config, [_X])
    AssignBits(_BITS)(qmodel)
    Calibrate([_X], model_facts(qmodel).inputs)(qmodel)
    return qmodel


def test_levels_are_placed_for_the_new_targets() -> None:
    assert hard_bits(_mixed(_Net().eval())) == _BITS


def test_edges_that_are_not_named_keep_their_target() -> None:
    qmodel = gdnsq_fx.prepare(_Net(), _X, calibration=[_X])
    before = hard_bits(qmodel)
    AssignBits({"last.weight": 4})(qmodel)
    Calibrate([_X], model_facts(qmodel).inputs)(qmodel)
    assert hard_bits(qmodel) == {**before, "last.weight": 4}


def test_a_mixed_model_is_converted_saved_and_read_back(tmp_path: Path) -> None:
    model = _Net().eval()
    qmodel = _mixed(model)
    imodel = gdnsq_fx.convert(qmodel)
    torch.testing.assert_close(imodel(_X), qmodel(_X), rtol=0, atol=0)
    gdnsq_fx.save(imodel, tmp_path / "mixed.safetensors")
    again = gdnsq_fx.load(tmp_path / "mixed.safetensors", _Net(), _X)
    torch.testing.assert_close(again(_X), imodel(_X), rtol=0, atol=0)


def test_an_unknown_edge_is_an_error_that_lists_the_edges() -> None:
    with pytest.raises(PassError, match=r"no edge is called middle.*first\.weight"):
        AssignBits({"middle": 2})(_mixed(_Net()))


def test_bits_outside_their_domain_are_an_error() -> None:
    with pytest.raises(ConfigError, match="1 to 16"):
        AssignBits({"last.weight": 17})(_mixed(_Net()))
