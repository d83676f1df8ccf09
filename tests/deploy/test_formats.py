"""Every format of `gdnsq_fx.export`, and how files come to be."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import gdnsq_fx
from gdnsq_fx.deploy.atomic import written_whole
from gdnsq_fx.deploy.openvino_core import openvino_core
from gdnsq_fx.deploy.reference import ReferenceExecutor
from gdnsq_fx.errors import ConfigError, ExportError, MissingExtraError, PassError

_X = torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(1))


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.mid = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu()
        x = (self.mid(x) + x).relu()
        return self.fc(x.mean((2, 3)))


def _converted(
    model: nn.Module | None = None, example: Any = _X, **settings: Any
) -> GraphModule:
    torch.manual_seed(0)
    settings = {"weight_bits": 4, "act_bits": 4, "first_last": None, **settings}
    config = gdnsq_fx.QuantConfig(**settings)
    qmodel = gdnsq_fx.prepare((model or _Net()).eval(), example, config, [example])
    return gdnsq_fx.convert(qmodel)


def _deployable(imodel: GraphModule) -> GraphModule:
    from gdnsq_fx.passes import FoldIntoScales, LowerToQdq, run_passes

    return run_passes(imodel, (FoldIntoScales(), LowerToQdq()))


def test_a_program_of_torch_export(tmp_path: Path) -> None:
    imodel = _converted()
    path = tmp_path / "model.pt2"
    assert gdnsq_fx.export(imodel, path, _X) == path.stat().st_size
    program = torch.export.load(path)
    model = _deployable(imodel)
    for count in (16, 1, 5):
        assert torch.equal(program.module()(_X[:count]), model(_X[:count]))


def test_openvino(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    imodel = _converted()
    path = tmp_path / "model.xml"
    size = gdnsq_fx.export(imodel, path, _X)
    files = {p.name: p.stat().st_size for p in tmp_path.iterdir()}
    assert files.keys() == {"model.xml", "model.bin"} and size == sum(files.values())
    hint = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino_core().compile_model(path, "CPU", hint)
    wanted = ReferenceExecutor(_deployable(imodel)).run(_X)
    spread = float(wanted.max() - wanted.min())
    for count in (16, 1, 5):
        got = torch.tensor(compiled(_X[:count].numpy())[0])
        assert float((got - wanted[:count]).abs().max()) <= 0.01 * spread


class _Skip(nn.Module):
    """OpenVINO gets such a sum wrong where the first layer has no bias."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(72, 24, 1, bias=bias)
        self.up, self.down = nn.Conv2d(24, 88, 1), nn.Conv2d(88, 24, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return x + self.down(self.up(x).relu())


@pytest.mark.parametrize("bias", [False, True])
def test_openvino_and_layers_without_bias(bias: bool, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    torch.manual_seed(0)
    net = _Skip(bias)
    if bias:
        net.first.bias.data.zero_()
    x = torch.randn(3, 72, 8, 8).relu()
    model = _deployable(_converted(net, x, act_bits=8))
    gdnsq_fx.export(model, tmp_path / "model.xml", x)
    hint = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino_core().compile_model(tmp_path / "model.xml", "CPU", hint)
    wanted = model(x).detach()
    got = torch.tensor(compiled(x.numpy())[0])
    assert float((got - wanted).abs().max()) <= 0.01 * float(
        wanted.max() - wanted.min()
    )


def test_a_batch_of_one_is_example_enough(tmp_path: Path) -> None:
    imodel = _converted()
    gdnsq_fx.export(imodel, tmp_path / "model.pt2", _X[:1])
    program = torch.export.load(tmp_path / "model.pt2").module()
    assert program(_X).shape == (16, 5)


class _Fixed(_Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.view(16, 3, 6, 6))


def test_a_batch_that_the_model_fixes(tmp_path: Path) -> None:
    imodel = _converted(_Fixed())
    with pytest.raises(ExportError, match="dynamic_batch=False"):
        gdnsq_fx.export(imodel, tmp_path / "model.pt2", _X)
    assert not list(tmp_path.iterdir())
    gdnsq_fx.export(imodel, tmp_path / "model.pt2", _X, dynamic_batch=False)
    program = torch.export.load(tmp_path / "model.pt2").module()
    assert torch.equal(program(_X), _deployable(imodel)(_X))


@pytest.mark.parametrize(
    ("name", "format", "match"),
    [
        ("model.tflite", None, r"suffix '.tflite'.*'openvino' \(.xml\)"),
        ("model", None, "suffix ''"),
        ("model.onnx", "tflite", "no format 'tflite'; known are 'onnx'"),
        ("model.onnx", "openvino", r"end it in \.xml"),
    ],
)
def test_unknown_formats(name: str, format: Any, match: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=match):
        gdnsq_fx.export(_converted(), tmp_path / name, _X, format=format)
    assert not list(tmp_path.iterdir())


def test_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtraError, match=r"gdnsq-fx\[openvino\]"):
        gdnsq_fx.export(_converted(), tmp_path / "model.xml", _X)
    assert not list(tmp_path.iterdir())


def test_refuses_what_is_not_converted(tmp_path: Path) -> None:
    qmodel = gdnsq_fx.prepare(_Net(), _X, calibration=[_X])
    for format, suffix in (("torch", "pt2"), ("qonnx", "onnx")):
        with pytest.raises(PassError, match="needs a converted model"):
            gdnsq_fx.export(qmodel, tmp_path / f"m.{suffix}", _X, format=format)


# --- files appear whole -----------------------------------------------------------


def test_after_an_error_the_old_files_stand(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), written_whole(path) as temporary:
        temporary.write_text("new")
        raise ZeroDivisionError
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    assert path.read_text() == "old"


def test_several_files_replace_several(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    for text in ("old", "new"):
        with written_whole(path) as temporary:
            temporary.write_text(text)
            temporary.with_name("model.onnx.data").write_text(text + " data")
    assert path.read_text() == "new"
    assert (tmp_path / "model.onnx.data").read_text() == "new data"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_link_is_followed_and_a_folder_refused(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "model.onnx", tmp_path / "link.onnx"
    target.write_text("old")
    link.symlink_to(target)
    with written_whole(link) as temporary:
        temporary.write_text("new")
    assert target.read_text() == "new" and link.is_symlink()
    mode = os.stat(target).st_mode & 0o777
    (tmp_path / "plain").write_text("")
    assert mode == os.stat(tmp_path / "plain").st_mode & 0o777
    with pytest.raises(IsADirectoryError), written_whole(tmp_path / "there"):
        pass
    with pytest.raises(FileNotFoundError), written_whole(tmp_path / "no" / "m.onnx"):
        pass
