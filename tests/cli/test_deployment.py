"""``gdnsq-fx export``, ``verify`` and ``bench``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import gdnsq_fx
from gdnsq_fx.cli import main

_MODELS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(torch.relu(self.conv(x)).mean((2, 3)))
"""
_GIVEN = ("given_models:Net", "--input", "1,3,8,8", "--checkpoint", "m.safetensors")
_VERIFY = ("verify", *_GIVEN, "--samples", "12", "--batch", "5")
_FAST = ("--runtime", "torch", "--runtime", "onnxruntime")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a module of a model, and a checkpoint of it."""
    (tmp_path / "given_models.py").write_text(_MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "given_models", raising=False)
    scope: dict[str, Any] = {}
    exec(_MODELS, scope)
    x = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    config = gdnsq_fx.QuantConfig(weight_bits=4, act_bits=4)
    qmodel = gdnsq_fx.prepare(scope["Net"]().eval(), x, config, [x])
    gdnsq_fx.save(gdnsq_fx.convert(qmodel), tmp_path / "m.safetensors")
    return tmp_path


@pytest.fixture
def onnx_file(folder: Path) -> Path:
    for library in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(library)
    assert main(["export", *_GIVEN, "out.onnx", "--json", "size.json"]) == 0
    return folder / "out.onnx"


def test_export(onnx_file: Path) -> None:
    size = onnx_file.stat().st_size
    written = json.loads((onnx_file.parent / "size.json").read_text())
    assert written["bytes"] == size
    before = written["checkpoint_bytes"]
    assert before == (onnx_file.parent / "m.safetensors").stat().st_size


def test_verify_is_0_where_runtimes_agree(
    onnx_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    numpy.savez("x.npz", x=numpy.random.default_rng(0).normal(size=(12, 3, 8, 8)))
    given = ("--file", "out.onnx", "--data", "x.npz", "--json", "c.json", *_FAST)
    assert main([*_VERIFY, *given]) == 0
    shown = capsys.readouterr()
    assert "agrees: torch, onnxruntime" in shown.out and "warning" not in shown.err
    written = json.loads((onnx_file.parent / "c.json").read_text())
    assert written["ok"] is True and written["inputs"] == 12


def test_verify_is_1_where_one_parts(
    onnx_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(onnx_file)
    (bias,) = [t for t in model.graph.initializer if t.name.endswith("conv_bias")]
    values = onnx.numpy_helper.to_array(bias) + numpy.float32(0.1)
    bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
    onnx.save(model, onnx_file)
    assert main([*_VERIFY, "--file", "out.onnx", *_FAST]) == 1
    assert "PARTS: onnxruntime at fc.input" in capsys.readouterr().out


def test_verify_without_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*_VERIFY, "--runtime", "torch"]) == 0
    shown = capsys.readouterr()
    assert "agrees: torch" in shown.out and "no --data" in shown.err


def test_bench(onnx_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["bench", "out.onnx", "out.onnx", "--rounds", "5", "--batch", "3"]
    assert main([*given, "--json", "b.json"]) == 0
    shown = capsys.readouterr().out
    assert "onnxruntime" in shown and "1.00x" in shown
    written = json.loads((onnx_file.parent / "b.json").read_text())
    found = [one for one in written["latencies"] if one["runtime"] == "onnxruntime"]
    assert [one["file"] for one in found] == ["out.onnx"] * 2
    for one in found:
        assert 0 < one["low_ms"] <= one["median_ms"] <= one["high_ms"]
        assert one["bytes"] == onnx_file.stat().st_size


def test_bench_of_tokens_and_open_sizes(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    make = onnx.helper
    ids = make.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["n", "length"])
    out = make.make_tensor_value_info("out", onnx.TensorProto.INT64, None)
    node = make.make_node("Add", ["ids", "ids"], ["out"])
    graph = make.make_graph([node], "tokens", [ids], [out])
    opset = [make.make_opsetid("", 21)]
    model = make.make_model(graph, opset_imports=opset, ir_version=10)
    onnx.save(model, folder / "tokens.onnx")
    assert main(["bench", "tokens.onnx", "--rounds", "2"]) == 1
    assert "--dim length=SIZE" in capsys.readouterr().err
    given = ("--rounds", "2", "--dim", "length=7")
    assert main(["bench", "tokens.onnx", *given]) == 0


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (("export", *_GIVEN, "out.txt"), "must end in .onnx"),
        (("export", *_GIVEN, "absent/out.onnx"), "no folder absent"),
        (("export", *_GIVEN[:-1], "no.safetensors", "out.onnx"), "no.safetensors"),
        ((*_VERIFY, "--file", "no.onnx"), "there is no file no.onnx"),
        ((*_VERIFY, "--runtime", "tpu"), "'tpu' is not known"),
        (("bench", "no.onnx"), "there is no file no.onnx"),
        (("bench", "given_models.py"), "cannot load given_models.py"),
    ],
)
def test_failures_are_1(
    arguments: tuple[str, ...], cause: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert cause in error and "Traceback" not in error


@pytest.mark.parametrize(
    "arguments",
    [
        ("export", "given_models:Net", "--input", "1,3,8,8", "out.onnx"),
        ("verify", "given_models:Net", "--checkpoint", "m.safetensors"),
        ("bench",),
        ("bench", "a.onnx", "--dim", "length"),
        ("bench", "a.onnx", "--dim", "length=0"),
    ],
)
def test_wrong_usage_is_2(arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
