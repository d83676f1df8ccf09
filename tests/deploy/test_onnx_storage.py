"""Weights below 8 bits in an ONNX file: their size, their codes, the same kernels."""

from __future__ import annotations

import collections
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import gdnsq_fx
from gdnsq_fx.deploy import onnx as onnx_format
from gdnsq_fx.deploy.onnx_storage import pack_weights
from gdnsq_fx.deploy.openvino_core import openvino_core
from gdnsq_fx.deploy.program import Example

onnx = pytest.importorskip("onnx")
onnx_ir = pytest.importorskip("onnx_ir")
runtime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

_X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
_BITS = {**{f"convs.{bits}": bits for bits in range(1, 7)}, "up": 3, "fc": 2}


class _Net(nn.Module):
    """A layer for each width, sizes that fill no byte, channels along dimension 1."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [3, 61, 62, 61, 62, 61, 62, 61]
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(sizes)
        )
        self.norm = nn.BatchNorm2d(61)
        self.up = nn.ConvTranspose2d(61, 63, 2, stride=2)
        self.fc = nn.Linear(63, 301)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = conv(x).relu()
        return self.fc(self.up(self.norm(x)).relu().mean((2, 3)))


class _Files(NamedTuple):
    model: GraphModule
    plain: Path
    packed: Path


def _write(model: GraphModule, folder: Path) -> _Files:
    """The same export with int8 weights and with packed ones."""
    plain, packed = folder / "plain.onnx", folder / "packed.onnx"
    onnx_format.write_onnx(model, Example((_X,), {}), plain, packed=False)
    again = onnx_ir.load(plain)
    pack_weights(again)
    onnx_format.save(again, packed)
    return _Files(model, plain, packed)


def _deployable(net: nn.Module, bits: dict[str, int], **settings: Any) -> GraphModule:
    torch.manual_seed(0)
    overrides = {name: {"weight_bits": width} for name, width in bits.items()}
    settings = {"act_bits": 8, "weight_bits": 8, "first_last": None, **settings}
    config = gdnsq_fx.QuantConfig(overrides=overrides, **settings)
    qmodel = gdnsq_fx.prepare(net.eval(), _X, config, [_X])
    return gdnsq_fx.convert(qmodel, deployable=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> _Files:
    torch.manual_seed(0)
    return _write(_deployable(_Net(), _BITS), tmp_path_factory.mktemp("files"))


def _name(layer: str) -> str:
    return f"quantizers.{layer.replace('.', '_')}_weight.codes"


def _session(path: Path | bytes, optimized: Path | None = None) -> Any:
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _outputs(session: Any) -> list[Any]:
    return session.run(None, {session.get_inputs()[0].name: _X.numpy()})


def test_codes_come_back(files: _Files) -> None:
    written = onnx.load(files.packed)
    onnx.checker.check_model(written, full_check=True)
    assert written.opset_import[0].version == 21
    names = [_name(layer) for layer in _BITS]
    assert {one.name for one in written.graph.initializer}.isdisjoint(names)
    for name in names:
        written.graph.output.append(onnx.ValueInfoProto(name=name))
    codes = _outputs(_session(written.SerializeToString()))[1:]
    for name, found in zip(names, codes, strict=True):
        assert torch.equal(torch.tensor(found), files.model.get_buffer(name)), name


def test_openvino_unpacks_the_same_codes(files: _Files) -> None:
    pytest.importorskip("openvino")
    core = openvino_core()
    names = [_name(layer) for layer in _BITS]
    read = core.read_model(files.packed)
    read.add_outputs(names)
    model = core.compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = model([_X.numpy()])
    for name, output in zip(names, model.outputs[-len(names) :], strict=True):
        codes = torch.tensor(found[output])
        assert torch.equal(codes, files.model.get_buffer(name)), name


def test_the_same_kernels_and_results(files: _Files) -> None:
    found = []
    for path in (files.plain, files.packed):
        session = _session(path, path.with_suffix(".optimized"))
        nodes = onnx.load(path.with_suffix(".optimized")).graph.node
        kinds = collections.Counter(node.op_type for node in nodes)
        found.append((kinds, _outputs(session)[0].tobytes()))
    assert found[0] == found[1]
    assert found[0][0]["QLinearConv"] >= 1 and "BitShift" not in found[1][0]


def test_weights_take_their_bits(files: _Files) -> None:
    """And each some 2 kB for what unpacks it."""
    plain, packed = files.plain.stat().st_size, files.packed.stat().st_size
    counts = {name: files.model.get_buffer(_name(name)).numel() for name in _BITS}
    saved = sum(counts[name] * (8 - bits) / 8 for name, bits in _BITS.items())
    assert 0 <= saved - (plain - packed) <= 2048 * len(_BITS)
    graph = onnx.load(files.packed).graph
    sizes = collections.Counter(
        (one.data_type, len(one.raw_data)) for one in graph.initializer
    )
    kinds = {4: onnx.TensorProto.UINT4, 2: onnx.TensorProto.UINT8}
    for layer in ("convs.4", "convs.2"):
        bits, count = _BITS[layer], counts[layer]
        assert sizes[kinds[bits], -(-count * bits // 8)] >= 1


def test_nothing_else_is_stored(files: _Files) -> None:
    """No source lines of the exporter, no shapes of inner values, no zeros twice."""
    written = onnx.load(files.packed)
    assert not written.graph.value_info and not written.metadata_props
    assert not any(n.metadata_props or n.doc_string for n in written.graph.node)
    assert b"test_onnx_storage" not in files.packed.read_bytes()
    stored = [
        (t.data_type, tuple(t.dims), onnx.numpy_helper.to_array(t).tobytes())
        for t in written.graph.initializer
    ]
    assert len(set(stored)) == len(stored)


class _Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 64, 5, padding=2, bias=False)
        self.norm = nn.BatchNorm2d(64)
        self.fc = nn.Linear(64, 128)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv(x)).relu().mean((2, 3)))


def test_channels_that_were_coarsened(tmp_path: Path) -> None:
    """A normalization with a gamma of nearly 0 leaves codes of no pattern."""
    net = _Small()
    gammas = torch.logspace(-8, -3, 9)
    net.norm.weight.data[:9] = gammas
    net.norm.bias.data[:9] = 3.0
    model = _deployable(net, {}, weight_bits=3, per_channel=True)
    files = _write(model, tmp_path)
    assert "ScatterND" in {node.op_type for node in onnx.load(files.packed).graph.node}
    got, wanted = (_outputs(_session(one))[0] for one in (files.packed, files.plain))
    assert got.tobytes() == wanted.tobytes()


def test_one_step_and_a_second_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step for all channels; a model too large for one message of protobuf."""
    model = _deployable(_Small(), {}, weight_bits=3, per_channel=False)
    monkeypatch.setattr(onnx_format, "_LARGEST", 1000)
    path = tmp_path / "model.onnx"
    size = gdnsq_fx.export(model, path, _X)
    files = {p.name: p.stat().st_size for p in tmp_path.iterdir()}
    assert files.keys() == {"model.onnx", "model.onnx.data"}
    assert size == sum(files.values())
    codes = [model.get_buffer(_name(name)).numel() for name in ("conv", "fc")]
    assert 0 <= files["model.onnx.data"] - sum(codes) * 3 / 8 <= 2048
    got = torch.tensor(_outputs(_session(path))[0])
    torch.testing.assert_close(got, model(_X).detach(), rtol=0, atol=1e-3)
