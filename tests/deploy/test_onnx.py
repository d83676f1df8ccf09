"""A file of ONNX computes what the reference, and the model, compute."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gdnsq_fx
from gdnsq_fx.deploy.reference import ReferenceExecutor
from gdnsq_fx.errors import MissingExtraError, PassError

_X = torch.randn(64, 3, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bits", [8, 4, 2, 1])
def test_three_executors_agree(prepared_residual, bits: int, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    qmodel = prepared_residual(_X, bits)
    path = tmp_path / "model.onnx"
    assert gdnsq_fx.export(gdnsq_fx.convert(qmodel), path, _X) == path.stat().st_size
    model = gdnsq_fx.convert(qmodel, deployable=True)
    reference, own = ReferenceExecutor(model).run(_X), model(_X).detach()
    written = onnx.load(path)
    onnx.checker.check_model(written, full_check=True)
    assert written.opset_import[0].version == 21
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (name,) = [given.name for given in session.get_inputs()]
    for count in (64, 1, 3):
        got = torch.tensor(session.run(None, {name: _X[:count].numpy()})[0])
        spread = float(reference.max() - reference.min())
        assert torch.equal(got.argmax(1), reference[:count].argmax(1))
        assert torch.equal(own[:count].argmax(1), reference[:count].argmax(1))
        assert float((got - reference[:count]).abs().max()) <= 0.01 * spread


class _Biased(nn.Module):
    """Fused attention with a bias that is a permuted buffer; one row for each token."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.out = nn.Linear(8, 4)
        self.register_buffer("table", torch.randn(5, 5, 2).permute(2, 0, 1))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).reshape(-1, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, self.table)
        return self.out(mixed.transpose(1, 2).reshape(-1, 5, 8))


def test_fused_attention_and_a_permuted_buffer(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    x = torch.randn(6, 5, 8)
    qmodel = gdnsq_fx.prepare(_Biased().eval(), x, calibration=[x])
    imodel = gdnsq_fx.convert(qmodel, calibration=[x])
    path = tmp_path / "model.onnx"
    gdnsq_fx.export(imodel, path, x, dynamic_batch=False)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    got = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    torch.testing.assert_close(torch.tensor(got), imodel(x).detach(), atol=0.05, rtol=0)
    assert gdnsq_fx.verify(
        imodel, path, [x], runtimes=["torch", "onnxruntime"], progress=False
    ).ok


class _TwoReaders(nn.Module):
    """One tensor that two layers read, each with levels of its own, which are the same.

    Its arguments are usually given in another order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)
        self.third = nn.Linear(3, 4)

    def forward(self, x: Tensor, extra: Tensor) -> Tensor:
        x = x.relu()
        added = self.second(x[:, 0:]) + self.third(extra)
        return self.first(x).mean(1, keepdim=True) + added


def test_one_value_of_two_edges_and_arguments_in_another_order(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    batch = {"extra": torch.randn(6, 3), "x": torch.randn(6, 8)}
    config = gdnsq_fx.QuantConfig(4, 4, first_last=None)
    qmodel = gdnsq_fx.prepare(_TwoReaders().eval(), batch, config, [batch])
    imodel = gdnsq_fx.convert(qmodel)
    path = tmp_path / "model.onnx"
    gdnsq_fx.export(imodel, path, batch)
    found = gdnsq_fx.verify(
        imodel, path, [batch], runtimes=["torch", "onnxruntime"], progress=False
    )
    assert found.ok
    assert [len(one.edges) for one in found.runtimes] == [3, 3]


class _Overlapping(nn.Module):
    """Windows that overlap, as views of a permuted tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x).permute(1, 0, 2)
        batch, time, channel = x.stride()
        size, stride = (x.shape[0], 4, 3, 8), (batch, time, time, channel)
        return self.outer(x.as_strided(size, stride))


def test_overlapping_views_of_a_permuted_tensor(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    x = torch.randn(6, 5, 8)
    qmodel = gdnsq_fx.prepare(_Overlapping().eval(), x, calibration=[x])
    imodel = gdnsq_fx.convert(qmodel, deployable=True)
    path = tmp_path / "model.onnx"
    gdnsq_fx.export(imodel, path, x, dynamic_batch=False)
    found = gdnsq_fx.verify(imodel, path, [x], runtimes=["onnxruntime"], progress=False)
    assert found.ok, found


def test_without_onnx_the_extra_is_named(
    converted_residual, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    imodel = converted_residual(_X, 2)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingExtraError, match=r"gdnsq-fx\[onnx\]"):
        gdnsq_fx.export(imodel, tmp_path / "model.onnx", _X)
    assert not list(tmp_path.iterdir())


def test_refuses_what_is_not_converted(tmp_path: Path) -> None:
    x = _X[:, 0, 0, :4]
    qmodel = gdnsq_fx.prepare(nn.Linear(4, 2), x, calibration=[x])
    with pytest.raises(PassError):
        gdnsq_fx.export(qmodel, tmp_path / "model.onnx", _X[:, 0, 0, :4])
