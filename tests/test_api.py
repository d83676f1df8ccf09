"""The functions of the facade on whole models, from prepare to load."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.fx import GraphModule

import gdnsq_fx
from gdnsq_fx.errors import DeviceMismatchError, GdnsqError
from gdnsq_fx.quantize.quantizer import Quantizer
from gdnsq_fx.sites import hard_bits, sites
from gdnsq_fx.spec import QuantConfig


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other take most of the time
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.mid = nn.Conv2d(4, 4, 3)
        self.drop = nn.Dropout()
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(F.relu(self.norm(self.conv(x)))).relu()
        return self.fc(self.drop(x.mean((2, 3))))


_X = torch.randn(16, 3, 6, 6)


def _prepare(model: nn.Module, example: Any, **settings: Any) -> GraphModule:
    config = QuantConfig(**settings)
    return gdnsq_fx.prepare(model, example, config, calibration=[example])


def _call(model: nn.Module, example: Any) -> Tensor:
    if isinstance(example, dict):
        return model(**example)
    return model(*example) if isinstance(example, tuple) else model(example)


def _check_parity(qmodel: GraphModule, example: Any) -> GraphModule:
    """Converted equals prepared: same argmax, and at most 1e-4 of the output range."""
    before = {k: v.clone() for k, v in qmodel.state_dict().items()}
    mode = qmodel.training
    imodel = gdnsq_fx.convert(qmodel)
    assert qmodel.training is mode and not imodel.training
    assert all(torch.equal(v, before[k]) for k, v in qmodel.state_dict().items())
    assert any(isinstance(m, Quantizer) for m in qmodel.modules())
    assert not any(isinstance(m, Quantizer) for m in imodel.modules())
    qmodel.eval()
    wanted, got = _call(qmodel, example), _call(imodel, example)
    qmodel.train(mode)
    assert got.dtype == wanted.dtype and got.shape == wanted.shape
    assert torch.equal(got.argmax(1), wanted.argmax(1))
    spread = float((wanted.max() - wanted.min()).detach())
    assert float((got - wanted).abs().max()) <= 1e-4 * spread
    return imodel


# --- torchvision ------------------------------------------------------------------

_MODELS = ("resnet18", "mobilenet_v3_small", "densenet121", "convnext_tiny")


def _torchvision(name: str) -> nn.Module:
    return getattr(torchvision.models, name)(weights=None, num_classes=10)


@pytest.fixture(scope="module", params=_MODELS)
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, GraphModule, Tensor]:
    """A model of torchvision with random weights, prepared, and an input."""
    torch.manual_seed(0)
    model, x = _torchvision(request.param), torch.randn(2, 3, 64, 64)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    qmodel = _prepare(model, x)
    assert model.training and qmodel.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    return model, qmodel, x


Pair = tuple[nn.Module, GraphModule, Tensor]


def test_identity_precision_equals_eager_in_evaluation(pair: Pair) -> None:
    model, qmodel, x = pair
    model.eval(), qmodel.eval()
    with gdnsq_fx.quantization_disabled(qmodel), torch.no_grad():
        torch.testing.assert_close(qmodel(x), model(x))


def test_identity_precision_equals_eager_in_training(pair: Pair) -> None:
    """Outputs, gradients, and running statistics afterwards; dropout by one seed."""
    model, qmodel = copy.deepcopy(pair[0]).train(), copy.deepcopy(pair[1]).train()
    outputs = []
    for one in (model, qmodel):
        torch.manual_seed(1)
        with gdnsq_fx.quantization_disabled(one):
            outputs.append(one(pair[2]))
        outputs[-1].square().sum().backward()
    torch.testing.assert_close(*outputs)
    state = qmodel.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(state[name], value, msg=name)
    gradients = dict(qmodel.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name].grad, parameter.grad, msg=name)


def test_every_key_of_the_model_in_its_order(pair: Pair) -> None:
    model, qmodel, _ = pair
    kept = [k for k in qmodel.state_dict() if not k.startswith("quantizers.")]
    assert kept == list(model.state_dict())


def test_checkpoints_load_both_ways(pair: Pair) -> None:
    model, qmodel, x = copy.deepcopy(pair)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.01)
    missing, unexpected = qmodel.load_state_dict(other.state_dict(), strict=False)
    assert not unexpected and all(k.startswith("quantizers.") for k in missing)
    other.eval(), qmodel.eval(), model.eval()
    with gdnsq_fx.quantization_disabled(qmodel), torch.no_grad():
        torch.testing.assert_close(qmodel(x), other(x))
    missing, unexpected = model.load_state_dict(qmodel.state_dict(), strict=False)
    assert not missing and all(k.startswith("quantizers.") for k in unexpected)
    with torch.no_grad():
        torch.testing.assert_close(model(x), other(x))


def test_quantized_training_step_and_conversion(pair: Pair) -> None:
    qmodel, x = copy.deepcopy(pair[1]), pair[2]
    output = qmodel(x)
    output.square().mean().backward()
    for site in sites(qmodel):
        for name, parameter in site.quantizer.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), (
                site.edge,
                name,
            )
    with torch.no_grad():
        _check_parity(qmodel, x)


def test_analysis_of_a_whole_model(pair: Pair) -> None:
    _, qmodel, x = pair
    report = gdnsq_fx.analyze(qmodel, [x], draws=1)
    assert report.coverage.macs == 1.0 and report.coverage.weights > 0.95
    assert len(report.edges) == len(sites(qmodel))
    json.dumps(report.to_dict(), allow_nan=False)
    assert max(len(line) for line in str(report).splitlines()) <= 100


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_torchvision_models_survive_a_file(name: str, tmp_path: Path) -> None:
    x = torch.randn(2, 3, 64, 64)
    imodel = gdnsq_fx.convert(_prepare(_torchvision(name), x, weight_bits=2))
    size = gdnsq_fx.save(imodel, tmp_path / "model.safetensors")
    floats = sum(p.numel() * 4 for p in _torchvision(name).parameters())
    assert size < floats / 8
    loaded = gdnsq_fx.load(tmp_path / "model.safetensors", _torchvision(name), x)
    with torch.no_grad():
        assert torch.equal(loaded(x), imodel(x))


def test_batch_norm_folded_in_a_whole_model() -> None:
    model = _torchvision("resnet18").eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.8, 1.2)
    x = torch.randn(2, 3, 64, 64)
    config = QuantConfig()
    qmodel = gdnsq_fx.prepare(model, x, config, [x], fold_batch_norm=True)
    assert not any("bn" in str(node.target) for node in qmodel.graph.nodes)
    with gdnsq_fx.quantization_disabled(qmodel), torch.no_grad():
        torch.testing.assert_close(qmodel(x), model(x), rtol=1e-3, atol=1e-3)


# --- other kinds of models --------------------------------------------------------


class _Chain(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.flatten(2).mean(2)


def _chain(dims: int) -> nn.Module:
    conv = getattr(nn, f"Conv{dims}d")
    up = getattr(nn, f"ConvTranspose{dims}d")
    return _Chain(
        conv(2, 4, 3, padding=1),
        nn.ReLU(),
        up(4, 6, 2, stride=2, groups=2),
        nn.ReLU(),
        conv(6, 5, 3, padding="same", padding_mode="circular"),
    )


class _TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv2d(3, 4, 3)
        self.table = nn.Linear(6, 4)
        self.head = nn.Linear(8, 5)

    def forward(self, image: Tensor, table: Tensor, gain: float = 2.0) -> Tensor:
        image = self.image(image).relu().mean((2, 3))
        return self.head(torch.cat([image, self.table(table)], 1)) * gain


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.out = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out((torch.softmax(q @ k.transpose(1, 2), -1) @ v).mean(1))


class _Shared(nn.Module):
    """A layer called twice, a tied weight, a parametrized one, a function."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.twice.weight
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.matrix = nn.Parameter(torch.randn(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.tied(self.twice(self.twice(x).relu()))
        return F.linear(self.normed(x), self.matrix)


_TABLE = torch.randn(16, 6)
_CASES: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "small": (_Net, _X),
    "1d": (lambda: _chain(1), torch.randn(4, 2, 7)),
    "2d": (lambda: _chain(2), torch.randn(4, 2, 5, 6)),
    "3d": (lambda: _chain(3), torch.randn(4, 2, 4, 3, 5)),
    "two arguments": (_TwoInputs, (_X, _TABLE)),
    "keywords": (_TwoInputs, {"table": _TABLE, "image": _X}),
    "attention": (_Attention, torch.randn(8, 3, 4)),
    "shared": (_Shared, torch.randn(32, 4)),
    "whole model is one layer": (lambda: nn.Linear(6, 5), _TABLE),
}


@pytest.mark.parametrize("case", _CASES)
def test_the_whole_way(case: str, tmp_path: Path) -> None:
    make, example = _CASES[case]
    model = make().train()
    qmodel = _prepare(model, example, weight_bits=3, act_bits=4)
    kept = [k for k in qmodel.state_dict() if not k.startswith("quantizers.")]
    assert kept == list(model.state_dict())
    for training in (False, True):
        model.train(training), qmodel.train(training)
        with gdnsq_fx.quantization_disabled(qmodel):
            torch.manual_seed(1)
            wanted = _call(model, example)
            torch.manual_seed(1)
            torch.testing.assert_close(_call(qmodel, example), wanted)
    report = gdnsq_fx.analyze(qmodel, [example, (example, torch.zeros(4))])
    assert report.coverage.macs == report.coverage.weights == 1.0
    assert report.coverage.skipped == ()
    result = gdnsq_fx.finetune(qmodel, [example] * 2, steps=3, progress=False)
    assert result.budget_met and hard_bits(qmodel) == result.bits
    imodel = _check_parity(qmodel, example)
    gdnsq_fx.save(imodel, tmp_path / "model.safetensors")
    loaded = gdnsq_fx.load(tmp_path / "model.safetensors", make(), example)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert torch.equal(_call(loaded, example), _call(imodel, example))


@pytest.mark.parametrize("offset", ["free", "half_step", "integer"])
@pytest.mark.parametrize("bits", [1, 2, 8, 16])
@pytest.mark.parametrize("per_channel", [False, True])
def test_widths_and_offsets(bits: int, offset: str, per_channel: bool) -> None:
    settings = {"offset": offset, "first_last": None, "per_channel": per_channel}
    model = _Net()
    qmodel = _prepare(model, _X, weight_bits=bits, act_bits=bits, **settings)
    assert max(hard_bits(qmodel).values()) <= bits
    _check_parity(qmodel, _X)
    result = gdnsq_fx.finetune(qmodel, [_X], steps=4, progress=False)
    assert max(result.bits.values()) <= bits
    _check_parity(qmodel, _X)


@pytest.mark.parametrize("estimator", ["ste", "lsq", "ewgs", "aewgs"])
def test_estimators(estimator: str) -> None:
    qmodel = _prepare(_Net(), _X, estimator=estimator, weight_bits=2, act_bits=2)
    gdnsq_fx.finetune(qmodel, [_X], steps=4, progress=False)
    _check_parity(qmodel, _X)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_precisions(dtype: torch.dtype, tmp_path: Path) -> None:
    model, x = _Net().to(dtype), _X.to(dtype)
    qmodel = _prepare(model, x)
    kept = {k: v for k, v in qmodel.state_dict().items() if not k.startswith("quant")}
    assert {k: v.dtype for k, v in kept.items()} == {
        k: v.dtype for k, v in model.state_dict().items()
    }
    with gdnsq_fx.quantization_disabled(qmodel):
        torch.testing.assert_close(qmodel.eval()(x), model.eval()(x))
    report = gdnsq_fx.analyze(qmodel, [x])
    json.dumps(report.to_dict(), allow_nan=False)
    imodel = _check_parity(qmodel, x)
    gdnsq_fx.save(imodel, tmp_path / "model.safetensors")
    loaded = gdnsq_fx.load(tmp_path / "model.safetensors", _Net().to(dtype), x)
    assert torch.equal(loaded(x), imodel(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_prepared_model_that_moves_to_another_precision(dtype: torch.dtype) -> None:
    qmodel = _prepare(_Net(), _X).to(dtype)
    _check_parity(qmodel, _X.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_fine_tuning_in_other_precisions(dtype: torch.dtype) -> None:
    x = _X.to(dtype)
    qmodel = _prepare(_Net().to(dtype), x, weight_bits=2, act_bits=2)
    try:
        gdnsq_fx.finetune(qmodel, [x], steps=5, progress=False)
    except GdnsqError as error:  # Adam's denominators underflow in half precision
        assert dtype == torch.float16 and "float16" in str(error)
    assert all(v.isfinite().all() for v in qmodel.state_dict().values())
    _check_parity(qmodel, x)


# --- one function at a time -------------------------------------------------------


def test_prepare_without_calibration_warns_and_uses_the_example() -> None:
    model = _Net()
    with pytest.warns(UserWarning, match="no calibration batches.*pass calibration="):
        one = gdnsq_fx.prepare(model, _X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        two = gdnsq_fx.prepare(model, _X, calibration=[(_X, torch.zeros(16))])
    second = two.state_dict()
    assert all(torch.equal(v, second[k]) for k, v in one.state_dict().items())
    assert {s.quantizer.spec.bits for s in sites(one)} == {2, 8}


def test_prepare_keeps_mode_gradients_and_random_state() -> None:
    model = _Net().eval()
    model.norm.train()
    model.conv.weight.requires_grad_(False)
    state = torch.get_rng_state()
    qmodel = _prepare(model, _X)
    assert torch.equal(torch.get_rng_state(), state)
    modes = {name: m.training for name, m in qmodel.named_modules()}
    assert modes["norm"] and not modes[""] and not modes["drop"]
    assert not qmodel.conv.weight.requires_grad and qmodel.fc.weight.requires_grad


def test_prepare_leaves_a_model_that_was_trained_untouched() -> None:
    model = _Net()
    model(_X).sum().backward()
    grads = {k: p.grad for k, p in model.named_parameters()}
    copies = {name: grad.clone() for name, grad in grads.items() if grad is not None}
    _prepare(model, _X)
    for name, parameter in model.named_parameters():
        assert parameter.grad is grads[name]
        assert torch.equal(grads[name], copies[name])


def test_quantization_disabled_switches_back_also_after_an_error() -> None:
    qmodel = _prepare(_Net(), _X).eval()
    wanted = qmodel(_X)
    with pytest.raises(ZeroDivisionError), gdnsq_fx.quantization_disabled(qmodel):
        assert not torch.equal(qmodel(_X), wanted)
        raise ZeroDivisionError
    assert torch.equal(qmodel(_X), wanted)


def test_convert_inside_quantization_disabled_is_still_quantized() -> None:
    qmodel = _prepare(_Net(), _X).eval()
    with gdnsq_fx.quantization_disabled(qmodel):
        imodel = gdnsq_fx.convert(qmodel)
    assert torch.equal(imodel(_X), qmodel(_X))


def test_convert_twice_from_one_model_gives_two_equal_ones() -> None:
    qmodel = _prepare(_Net(), _X)
    one, two = gdnsq_fx.convert(qmodel), gdnsq_fx.convert(qmodel)
    assert one is not two and torch.equal(one(_X), two(_X))


def test_analyze_leaves_the_model_and_says_the_same_again() -> None:
    qmodel = _prepare(_Net(), _X)
    before = {k: v.clone() for k, v in qmodel.state_dict().items()}
    first = gdnsq_fx.analyze(qmodel, [_X])
    assert qmodel.training and not any(p.grad is not None for p in qmodel.parameters())
    assert all(torch.equal(v, before[k]) for k, v in qmodel.state_dict().items())
    assert gdnsq_fx.analyze(qmodel, iter([_X])) == first


def test_a_layer_with_hooks_is_skipped_with_its_reason() -> None:
    model = _Net()
    model.mid.register_forward_hook(lambda module, args, output: 2.0 * output)
    qmodel = _prepare(model, _X)
    with gdnsq_fx.quantization_disabled(qmodel):
        torch.testing.assert_close(qmodel.eval()(_X), model.eval()(_X))
    report = gdnsq_fx.analyze(qmodel, [_X])
    (skip,) = report.coverage.skipped
    assert skip.name == "mid" and "has hooks" in skip.reason
    assert skip.source.startswith("test_api.py:")
    macs = {"conv": 36 * 4 * 27, "mid": 16 * 4 * 36, "fc": 20}
    wanted = 1.0 - macs["mid"] / sum(macs.values())
    assert report.coverage.macs == pytest.approx(wanted)


def test_spectral_norm_takes_no_step_of_its_own() -> None:
    """Its buffers move at every look at the weight while the model is training."""
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 5)))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    qmodel = _prepare(model, _TABLE)
    for state in (model.state_dict(), qmodel.state_dict()):
        assert all(torch.equal(state[k], v) for k, v in before.items())
    with gdnsq_fx.quantization_disabled(qmodel):
        torch.testing.assert_close(qmodel.train()(_TABLE), model.train()(_TABLE))
        torch.testing.assert_close(qmodel.eval()(_TABLE), model.eval()(_TABLE))


class _LowRank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.right = nn.Parameter(torch.randn(1, 6))

    def forward(self, left: Tensor) -> Tensor:
        return left @ self.right

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight[:, :1].clone()


def test_coverage_is_a_share_also_of_parametrized_weights() -> None:
    layer = nn.Linear(6, 5)
    register = nn.utils.parametrize.register_parametrization
    register(layer, "weight", _LowRank(), unsafe=True)
    qmodel = _prepare(nn.Sequential(layer), _TABLE)
    coverage = gdnsq_fx.analyze(qmodel, [_TABLE]).coverage
    assert coverage.macs == coverage.weights == 1.0


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.attention(x, x, x, need_weights=False)[0].mean(1))


def test_coverage_tells_what_a_fused_call_keeps_to_itself() -> None:
    """Attention weights meet the values inside: 6 * 6 * 8 MACs of a sample."""
    x = torch.randn(4, 6, 8)
    coverage = gdnsq_fx.analyze(_prepare(_Attention(), x), [x]).coverage
    (skip,) = coverage.skipped
    assert skip.reason == (
        "in floating point inside the fused call: the attention weights "
        "(50% of the MACs of this attention)"
    )
    assert coverage.weights == 1.0
    every = 4 * 6 * 64 + 2 * 6 * 6 * 8 + 40
    assert coverage.macs == pytest.approx(1.0 - 6 * 6 * 8 / every)


class _Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm((6, 8))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(x).mean(1))


