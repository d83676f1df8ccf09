"""BatchNorm goes into the steps and the bias of integer weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import gdnsq_fx
from gdnsq_fx.errors import PassError
from gdnsq_fx.passes import FoldIntoScales

_X = torch.randn(8, 4, 6, 6)


def _norm(module: nn.Module) -> nn.Module:
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            norm.weight.data.normal_()  # negative ones as well
            norm.bias.data.normal_()
            norm.running_mean.normal_()  # type: ignore[union-attr]
            norm.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
    return module.eval()


def _converted(model: nn.Module, x: Tensor = _X, **settings: Any) -> GraphModule:
    torch.manual_seed(0)
    config = gdnsq_fx.QuantConfig(first_last=None, **settings)
    return gdnsq_fx.convert(gdnsq_fx.prepare(_norm(model), x, config, [x]))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize(
    "layer",
    [
        lambda bias: nn.Conv2d(4, 6, 3, padding=1, bias=bias),
        lambda bias: nn.Conv2d(4, 6, 3, groups=2, bias=bias),
        lambda bias: nn.ConvTranspose2d(4, 6, 3, bias=bias),
    ],
)
def test_same_values_without_the_norm(layer, per_channel: bool, bias: bool) -> None:
    model = nn.Sequential(layer(bias), nn.BatchNorm2d(6), nn.ReLU())
    imodel = _converted(model, per_channel=per_channel)
    codes = imodel.quantizers.get_submodule("0_weight").codes.clone()
    wanted = imodel(_X)
    result = FoldIntoScales()(imodel)
    assert result.modified
    assert "batchnorm" not in str(imodel.graph).lower()
    assert not [n for n in imodel.graph.nodes if n.target == "1"]
    assert torch.equal(imodel.quantizers.get_submodule("0_weight").codes, codes)
    torch.testing.assert_close(imodel(_X), wanted, rtol=1e-4, atol=1e-5)
    assert FoldIntoScales()(imodel).modified is False


class _TwoReaders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        return self.norm(y) + y


class _Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.fc(x)))


@pytest.mark.parametrize(
    ("model", "reason"),
    [(_TwoReaders, "others read"), (_Shared, "of this layer alone")],
)
def test_refusals_leave_the_norm(model: type[nn.Module], reason: str) -> None:
    imodel = _converted(model(), _X[:, :, 0, 0])
    wanted = imodel(_X[:, :, 0, 0])
    assert FoldIntoScales()(imodel).modified is False
    (norm,) = [n for n in imodel.graph.nodes if n.target == "norm"]
    assert reason in norm.meta["gdnsq_fx"].skip
    assert torch.equal(imodel(_X[:, :, 0, 0]), wanted)


def test_refuses_a_model_in_training() -> None:
    imodel = _converted(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))).train()
    with pytest.raises(PassError, match=r"call eval\(\)"):
        FoldIntoScales()(imodel)
