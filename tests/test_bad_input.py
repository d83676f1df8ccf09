"""Bad input: a typed error that names cause and remedy; the model stays as it was."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.fx import GraphModule

import gdnsq_fx
from gdnsq_fx.errors import (
    BatchStructureError,
    CalibrationError,
    CaptureError,
    ConfigError,
    DeviceMismatchError,
    FileFormatError,
    GdnsqError,
    NothingToQuantizeError,
    PassError,
    PatternError,
    TrainingDivergedError,
)
from gdnsq_fx.sites import hard_bits, sites, weight_sites
from gdnsq_fx.spec import QuantConfig

_X = torch.randn(8, 3, 6, 6)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other take most of the time
    yield
    torch.set_num_threads(threads)


class _Net(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv(x)).relu().mean((2, 3)))


@pytest.fixture
def untouched() -> Iterator[Callable[[nn.Module], nn.Module]]:
    """Watch a model; fail at the end of the test if anything of it has changed."""
    watched: list[tuple[nn.Module, Any]] = []

    def watch(model: nn.Module) -> nn.Module:
        watched.append((model, _snapshot(model)))
        return model

    yield watch
    for model, before in watched:
        modes, tensors = before
        assert [m.training for m in model.modules()] == modes
        for name, value in model.state_dict().items():
            assert torch.equal(value, tensors[name]) or value.isnan().any(), name


def _snapshot(model: nn.Module) -> Any:
    tensors = {k: v.clone() for k, v in model.state_dict().items()}
    return [m.training for m in model.modules()], tensors


def _prepared(x: Tensor = _X, **settings: Any) -> GraphModule:
    return gdnsq_fx.prepare(_Net(), x, QuantConfig(**settings), calibration=[x])


def _says(error: pytest.ExceptionInfo[GdnsqError], *words: str) -> None:
    message = str(error.value)
    assert isinstance(error.value, GdnsqError)
    assert all(word in message for word in words), message


# --- nothing to quantize, patterns, bits ------------------------------------------


class _Plain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * x + 1.0


@pytest.mark.parametrize(
    "make",
    [
        nn.ReLU,
        nn.Identity,
        _Plain,
        lambda: nn.Sequential(nn.ReLU(), nn.MaxPool1d(2)),
        lambda: nn.Sequential(nn.LayerNorm(6), nn.PReLU()),
        lambda: nn.Sequential(nn.BatchNorm1d(6)),
    ],
)
def test_no_quantizable_operation(make: Any, untouched: Any) -> None:
    model, x = untouched(make()), _X[:, 0]
    with pytest.raises(NothingToQuantizeError) as caught:
        gdnsq_fx.prepare(model, x, calibration=[x])
    _says(caught, "no operation that can be quantized", "convolution")


def test_everything_excluded(untouched: Any) -> None:
    config = QuantConfig(exclude=("*",))
    with pytest.raises(NothingToQuantizeError) as caught:
        gdnsq_fx.prepare(untouched(_Net()), _X, config, [_X])
    _says(caught, "every layer was left out", "conv", "excluded by the configuration")


@pytest.mark.parametrize(
    "settings",
    [
        {"include": ("layer1.*",)},
        {"exclude": ("conv", "fcc")},
        {"exclude": ("op:conv1d",)},
        {"overrides": {"norm": {"weight_bits": 2}}},
    ],
)
def test_a_pattern_that_matches_nothing(settings: Any, untouched: Any) -> None:
    (field, patterns), *_ = settings.items()
    with pytest.raises(PatternError) as caught:
        gdnsq_fx.prepare(untouched(_Net()), _X, QuantConfig(**settings), [_X])
    pattern = list(patterns)[-1]
    _says(
        caught, field, repr(pattern), "matches no layer", "Layers: conv, fc", "linear"
    )


@pytest.mark.parametrize("bits", [0, 17, -3, 2.5, True, "4", None])
@pytest.mark.parametrize("field", ["weight_bits", "act_bits"])
def test_bits_outside_1_to_16(bits: Any, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        QuantConfig(**{field: bits})
    _says(caught, field, "whole number from 1 to 16", repr(bits), "use exclude")


# --- calibration ------------------------------------------------------------------


def _used_up() -> Iterator[Tensor]:
    batches = (x for x in [_X])
    list(batches)
    return batches


@pytest.mark.parametrize("empty", [[], (), iter([]), _used_up()])
def test_empty_calibration(empty: Any, untouched: Any) -> None:
    with pytest.raises(CalibrationError) as caught:
        gdnsq_fx.prepare(untouched(_Net()), _X, calibration=empty)
    _says(caught, "no batch", "used up", "leave it out")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_calibration_inputs_that_are_not_finite(bad: float, untouched: Any) -> None:
    spoiled = _X.clone()
    spoiled[0, 0, 0, 0] = bad
    with pytest.raises(CalibrationError) as caught:
        gdnsq_fx.prepare(untouched(_Net()), _X, calibration=[_X, spoiled])
    _says(caught, "batch 2", "NaN or infinite", "remove or repair")
    with pytest.warns(UserWarning), pytest.raises(CalibrationError, match="batch 1"):
        gdnsq_fx.prepare(untouched(_Net()), spoiled)


class _Divides(_Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).mean((2, 3)) / 0.0)


def test_values_that_stop_being_finite_inside(untouched: Any) -> None:
    with pytest.raises(CalibrationError) as caught:
        gdnsq_fx.prepare(untouched(_Divides()), _X, calibration=[_X])
    _says(caught, "fc.input", "although the inputs are finite", "layers before it")


@pytest.mark.parametrize("name", ["conv.weight", "fc.weight", "norm.bias"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_parameters_that_are_not_finite(name: str, bad: float, untouched: Any) -> None:
    model = _Net()
    model.get_parameter(name).data.view(-1)[0] = bad
    with pytest.raises(CalibrationError) as caught:
        gdnsq_fx.prepare(untouched(model), _X, calibration=[_X])
    _says(caught, "NaN or infinite", "weights")


def test_calibration_of_another_structure_or_device(untouched: Any) -> None:
    for batch in (_X[0], (_X.long(), 1), {"x": _X}, None):
        with pytest.raises(BatchStructureError) as caught:
            gdnsq_fx.prepare(untouched(_Net()), _X, calibration=[batch])
        _says(caught, "expected Tensor[*, 3, 6, 6] float32", "got")
    with pytest.raises(DeviceMismatchError):
        gdnsq_fx.prepare(untouched(_Net()), _X, calibration=[_X.to("meta")])


def test_an_example_that_is_none_of_the_three_kinds(untouched: Any) -> None:
    for example in (None, 3, "x", {1: _X}):
        with pytest.raises(BatchStructureError, match="example input"):
            gdnsq_fx.prepare(untouched(_Net()), example)  # type: ignore[arg-type]


def test_an_example_that_the_model_cannot_take(untouched: Any) -> None:
    for example in (_X[:, :2], (_X, _X), {"y": _X}, torch.zeros(8, 3, 6, 6).long()):
        with pytest.raises(CaptureError) as caught:
            gdnsq_fx.prepare(untouched(_Net()), example, calibration=[example])
        _says(caught, "_Net fails on the example input", "Check example_input")


@pytest.mark.parametrize("name", ["graph", "meta", "code", "recompile"])
def test_a_child_named_like_a_part_of_a_graph_module(name: str, untouched: Any) -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return self._modules[name](x)  # type: ignore[misc]

    model = Net()
    model._modules[name] = nn.Conv2d(3, 4, 3)
    with pytest.raises(CaptureError):
        gdnsq_fx.prepare(untouched(model), _X, calibration=[_X])


# --- constants --------------------------------------------------------------------


def _constant(where: str, value: float) -> tuple[nn.Module, Tensor]:
    model, x = _Net(), _X.clone()
    if where == "activation":
        return model, torch.full_like(x, value)
    if where == "channel":
        model.conv.weight.data[1] = value
    elif where == "weight":
        model.conv.weight.data.fill_(value)
    else:
        model.conv.weight.data.fill_(value)
        model.fc.weight.data.fill_(value)
        x = torch.full_like(x, value)
    return model, x


@pytest.mark.parametrize("value", [0.0, 0.37, -2.0])
@pytest.mark.parametrize("where", ["activation", "channel", "weight", "everything"])
def test_constants_go_the_whole_way(where: str, value: float, tmp_path: Path) -> None:
    model, x = _constant(where, value)
    config = QuantConfig(weight_bits=2, act_bits=2)
    qmodel = gdnsq_fx.prepare(model, x, config, [x])
    assert qmodel.eval()(x).isfinite().all()
    report = gdnsq_fx.analyze(qmodel, [x], confirm=1)
    assert "nan" not in str(report) and "inf" not in str(report)
    result = gdnsq_fx.finetune(qmodel, [x], steps=100, progress=False)
    assert result.budget_met
    assert all(v.isfinite().all() for v in qmodel.state_dict().values())
    imodel = gdnsq_fx.convert(qmodel)
    wanted = qmodel(x).detach()
    assert wanted.isfinite().all()
    assert torch.equal(imodel(x), wanted)
    gdnsq_fx.save(imodel, tmp_path / "model.safetensors")
    loaded = gdnsq_fx.load(tmp_path / "model.safetensors", _Net(), x)
    assert torch.equal(loaded(x), wanted)


@pytest.mark.parametrize("offset", ["free", "half_step", "integer"])
@pytest.mark.parametrize("bits", [1, 2, 8, 16])
@pytest.mark.parametrize("value", [0.0, 0.37, -2.0, 1e-20])
def test_a_constant_is_represented_exactly(
    bits: int, offset: str, value: float
) -> None:
    model, x = _constant("everything", value)
    settings: Any = {"first_last": None, "offset": offset}
    config = QuantConfig(weight_bits=bits, act_bits=bits, **settings)
    qmodel = gdnsq_fx.prepare(model, x, config, [x])
    for site in weight_sites(qmodel):
        torch.testing.assert_close(site.quantizer(site.weight()), site.weight())
    first = qmodel.get_submodule("quantizers.conv_input")
    torch.testing.assert_close(first(x), x)


@pytest.mark.parametrize("scale", [1e-30, 1e-38, 1e-40, 1e-43, 1e30])
def test_extreme_scales_do_not_divide_by_zero(scale: float) -> None:
    model = nn.Linear(4, 3)
    model.weight.data *= scale
    x = torch.rand(8, 4) * min(scale, 1.0)
    for bits in (1, 16):
        config = QuantConfig(weight_bits=bits, act_bits=bits, first_last=None)
        qmodel = gdnsq_fx.prepare(model, x, config, [x]).eval()
        assert qmodel(x).isfinite().all()
        assert gdnsq_fx.convert(qmodel)(x).isfinite().all()


@pytest.mark.parametrize("offset", ["free", "half_step", "integer"])
@pytest.mark.parametrize(
    ("dtype", "mean", "spread", "bits"),
    [
        (torch.float32, 1.0, 1e-6, 3),
        (torch.float32, 1000.0, 0.16, 14),
        (torch.float32, 1000.0, 7e-4, 11),
        (torch.bfloat16, 0.0, 0.2, 8),
        (torch.bfloat16, 0.0, 1.0, 16),
        (torch.float16, 0.0, 0.7, 9),
        (torch.float16, 1.0, 0.3, 14),
    ],
)
def test_rounding_errors_cost_no_bit(
    dtype: torch.dtype, mean: float, spread: float, bits: int, offset: Any
) -> None:
    """Channels that vary little about a mean, and weights in half precision."""
    model = nn.Linear(50, 64)
    model.weight.data = mean + spread * torch.randn(64, 50)
    model, x = model.to(dtype), torch.randn(4, 50).to(dtype)
    config = QuantConfig(bits, 8, first_last=None, offset=offset)
    qmodel = gdnsq_fx.prepare(model, x, config, [x])
    assert hard_bits(qmodel)["linear.weight"] <= bits


# --- devices and wrong kinds of model ---------------------------------------------


def test_model_on_another_device_than_the_input(untouched: Any) -> None:
    with pytest.raises(DeviceMismatchError) as caught:
        gdnsq_fx.prepare(_Net().to("meta"), _X, calibration=[_X])
    _says(caught, "model is on meta", "is on cpu", "move one to the other")
    with pytest.raises(DeviceMismatchError, match="model is on cpu"):
        gdnsq_fx.analyze(untouched(_prepared()), [_X.to("meta")])
    with pytest.raises(DeviceMismatchError, match="model is on cpu"):
        _finetune(_prepared(), [_X.to("meta")])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_model_on_the_gpu_and_input_on_the_cpu() -> None:
    with pytest.raises(DeviceMismatchError, match=r"model is on cuda:0.*on cpu"):
        gdnsq_fx.prepare(_Net().cuda(), _X)
    x = _X.cuda()
    qmodel = gdnsq_fx.prepare(_Net().cuda(), x, calibration=[x])
    gdnsq_fx.finetune(qmodel, [x], steps=3, progress=False)
    assert torch.equal(gdnsq_fx.convert(qmodel)(x), qmodel(x))


def _finetune(qmodel: Any, batches: Any) -> Any:
    return gdnsq_fx.finetune(qmodel, batches, steps=2, progress=False)


_USES: dict[str, Callable[[Any], Any]] = {
    "analyze": lambda model: gdnsq_fx.analyze(model, [_X]),
    "finetune": lambda model: _finetune(model, [_X]),
    "convert": gdnsq_fx.convert,
    "save": lambda model: gdnsq_fx.save(model, "never-written.safetensors"),
}


@pytest.mark.parametrize("use", _USES)
@pytest.mark.parametrize("kind", ["plain", "traced"])
def test_a_model_that_was_not_prepared(kind: str, use: str, untouched: Any) -> None:
    model = untouched(_Net() if kind == "plain" else torch.fx.symbolic_trace(_Net()))
    with pytest.raises(PassError) as caught:
        _USES[use](model)
    _says(caught, "convert" if use == "save" else "gdnsq_fx.prepare")
    assert not Path("never-written.safetensors").exists()


@pytest.mark.parametrize("use", ["analyze", "finetune", "convert"])
def test_a_model_that_was_converted_already(use: str) -> None:
    imodel = gdnsq_fx.convert(_prepared())
    wanted = imodel(_X)
    with pytest.raises(PassError):
        _USES[use](imodel)
    assert torch.equal(imodel(_X), wanted) and not imodel.training


def test_saving_a_model_that_was_not_converted(tmp_path: Path) -> None:
    with pytest.raises(PassError) as caught:
        gdnsq_fx.save(_prepared(), tmp_path / "model.safetensors")
    _says(caught, "only a converted model", "gdnsq_fx.convert")
    assert not list(tmp_path.iterdir())


def test_preparing_a_prepared_model(untouched: Any) -> None:
    """Its quantizers would be kept, and the new configuration ignored."""
    with pytest.raises(PassError, match="was prepared or converted before"):
        gdnsq_fx.prepare(untouched(_prepared()), _X, QuantConfig(2, 2), [_X])


def test_preparing_a_converted_model() -> None:
    imodel = gdnsq_fx.convert(_prepared())
    wanted = imodel(_X)
    with pytest.raises(GdnsqError):
        gdnsq_fx.prepare(imodel, _X, QuantConfig(2, 2), [_X])
    assert torch.equal(imodel(_X), wanted)


def test_folding_batch_norm_while_training(untouched: Any) -> None:
    with pytest.raises(PassError, match="off while training"):
        gdnsq_fx.prepare(
            untouched(_Net().train()), _X, calibration=[_X], fold_batch_norm=True
        )


def test_converting_weights_that_became_nan() -> None:
    qmodel = _prepared()
    qmodel.fc.weight.data[0, 0] = float("nan")
    with pytest.raises(PassError, match=r"fc\.weight holds NaN"):
        gdnsq_fx.convert(qmodel)
    assert len(sites(qmodel)) == 4


# --- analysis and training --------------------------------------------------------


@pytest.mark.parametrize("empty", [[], iter([]), _used_up()])
def test_no_batch_to_analyze_or_train_on(empty: Any, untouched: Any) -> None:
    with pytest.raises(CalibrationError, match="no batch; pass a non-empty"):
        gdnsq_fx.analyze(untouched(_prepared()), empty)
    with pytest.raises(GdnsqError, match="0 of the 2 batches"):
        _finetune(_prepared(), empty)


def test_a_loss_that_turns_nan_keeps_the_last_good_state() -> None:
    qmodel, calls = _prepared(), []

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        calls.append(output)
        factor = float("nan") if len(calls) == 8 else 1.0
        return (output * factor).square().mean()

    with pytest.raises(TrainingDivergedError) as caught:
        gdnsq_fx.finetune(
            qmodel,
            [(_X, torch.zeros(8))],
            steps=100,
            task_loss=loss,
            progress=False,
        )
    _says(caught, "step 7", "last good state", "Lower lr")
    assert caught.value.step == 7
    assert all(v.isfinite().all() for v in qmodel.state_dict().values())
    assert qmodel.eval()(_X).isfinite().all()


def test_training_batches_that_are_not_finite() -> None:
    qmodel = _prepared()
    with pytest.raises(TrainingDivergedError, match="check the batch for NaN"):
        _finetune(qmodel, [_X * float("nan")])
    assert all(v.isfinite().all() for v in qmodel.state_dict().values())


@pytest.mark.parametrize("wrong", [_X[0], {"x": _X}, _X.to("meta")])
def test_a_first_batch_that_is_refused_changes_nothing(wrong: Any) -> None:
    qmodel = _prepared(weight_bits=2)
    _, before = _snapshot(qmodel)
    with pytest.raises((BatchStructureError, DeviceMismatchError)):
        _finetune(qmodel, [wrong])
    assert all(torch.equal(v, before[k]) for k, v in qmodel.state_dict().items())


def test_a_training_step_that_breaks_the_weights_is_not_a_success() -> None:
    """The last update is followed by no loss that could show it."""
    qmodel = _prepared()
    with pytest.raises(TrainingDivergedError):
        gdnsq_fx.finetune(qmodel, [_X], steps=1, lr=float("inf"), progress=False)
    assert all(v.isfinite().all() for v in qmodel.state_dict().values())


# --- files ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("saved") / "model.safetensors"
    gdnsq_fx.save(gdnsq_fx.convert(_prepared()), path)
    return path.read_bytes()


def _refused(content: bytes, tmp_path: Path, model: nn.Module | None = None) -> str:
    """What `load` says about a file; model and example stay as they were."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    model = model or _Net()
    modes, tensors = _snapshot(model)
    with pytest.raises(FileFormatError) as caught:
        gdnsq_fx.load(path, model, _X)
    assert str(path) in str(caught.value)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, tensors[k]) for k, v in model.state_dict().items())
    return str(caught.value)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_truncated_files(share: float, saved: bytes, tmp_path: Path) -> None:
    message = _refused(saved[: int(len(saved) * share)], tmp_path)
    assert "copy the file again" in message


