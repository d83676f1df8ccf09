"""After AlignBiases the deployable form computes what the prepared model does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import gdnsq_fx
from gdnsq_fx.errors import PassError
from gdnsq_fx.passes import AlignBiases, run_passes


def _images(count: int = 64) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class _Net(nn.Module):
    """Normalized and plain layers, one behind the other and side by side."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(16, **settings)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(16, **settings)
        self.conv3 = nn.Conv2d(16, 24, 3, stride=2)
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x)).relu()
        x = x + self.norm2(self.conv2(x))
        return self.head(self.conv3(x).relu().mean((2, 3)))


def _prepared(build: Callable[[], nn.Module], **settings: Any) -> GraphModule:
    torch.manual_seed(0)
    net = build()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
            if module.affine:
                module.weight.data.normal_()  # negative ones as well
                module.bias.data.normal_()
    config = gdnsq_fx.QuantConfig(**settings)
    return gdnsq_fx.prepare(net.eval(), _images(), config, [_images()])


def _apart(qmodel: GraphModule) -> float:
    """Share of images whose outputs in the deployable form are not as trained."""
    images = _images(512)
    deployable = gdnsq_fx.convert(qmodel, deployable=True)
    with torch.no_grad():
        trained, shipped = qmodel(images), deployable(images)
    far = (trained - shipped).abs().amax(1) > 1e-5 * trained.abs().max()
    return float(far.float().mean())


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("per_channel", [True, False])
def test_what_is_shipped_is_what_was_trained(bits: int, per_channel: bool) -> None:
    settings = {"weight_bits": bits, "act_bits": bits, "per_channel": per_channel}
    qmodel = _prepared(_Net, **settings)
    before = _apart(qmodel)
    parameters = {n: p.clone() for n, p in qmodel.named_parameters()}
    run_passes(qmodel, (AlignBiases(),))
    moved = {n for n, p in qmodel.named_parameters() if (p != parameters[n]).any()}
    assert moved == {"norm1.bias", "norm2.bias", "conv3.bias", "head.bias"}
    # A value within float rounding of a half step may still fall to the other side.
    assert before > 0.0 and _apart(qmodel) < before / 5


def test_a_second_time_moves_nothing_but_float_rounding() -> None:
    qmodel = run_passes(_prepared(_Net, weight_bits=3, act_bits=3), (AlignBiases(),))
    before = [p.clone() for p in qmodel.parameters()]
    run_passes(qmodel, (AlignBiases(),))
    for one, other in zip(before, qmodel.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("layer", "width"),
    [
        (lambda: nn.Conv2d(3, 8, 3, padding=1), 8),
        (lambda: nn.ConvTranspose2d(3, 8, 2, stride=2, bias=False), 8),
        (lambda: nn.Conv2d(3, 6, 3, groups=3), 6),
    ],
    ids=["conv", "transposed", "grouped"],
)
def test_layers(layer: Callable[[], nn.Module], width: int) -> None:
    def build() -> nn.Module:
        tail = (nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 5, 3))
        return nn.Sequential(layer(), *tail)

    qmodel = _prepared(build, weight_bits=3, act_bits=3, first_last=None)
    before = _apart(qmodel)
    run_passes(qmodel, (AlignBiases(),))
    assert before > 0.0 and _apart(qmodel) < before / 5


class _Shared(nn.Module):
    """One bias for two layers, whose accumulators have two scales."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.bias = self.first.bias
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x).relu()).relu())


def _moved(net: nn.Module, example: Tensor, **settings: Any) -> set[str]:
    config = gdnsq_fx.QuantConfig(2, 2, first_last=None, **settings)
    qmodel = gdnsq_fx.prepare(net.eval(), example, config, [example])
    before = {name: p.clone() for name, p in qmodel.named_parameters()}
    run_passes(qmodel, (AlignBiases(),))
    return {name for name, p in qmodel.named_parameters() if (p != before[name]).any()}


def test_what_has_nowhere_to_go_stays() -> None:
    torch.manual_seed(0)
    example = torch.randn(64, 8)
    assert _moved(_Shared(), example) == {"last.bias"}
    assert _moved(_Shared(), example, exclude=("second",)) == {"last.bias"}
    plain = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    assert _moved(plain, example) == {"0.bias", "2.bias"}
    assert _moved(plain, example, exclude=("0",)) == {"2.bias"}
    wide = {"2": {"act_bits": 12}}
    assert _moved(plain, example, overrides=wide) == {"0.bias"}
    assert _moved(plain, example, overrides={"0": {"weight_bits": 9}}) == {"2.bias"}


def test_without_a_parameter_of_its_own_a_norm_stays() -> None:
    qmodel = _prepared(lambda: _Net(affine=False), weight_bits=2, act_bits=2)
    before = {name: p.clone() for name, p in qmodel.named_parameters()}
    run_passes(qmodel, (AlignBiases(),))
    moved = {n for n, p in qmodel.named_parameters() if (p != before[n]).any()}
    assert moved == {"conv3.bias", "head.bias"}


def test_running_statistics_must_have_settled() -> None:
    with pytest.raises(PassError, match=r"call eval\(\)"):
        run_passes(_prepared(_Net).train(), (AlignBiases(),))
