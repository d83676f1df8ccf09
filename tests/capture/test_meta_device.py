"""A model without values is prepared as any other, and calibrated once it has them."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import gdnsq_fx
from gdnsq_fx.annotations import model_facts
from gdnsq_fx.errors import CalibrationError, ConfigError
from gdnsq_fx.passes import Calibrate

_X = torch.randn(4, 3, 8, 8)


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu()
        return self.fc(x.mean((2, 3)))


def _on_meta() -> torch.fx.GraphModule:
    with torch.device("meta"):
        model = _Net().eval()
    with pytest.warns(UserWarning, match="meta device: its quantizers are not"):
        return gdnsq_fx.prepare(model, _X.to("meta"))


def test_a_prepared_skeleton_takes_weights_and_calibration_later() -> None:
    model = _Net().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = gdnsq_fx.prepare(model, _X)
    skeleton = _on_meta()
    assert all(p.is_meta or p.numel() == 1 for p in skeleton.parameters())
    skeleton = skeleton.to_empty(device="cpu")
    left = skeleton.load_state_dict(model.state_dict(), strict=False)
    assert not left.unexpected_keys
    assert all(key.startswith("quantizers.") for key in left.missing_keys)
    Calibrate([_X], model_facts(skeleton).inputs)(skeleton)
    torch.testing.assert_close(skeleton(_X), wanted(_X), rtol=0, atol=0)


def test_calibration_without_values_is_an_error_that_names_the_remedy() -> None:
    skeleton = _on_meta()
    calibrate = Calibrate([_X.to("meta")], model_facts(skeleton).inputs)
    with pytest.raises(CalibrationError, match=r"to_empty.*load_state_dict"):
        calibrate(skeleton)
    with torch.device("meta"):
        model = _Net()
    with pytest.raises(ConfigError, match="no values to calibrate with"):
        gdnsq_fx.prepare(model, _X.to("meta"), calibration=[_X.to("meta")])