class _Explosive:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("exploded"),))


def test_pickles_are_never_read(tmp_path: Path) -> None:
    assert "never unpickled" in _refused(pickle.dumps(_Explosive()), tmp_path)
    path = tmp_path / "weights.pt"
    torch.save(_Net().state_dict(), path)
    assert "never unpickled" in _refused(path.read_bytes(), tmp_path)
    assert not Path("exploded").exists()


def test_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    save_file(_Net().state_dict(), path)
    message = _refused(path.read_bytes(), tmp_path)
    assert "gdnsq_fx did not write it" in message and "load_file instead" in message
    for content in (b"", b"{}", b"\x00" * 100, b"hello, world", bytes(range(256))):
        _refused(content, tmp_path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        gdnsq_fx.load(tmp_path / "none.safetensors", _Net(), _X)
    with pytest.raises(IsADirectoryError):
        gdnsq_fx.load(tmp_path, _Net(), _X)


class _OtherNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.convolution(x).mean((2, 3)))


class _WithoutNorm(_Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).relu().mean((2, 3)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: _Net(width=6),
        _OtherNames,
        _WithoutNorm,
        nn.ReLU,
        lambda: _Net().double(),
        lambda: _Net().half(),
    ],
)
def test_files_of_another_model(make: Any, saved: bytes, tmp_path: Path) -> None:
    """Another width, other names, fewer layers, no layer, or another precision."""
    model = make()
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    path = tmp_path / "model.safetensors"
    path.write_bytes(saved)
    with pytest.raises(FileFormatError) as caught:
        gdnsq_fx.load(path, model, _X.to(dtype))
    _says(caught, str(path), "does not fit this model", "Load it into the class")


def test_a_file_whose_patterns_do_not_fit_the_model(tmp_path: Path) -> None:
    config = QuantConfig(exclude=("fc",), overrides={"conv": {"weight_bits": 3}})
    qmodel = gdnsq_fx.prepare(_Net(), _X, config, [_X])
    gdnsq_fx.save(gdnsq_fx.convert(qmodel), tmp_path / "model.safetensors")
    with pytest.raises(FileFormatError, match="does not fit this model"):
        gdnsq_fx.load(tmp_path / "model.safetensors", _OtherNames(), _X)


def test_loading_onto_meta(saved: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(saved)
    with pytest.raises(DeviceMismatchError):
        gdnsq_fx.load(path, _Net().to("meta"), _X)
