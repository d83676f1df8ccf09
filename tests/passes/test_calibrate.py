"""Levels are placed from data; nothing else changes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from gdnsq_fx.errors import (
    BatchStructureError,
    CalibrationError,
    DeviceMismatchError,
    PassError,
)
from gdnsq_fx.inputs import InputStructure
from gdnsq_fx.passes import Calibrate, InsertQuantizers, PropagateShapes, run_passes
from gdnsq_fx.quantize.quantizer import quantization_disabled
from gdnsq_fx.sites import activation_sites, sites, weight_sites
from gdnsq_fx.spec import QuantConfig

_X = torch.randn(8, 3, 5, 5)
_INPUTS = InputStructure.of(_X)


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout()
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.norm(self.conv(x)).relu()).mean((2, 3)))


@pytest.fixture
def inserted(exposed) -> Any:
    def make(model: nn.Module, x: Tensor = _X, **settings: Any) -> GraphModule:
        config = QuantConfig(first_last=None, **settings)
        passes = (PropagateShapes((x,)), InsertQuantizers(config))
        return run_passes(exposed(model, x), passes)

    return make


def _parameters(module: GraphModule) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in module.quantizers.state_dict().items()}


def test_the_graph_stays_and_every_step_becomes_a_number(inserted, show) -> None:
    module = inserted(_Net())
    before = show(module)
    assert not any(site.quantizer.is_calibrated for site in sites(module))
    assert Calibrate([_X], _INPUTS)(module).modified is False
    assert show(module) == before
    assert all(v.isfinite().all() for v in _parameters(module).values())


def test_second_run_on_the_same_batches_changes_nothing(inserted) -> None:
    module = inserted(_Net())
    Calibrate([_X], _INPUTS)(module)
    first = _parameters(module)
    assert Calibrate([_X], _INPUTS)(module).modified is False
    assert all(torch.equal(v, first[k]) for k, v in _parameters(module).items())


def test_alone_in_torchs_manager_and_16_bits_are_close_to_eager(
    inserted, alone
) -> None:
    model = _Net().eval()
    module = inserted(model, weight_bits=16, act_bits=16)
    result = alone(Calibrate([_X], _INPUTS), module)
    got = result.graph_module(_X)
    torch.testing.assert_close(got, model(_X), rtol=0.0, atol=1e-3)
    with quantization_disabled(module):
        assert torch.equal(module(_X), model(_X))


def test_weights_buffers_mode_and_random_state_stay(inserted) -> None:
    module = inserted(_Net().train())
    kept = {k: v.clone() for k, v in module.state_dict().items() if "quant" not in k}
    state = torch.get_rng_state()
    Calibrate([_X], _INPUTS)(module)
    after = module.state_dict()
    assert all(torch.equal(after[k], v) for k, v in kept.items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in module.modules())
    assert all(p.grad is None for p in module.parameters())


def test_a_weight_spans_its_channels_with_all_levels(inserted) -> None:
    module = inserted(_Net(), weight_bits=3, offset="free")
    Calibrate([_X], _INPUTS)(module)
    for site in weight_sites(module):
        low, high = site.quantizer.extremes(site.weight())
        torch.testing.assert_close(site.quantizer.step, (high - low) / 7)
        assert set(site.quantizer.levels(site.weight()).flatten().tolist()) == {8.0}


def test_observed_extremes_come_from_all_batches(inserted) -> None:
    module = inserted(_Net())
    batches = [_X, _X + 10.0, _X - 20.0]
    Calibrate(batches, _INPUTS)(module)
    observed = activation_sites(module)[0].quantizer.observed
    wanted = torch.stack([_X.min() - 20.0, _X.max() + 10.0])
    assert torch.equal(observed, wanted)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_no_uniform_grid_from_zero_is_better_by_much(inserted, bits: int) -> None:
    """Against a fine search for the least mean squared error of a ReLU's output."""
    x = torch.randn(1000, 4).relu() ** 2
    model = nn.Sequential(nn.ReLU(), nn.Linear(4, 2))
    module = inserted(model, x, act_bits=bits)
    Calibrate([x], InputStructure.of(x))(module)
    quantizer = activation_sites(module)[0].quantizer
    found = float((quantizer(x) - x).square().mean())
    steps = torch.linspace(0.02, 1.0, 100) * x.max() / (2**bits - 1)
    codes = [(x / s).round().clamp(0, 2**bits - 1) * s for s in steps]
    least = min(float((c - x).square().mean()) for c in codes)
    assert found <= 1.05 * least


def test_batches_with_targets_and_a_generator(inserted) -> None:
    def batches() -> Iterator[Any]:
        yield _X[:4], torch.zeros(4)
        yield [_X[4:], torch.zeros(4)]

    one, two = inserted(_Net().eval()), inserted(_Net().eval())
    two.load_state_dict(one.state_dict())
    Calibrate([_X[:4], _X[4:]], _INPUTS)(one)
    Calibrate(batches(), _INPUTS)(two)
    second = _parameters(two)
    assert all(torch.equal(v, second[k]) for k, v in _parameters(one).items())


