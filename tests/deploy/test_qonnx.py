"""Files of QONNX: quantizers as trained, and what the converted model computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gdnsq_fx
from gdnsq_fx.errors import MissingExtraError, PassError
from gdnsq_fx.spec import Override

np = pytest.importorskip("numpy")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnx.reference")

_DOMAIN = "qonnx.custom_op.general"
_X = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def _own_operations() -> list[Any]:
    """The two operations as arXiv 2206.07527 defines them."""
    from onnx.reference.op_run import OpRun

    class Quant(OpRun):
        op_domain = _DOMAIN

        def _run(  # type: ignore[no-untyped-def]
            self, x, scale, zero, bits, signed=None, narrow=None, rounding_mode=None
        ):
            assert rounding_mode == "ROUND"
            low = -(2 ** (bits - 1)) + narrow if signed else 0
            high = 2 ** (bits - 1) - 1 if signed else 2**bits - 1 - narrow
            codes = np.clip(np.rint(x / scale + zero), low, high)
            return (((codes - zero) * scale).astype(x.dtype),)

    class BipolarQuant(OpRun):
        op_domain = _DOMAIN

        def _run(self, x, scale):  # type: ignore[no-untyped-def]
            return (np.where(x >= 0, scale, -scale).astype(x.dtype),)

    return [Quant, BipolarQuant]


def _attributes(node: Any) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


@pytest.mark.parametrize("offset", ["free", "half_step", "integer"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_computes_what_the_converted_model_does(
    converted_residual, bits: int, offset: Any, tmp_path: Path
) -> None:
    imodel = converted_residual(_X, bits, offset=offset)
    path = tmp_path / "model.onnx"
    size = gdnsq_fx.export(imodel, path, _X, format="qonnx")
    assert size == path.stat().st_size
    written = onnx.load(path)
    kinds = [node.op_type for node in written.graph.node if node.domain == _DOMAIN]
    assert len(kinds) == 6
    evaluator = onnx.reference.ReferenceEvaluator(written, new_ops=_own_operations())
    (name,) = evaluator.input_names
    for count in (8, 1):
        got = torch.tensor(evaluator.run(None, {name: _X[:count].numpy()})[0])
        wanted = imodel(_X[:count]).detach()
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_scales_and_bits_are_the_trained_ones(
    converted_residual, tmp_path: Path
) -> None:
    overrides = {"fc": Override(weight_bits=3, act_bits=5)}
    imodel = converted_residual(_X, 4, overrides=overrides)
    gdnsq_fx.export(imodel, tmp_path / "m.onnx", _X, format="qonnx")
    graph = onnx.load(tmp_path / "m.onnx").graph
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    quants = [node for node in graph.node if node.op_type == "Quant"]
    widths = [int(stored[node.input[3]]) for node in quants]
    assert sorted(widths) == [3, 4, 4, 4, 4, 5]
    steps = {
        tuple(grid.step.flatten().tolist()) for grid in imodel.quantizers.children()
    }
    assert {tuple(stored[n.input[1]].flatten().tolist()) for n in quants} == steps


@pytest.mark.parametrize(
    ("levels", "kind"),
    [
        ([-2.0, -1.0, 0.0, 1.0], {"signed": 1, "narrow": 0, "bits": 2}),
        ([-1.0, 0.0, 1.0], {"signed": 1, "narrow": 1, "bits": 2}),
        ([0.0, 1.0, 2.0, 3.0], {"signed": 0, "narrow": 0, "bits": 2}),
        ([-0.5, 0.5], "bipolar"),
        ([-1.5, -0.5, 0.5, 1.5], {"signed": 0, "narrow": 0, "bits": 2}),
    ],
)
def test_the_form_of_a_weight(levels: list[float], kind: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 4, bias=False)
    values = torch.tensor(levels)[torch.arange(32) % len(levels)].reshape(4, 8)
    config = gdnsq_fx.QuantConfig(per_channel=False, first_last=None)
    x = torch.randn(6, 8)
    qmodel = gdnsq_fx.prepare(nn.Sequential(layer), x, config, [x])
    imodel = gdnsq_fx.convert(qmodel)
    grid = imodel.quantizers.get_submodule("0_weight")
    grid.codes = (values - min(levels)).to(torch.uint8)
    grid.step.fill_(1.0)
    grid.offset.fill_(min(levels))
    gdnsq_fx.export(imodel, tmp_path / "m.onnx", x, format="qonnx")
    graph = onnx.load(tmp_path / "m.onnx").graph
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    (node,) = [n for n in graph.node if n.domain == _DOMAIN and n.input[0] in stored]
    assert np.array_equal(stored[node.input[0]], values.numpy())
    if kind == "bipolar":
        assert node.op_type == "BipolarQuant" and stored[node.input[1]] == 0.5
        return
    found = _attributes(node)
    assert {"signed": found["signed"], "narrow": found["narrow"]} == {
        key: kind[key] for key in ("signed", "narrow")
    }
    assert found["rounding_mode"] == b"ROUND"
    assert int(stored[node.input[3]]) == kind["bits"]
    zero = float(stored[node.input[2]].item())
    assert zero == (0.0 if kind["signed"] else -min(levels))


def test_refusals(
    converted_residual, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = converted_residual(_X, 4, deployable=True)
    with pytest.raises(PassError, match="without deployable=True"):
        gdnsq_fx.export(model, tmp_path / "m.onnx", _X, format="qonnx")
    imodel = converted_residual(_X, 2)
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(MissingExtraError, match=r"gdnsq-fx\[onnx\]"):
        gdnsq_fx.export(imodel, tmp_path / "m.onnx", _X, format="qonnx")


def test_qonnx_itself_computes_the_same(converted_residual, tmp_path: Path) -> None:
    execution = pytest.importorskip("qonnx.core.onnx_exec")
    wrapper = pytest.importorskip("qonnx.core.modelwrapper")
    imodel = converted_residual(_X, 3)
    path = tmp_path / "m.onnx"
    gdnsq_fx.export(imodel, path, _X, format="qonnx", dynamic_batch=False)
    model = wrapper.ModelWrapper(str(path))
    (given,) = [i.name for i in model.graph.input]
    (wanted,) = [o.name for o in model.graph.output]
    got = execution.execute_onnx(model, {given: _X.numpy()})[wanted]
    torch.testing.assert_close(
        torch.tensor(got), imodel(_X).detach(), rtol=1e-4, atol=1e-4
    )
