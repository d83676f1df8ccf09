"""`convert(..., calibration=...)`: in a runtime, every layer is an integer kernel."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import gdnsq_fx
from gdnsq_fx.annotations import model_facts
from gdnsq_fx.deploy.qdq import deploy_facts
from gdnsq_fx.deploy.reference import ReferenceExecutor
from gdnsq_fx.passes import Calibrate, QuantizeBetweenLayers, run_passes

_X = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))


class _Net(nn.Module):
    """Sums before and behind a ReLU, a smooth function, a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.one = nn.Conv2d(8, 8, 3, padding=1)
        self.two = nn.Conv2d(8, 8, 3, padding=1)
        self.both = nn.Conv2d(16, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        y = (self.one(x) + x).relu()
        z = self.two(y) + y
        w = self.both(torch.cat([y, z.sigmoid()], 1))
        return self.fc((w + x).mean((2, 3)))


def _prepared(model: nn.Module, **settings: Any) -> GraphModule:
    given: dict[str, Any] = {"weight_bits": 4, "act_bits": 4, "first_last": 8}
    config = gdnsq_fx.QuantConfig(**{**given, **settings})
    return gdnsq_fx.prepare(model.eval(), _X, config, [_X])


def _operations(path: Path) -> Counter[str]:
    """What onnxruntime makes of a file."""
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    written = path.with_suffix(".optimized.onnx")
    options = runtime.SessionOptions()
    options.optimized_model_filepath = str(written)
    options.log_severity_level = 3  # a remark that the file is of this machine
    runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(written).graph.node)


def test_resnet18_is_integer_throughout(tmp_path: Path) -> None:
    models = pytest.importorskip("torchvision.models")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    qmodel = _prepared(models.resnet18(), weight_bits=8, act_bits=8)
    imodel = gdnsq_fx.convert(qmodel, calibration=[_X])
    gdnsq_fx.export(imodel, tmp_path / "model.onnx", _X)
    found = _operations(tmp_path / "model.onnx")
    # What the last sum writes is averaged, in floating point.
    assert (found["QLinearConv"], found["QLinearAdd"]) == (20, 7)
    assert not found["Conv"] and not found["FusedConv"]


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_runtimes_compute_what_the_reference_computes(
    bits: int, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    qmodel = _prepared(_Net(), weight_bits=bits, act_bits=bits)
    imodel = gdnsq_fx.convert(qmodel, calibration=[_X])
    path = tmp_path / "model.onnx"
    gdnsq_fx.export(imodel, path, _X)
    runtimes = ["torch", "onnxruntime"]
    found = gdnsq_fx.verify(imodel, path, [_X], runtimes=runtimes, progress=False)
    assert found.ok, str(found)
    operations = _operations(path)
    assert operations["QLinearConv"] == 4
    assert not operations["Conv"] and not operations["FusedConv"]
    gdnsq_fx.export(gdnsq_fx.convert(qmodel), path, _X)
    assert _operations(path)["QLinearConv"] < 4


def test_a_file_holds_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    qmodel = _prepared(_Net(), overrides={"one": {"act_bits": 8}})
    imodel = gdnsq_fx.convert(qmodel, calibration=[_X])
    gdnsq_fx.save(imodel, tmp_path / "model.safetensors")
    loaded = gdnsq_fx.load(tmp_path / "model.safetensors", _Net(), _X)
    assert torch.equal(loaded(_X), imodel(_X))
    assert not torch.equal(gdnsq_fx.convert(qmodel)(_X), imodel(_X))


def test_the_prepared_model_is_left_alone() -> None:
    torch.manual_seed(0)
    qmodel = _prepared(_Net())
    code, names = qmodel.code, set(qmodel.state_dict())
    model = gdnsq_fx.convert(qmodel, deployable=True, calibration=[_X])
    assert qmodel.code == code and set(qmodel.state_dict()) == names
    assert model_facts(qmodel).between is None and deploy_facts(model).kept == {}
    executor = ReferenceExecutor(model)
    executor.run(_X)
    assert len(executor.integer) == 5 and not executor.floating


def test_grids_that_were_there_before_fine_tuning_stay() -> None:
    torch.manual_seed(0)
    qmodel = _prepared(_Net())
    wanted = gdnsq_fx.convert(qmodel, calibration=[_X])
    place = Calibrate([_X], model_facts(qmodel).inputs, added=True)
    run_passes(qmodel, (QuantizeBetweenLayers(), place))
    assert torch.equal(gdnsq_fx.convert(qmodel)(_X), wanted(_X))
    other = 2 * _X
    again = gdnsq_fx.convert(qmodel, calibration=[other])
    assert torch.equal(again(_X), wanted(_X))
    result = gdnsq_fx.finetune(qmodel, [_X], steps=2, teacher=_Net(), progress=False)
    assert result.bits["add.input"] <= 8