def test_coverage_counts_what_the_op_table_does_not_know() -> None:
    x = torch.randn(4, 6, 8)
    coverage = gdnsq_fx.analyze(_prepare(_Unknown(), x), [x]).coverage
    assert [skip.name for skip in coverage.skipped] == ["norm"]
    assert coverage.weights == pytest.approx(40 / (40 + 2 * 48))
    assert coverage.macs < 0.5


def test_fine_tuned_weights_load_back_into_the_original_class() -> None:
    qmodel = _prepare(_Net(), _X, weight_bits=2)
    gdnsq_fx.finetune(qmodel, [_X], steps=3, progress=False)
    model = _Net()
    missing, unexpected = model.load_state_dict(qmodel.state_dict(), strict=False)
    assert not missing and all(k.startswith("quantizers.") for k in unexpected)
    with gdnsq_fx.quantization_disabled(qmodel):
        assert torch.equal(qmodel(_X), model.eval()(_X))


def test_a_prepared_models_checkpoint_loads_into_another() -> None:
    one = _prepare(_Net(), _X, weight_bits=2)
    two = _prepare(_Net(), 3.0 * _X, weight_bits=2)
    two.load_state_dict(one.state_dict())
    assert torch.equal(two.eval()(_X), one.eval()(_X))


def test_a_copy_of_a_prepared_model_can_do_all_the_rest() -> None:
    qmodel = _prepare(_Net(), _X)
    twin = copy.deepcopy(qmodel)
    assert list(twin.state_dict()) == list(qmodel.state_dict())
    gdnsq_fx.finetune(twin, [_X], steps=2, progress=False)
    assert len(gdnsq_fx.analyze(twin, [_X]).edges) == 6
    _check_parity(twin, _X)
    assert not torch.equal(twin.fc.weight, qmodel.fc.weight)