def test_refuses_a_model_without_quantizers(exposed) -> None:
    with pytest.raises(PassError, match="Calibrate needs a model with quantizers"):
        Calibrate([_X], _INPUTS)(exposed(_Net(), _X))


def test_refuses_when_there_is_no_batch(inserted) -> None:
    module = inserted(_Net())
    used_up = iter([_X])
    list(used_up)
    for empty in ([], (), used_up):
        with pytest.raises(CalibrationError, match="no batch; pass a non-empty"):
            Calibrate(empty, _INPUTS)(module)
    assert not any(site.quantizer.is_calibrated for site in sites(module))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_refuses_values_that_are_not_finite(inserted, bad: float) -> None:
    module = inserted(_Net())
    spoiled = _X.clone()
    spoiled[3, 1, 2, 2] = bad
    with pytest.raises(CalibrationError, match=r"batch 2 holds NaN.*\(8, 3, 5, 5\)"):
        Calibrate([_X, (spoiled, torch.zeros(8))], _INPUTS)(module)
    # A failed run leaves nothing behind: no hook, no mode, and the next one works.
    assert module.training
    Calibrate([_X], _INPUTS)(module)


class _Logarithm(_Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).mean((2, 3)).log())


def test_refuses_values_that_stop_being_finite_inside(inserted) -> None:
    with pytest.raises(CalibrationError, match=r"reach fc\.input.*inputs are finite"):
        Calibrate([_X], _INPUTS)(inserted(_Logarithm()))


@pytest.mark.parametrize("layer", ["conv", "fc"])
def test_refuses_weights_that_are_not_finite(inserted, layer: str) -> None:
    model = _Net()
    getattr(model, layer).weight.data.view(-1)[0] = float("nan")
    with pytest.raises(CalibrationError, match="weights"):
        Calibrate([_X], _INPUTS)(inserted(model))


def test_refuses_another_structure_and_another_device(inserted) -> None:
    module = inserted(_Net())
    with pytest.raises(BatchStructureError, match=r"expected Tensor\[\*, 3, 5, 5\]"):
        Calibrate([_X[0]], _INPUTS)(module)
    with pytest.raises(DeviceMismatchError, match=r"model is on cpu.*meta"):
        Calibrate([_X.to("meta")], _INPUTS)(module)


def test_refuses_an_edge_that_no_value_reaches(inserted) -> None:
    module = inserted(_Net(), torch.randn(0, 3, 5, 5))
    with pytest.raises(CalibrationError, match=r"no value reached conv\.input"):
        Calibrate([torch.randn(0, 3, 5, 5)], _INPUTS)(module)


def test_a_large_calibration_set_needs_bounded_memory(inserted) -> None:
    module = inserted(nn.Sequential(nn.Linear(4, 2)), torch.randn(8, 4))
    batches = (torch.full((20_000, 4), float(i)) for i in range(8))
    Calibrate(batches, InputStructure.of(torch.randn(8, 4)))(module)
    assert activation_sites(module)[0].quantizer.observed.tolist() == [0.0, 7.0]


class _Deep(nn.Module):
    """Without statistics its values grow a hundredfold from layer to layer."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(6))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(6))
        for conv in self.convs:
            nn.init.normal_(conv.weight, std=40.0)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(x))
        return x


_FEATURES = torch.randn(4, 8, 5, 5)


def _largest(module: GraphModule) -> float:
    return max(float(s.quantizer.observed[1]) for s in activation_sites(module))


def test_a_model_without_statistics_is_calibrated_as_it_will_train(inserted) -> None:
    module = inserted(_Deep(), _FEATURES)
    before = {name: b.clone() for name, b in module.named_buffers() if "norm" in name}
    Calibrate([_FEATURES], InputStructure.of(_FEATURES))(module)
    assert _largest(module) < 10.0
    after = dict(module.named_buffers())
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    module.train()(_FEATURES).square().mean().backward()
    gradient = module.get_parameter("convs.0.weight").grad
    assert gradient is not None and bool(gradient.any())


@pytest.mark.parametrize("why", ["evaluation", "trained", "one value a channel"])
def test_other_statistics_are_the_models_own(inserted, why: str) -> None:
    x = _FEATURES[:1, :, :1, :1] if why == "one value a channel" else _FEATURES
    model = _Deep()
    if why == "trained":
        for norm in model.norms:
            norm.running_mean.add_(1e-3)
    if why == "evaluation":
        model.eval()
    module = inserted(model, x)
    Calibrate([x], InputStructure.of(x))(module)
    assert _largest(module) > 1e6