def test_save_and_load_a_folded_model(tmp_path: Path) -> None:
    model = _Net().eval()
    qmodel = gdnsq_fx.prepare(model, _X, calibration=[_X], fold_batch_norm=True)
    imodel = _check_parity(qmodel, _X)
    gdnsq_fx.save(imodel, tmp_path / "model.safetensors")
    for fresh in (_Net().eval(), _Net().train()):
        loaded = gdnsq_fx.load(tmp_path / "model.safetensors", fresh, _X)
        assert torch.equal(loaded(_X), imodel(_X))


@pytest.mark.parametrize("settings", [{"exclude": ("mid",)}, {"first_last": "exclude"}])
def test_partly_quantized_models_survive_a_file(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    imodel = _check_parity(_prepare(_Net(), _X, **settings), _X)
    gdnsq_fx.save(imodel, tmp_path / "model.safetensors")
    loaded = gdnsq_fx.load(str(tmp_path / "model.safetensors"), _Net(), _X)
    assert torch.equal(loaded(_X), imodel(_X))


def test_load_leaves_the_given_model_untouched_and_takes_none_of_its_weights(
    tmp_path: Path,
) -> None:
    imodel = gdnsq_fx.convert(_prepare(_Net(), _X))
    gdnsq_fx.save(imodel, tmp_path / "model.safetensors")
    fresh = _Net()
    before = {k: v.clone() for k, v in fresh.state_dict().items()}
    loaded = gdnsq_fx.load(tmp_path / "model.safetensors", fresh, _X)
    assert fresh.training
    assert all(torch.equal(v, before[k]) for k, v in fresh.state_dict().items())
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.fill_(float("nan"))
    assert torch.equal(loaded(_X), imodel(_X))
    again = gdnsq_fx.load(tmp_path / "model.safetensors", fresh, _X)
    assert torch.equal(again(_X), imodel(_X))


def test_a_model_without_quantized_weights_survives_a_file(tmp_path: Path) -> None:
    class Product(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a @ b

    example = (torch.randn(2, 3, 4), torch.randn(2, 4, 5))
    imodel = gdnsq_fx.convert(_prepare(Product(), example))
    gdnsq_fx.save(imodel, tmp_path / "model.safetensors")
    loaded = gdnsq_fx.load(tmp_path / "model.safetensors", Product(), example)
    assert torch.equal(loaded(*example), imodel(*example))


def test_a_model_on_meta_with_an_input_on_the_cpu() -> None:
    model = _Net().to("meta")
    with pytest.raises(DeviceMismatchError, match=r"model is on meta.*args\[0\] is on"):
        _prepare(model, _X)
    with pytest.raises(DeviceMismatchError, match="model is on cpu"):
        _prepare(_Net(), _X.to("meta"))
    assert all(p.is_meta for p in model.parameters())
