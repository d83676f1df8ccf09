"""A certificate says which runtimes compute what the model says, and which part."""

from __future__ import annotations

import functools
import json
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

import gdnsq_fx
from gdnsq_fx.deploy.edges import CodedEdge, coded_edges
from gdnsq_fx.deploy.qdq import is_weight
from gdnsq_fx.deploy.runtimes import Observation, Runtime, tensors
from gdnsq_fx.deploy.verification import Verification
from gdnsq_fx.errors import (
    BatchStructureError,
    ConfigError,
    FileFormatError,
    MissingExtraError,
    PassError,
)

_X = torch.randn(48, 3, 6, 6, generator=torch.Generator().manual_seed(1))
_EDGES = ("conv.input", "mid.input", "fc.input")


@pytest.fixture
def converted(converted_residual) -> Callable[..., GraphModule]:
    return functools.partial(converted_residual, _X, deployable=True)


def _exported(imodel: GraphModule, folder: Path) -> Path:
    for library in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(library)
    path = folder / "model.onnx"
    gdnsq_fx.export(imodel, path, _X)
    return path


def _verified(imodel: GraphModule, path: Path | None = None, **given: Any) -> Any:
    names = ("torch",) if path is None else ("torch", "onnxruntime")
    settings = {"runtimes": names, "progress": False, **given}
    return gdnsq_fx.verify(imodel, path, _X.split(16), **settings)


# --- what agrees ---


@pytest.mark.parametrize("bits", [8, 2, 1])
def test_torch_and_onnxruntime_agree(converted, bits: int, tmp_path: Path) -> None:
    imodel = converted(bits)
    found = _verified(imodel, _exported(imodel, tmp_path))
    assert found.ok and found.inputs == 48 and found.trained is None
    assert [one.name for one in found.runtimes] == ["torch", "onnxruntime"]
    for one in found.runtimes:
        assert tuple(edge.name for edge in one.edges) == _EDGES
        counts = [edge.codes for edge in one.edges]
        assert counts == [_X.numel(), 48 * 8 * 36, 48 * 8]
        assert one.positions == 48 and one.wrong == 0
        assert one.relative_difference < 0.02
    assert len(found.integer) == 3 and found.floating == ()
    weights = 8 * 27 + 8 * 72 + 5 * 8
    assert (found.weights.codes, found.weights.differing) == (weights, {})


def test_what_was_trained_stands_beside_it(converted) -> None:
    imodel = converted(8, deployable=False)
    before = {name: value.clone() for name, value in imodel.state_dict().items()}
    found = _verified(imodel)
    assert found.ok and found.trained is not None
    assert 0 < found.trained.relative_difference < 0.1
    after = imodel.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize(
    "settings",
    [{"offset": "free"}, {"act_bits": 10}, {"scope": "full"}, {"exclude": ("mid",)}],
)
def test_other_forms(converted, settings: dict[str, Any], tmp_path: Path) -> None:
    """Grids reached in two steps, edges of more than 8 bits, sums, layers in floats."""
    imodel = converted(4, **settings)
    found = _verified(imodel, _exported(imodel, tmp_path))
    assert found.ok, str(found)
    assert all(one.codes > 48 * 8 for one in found.runtimes)
    names = [edge.name for edge in found.runtimes[0].edges]
    assert names == [edge.name for edge in found.runtimes[1].edges]


def test_batches_with_targets_are_streamed(converted) -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal most
        for n in range(12):
            most = max(most, sum(one() is not None for one in alive))
            images = _X[:4] + n
            alive.append(weakref.ref(images))
            yield images, torch.zeros(4)

    found = gdnsq_fx.verify(
        converted(), None, batches(), runtimes=["torch"], progress=False
    )
    assert found.inputs == 48 and found.runtimes[0].edges[0].codes == 48 * 108
    assert most <= 2


def test_names_of_edges_in_the_file(converted, tmp_path: Path) -> None:
    """They are names alone: the file returns what the model returns, and no codes."""
    imodel = converted(4, offset="free")
    path = _exported(imodel, tmp_path)
    onnx = pytest.importorskip("onnx")
    model = onnx.load(path)
    assert len(model.graph.output) == 1
    made = {name: node.op_type for node in model.graph.node for name in node.output}
    for edge in _EDGES:
        assert made[f"{edge}.codes"] in ("QuantizeLinear", "Min", "Clip")
    assert "Identity" not in made.values()
    (entry,) = model.metadata_props
    assert json.loads(entry.value) == {edge: f"{edge}.codes" for edge in _EDGES}
    entry.value = "[]"
    onnx.save(model, path)
    with pytest.raises(FileFormatError, match="not a mapping of names"):
        _verified(imodel, path)
    model.metadata_props.pop()
    onnx.save(model, path)
    found = _verified(imodel, path)
    assert found.ok and found.runtimes[1].edges == ()
    assert "not seen" in str(found)


# --- what parts ---


def _with_changed_code(path: Path, layer: str) -> None:
    """One code of one weight moved by one step, in the file."""
    onnx = pytest.importorskip("onnx")
    model = onnx.load(path)
    (stored,) = [t for t in model.graph.initializer if t.name == layer]
    codes = onnx.numpy_helper.to_array(stored).copy()
    place = (0,) * codes.ndim
    codes[place] += 1 if codes[place] < codes.max() else -1
    stored.CopyFrom(onnx.numpy_helper.from_array(codes, layer))
    onnx.save(model, path)


def _weight_names(model: GraphModule) -> list[str]:
    return [str(n.args[0].target) for n in model.graph.nodes if is_weight(n)]


@pytest.mark.parametrize(
    ("layer", "first"), [(0, "mid.input"), (1, "fc.input"), (2, "output")]
)
def test_a_changed_code_of_a_weight_is_found(
    converted, layer: int, first: str, tmp_path: Path
) -> None:
    imodel = converted(8)
    path = _exported(imodel, tmp_path)
    _with_changed_code(path, _weight_names(imodel)[layer])
    found = _verified(imodel, path)
    own, file = found.runtimes
    assert own.ok and not file.ok and not found.ok
    assert file.first_wrong == file.first_edge == first
    assert f"PARTS: onnxruntime at {first}" in str(found)
    changed = ("conv.weight", "mid.weight", "fc.weight")[layer]
    assert found.weights.differing == {changed: 1} and found.weights.unseen == ()
    assert f"PARTS: the file at {changed} (1 code)" in str(found)
    if first == "output":
        assert file.wrong == 0 and file.unexplained_inputs > 0


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_weights_in_their_bits_are_compared(bits: int, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64))
    batches = list(torch.randn(2, 16, 64))
    config = gdnsq_fx.QuantConfig(bits, 4, first_last=None)
    imodel = gdnsq_fx.convert(gdnsq_fx.prepare(model, batches[0], config, batches))
    path = tmp_path / "packed.onnx"
    gdnsq_fx.export(imodel, path, batches[0])
    found = gdnsq_fx.verify(imodel, path, batches, runtimes=["torch"], progress=False)
    assert (found.weights.codes, found.weights.unseen) == (2 * 64 * 96, ())
    assert not found.weights.differing
    file = onnx.load(path)
    packed = max(file.graph.initializer, key=lambda t: len(t.raw_data))
    changed = bytearray(packed.raw_data)
    changed[7] ^= 1
    packed.raw_data = bytes(changed)
    onnx.save(file, path)
    found = gdnsq_fx.verify(imodel, path, batches, runtimes=["torch"], progress=False)
    assert list(found.weights.differing.values()) == [1] and not found.ok


class _Flipping(Runtime):
    """torch, with one code of one edge moved by so many steps."""

    name = "flipping"

    def __init__(
        self, model: GraphModule, edge: CodedEdge, place: tuple[int, ...], by: int
    ) -> None:
        self._model, self._by, self._place = model, by, place
        self._edge = edge

    def outputs(self, values: Any) -> list[Tensor]:
        return self.observe(values).outputs

    @torch.no_grad()
    def observe(self, values: Any) -> Observation:
        names = {edge.codes: edge.name for edge in coded_edges(self._model)}
        codes: dict[str, Tensor] = {}
        edge, place, by = self._edge, self._place, self._by

        class Run(Interpreter):
            def run_node(self, n: Node) -> Any:
                value = super().run_node(n)
                if n.name == edge.codes.name:
                    value = value.clone()
                    value[place] += by
                if n in names:
                    codes[names[n]] = value
                return value

        return Observation(tensors(Run(self._model).run(*values)), codes)


def _flipped(model: GraphModule, value: float, by: int) -> Any:
    """A certificate where the first input is so many steps, and its code is moved."""
    edges = coded_edges(model)
    edge = edges[0]
    batch = _X[:4].clone()
    batch[0, 0, 0, 0] = edge.offset + value * edge.step
    # A value that is quantized in two steps has its offset taken off before.
    if edge.rounded.args[0].op != "placeholder":
        batch[0, 0, 0, 0] += edge.rounded.args[0].args[1]
    runtime = _Flipping(model, edge, (0, 0, 0, 0), by * edge.factor)
    verification = Verification(model, edges, [runtime])
    verification.add([[batch]])
    return verification.certificate()


def test_a_rounding_is_shown_and_not_failed(converted) -> None:
    found = _flipped(converted(8), 100.4999, 1)
    (one,) = found.runtimes
    assert (one.edges[0].differing, one.edges[0].rounding, one.wrong) == (1, 1, 0)
    # What follows differs, and is not held against the edges that follow.
    assert one.differing > 1 and one.edges[1].departing == 0
    assert one.first_edge == "conv.input" and one.first_wrong is None
    assert one.ok and found.ok


@pytest.mark.parametrize(
    ("value", "by"),
    [(100.4999, 2), (100.4999, -1), (100.4, 1), (-300.5, 1), (300.5, -1)],
)
def test_any_other_code_fails(converted, value: float, by: int) -> None:
    found = _flipped(converted(8), value, by)
    (one,) = found.runtimes
    assert (one.edges[0].departing, one.edges[0].rounding) == (1, 0)
    assert one.first_wrong == "conv.input" and not found.ok
    assert one.edges[1].departing == 0


def test_outputs_that_do_not_follow_from_the_codes_fail(converted) -> None:
    model = converted(8)

    class Off(_Flipping):
        def outputs(self, values: Any) -> list[Tensor]:
            return [self.observe(values).outputs[0] + 1e-3]

    edges = coded_edges(model)
    runtime = Off(model, edges[0], (0, 0, 0, 0), 0)
    verification = Verification(model, edges, [runtime])
    verification.add([[_X[:4]]])
    (one,) = verification.certificate().runtimes
    assert one.differing == 0 and one.differing_inputs == 4
    assert one.first_wrong == "output"


def test_outputs_that_roundings_cannot_move_so_far_fail(converted) -> None:
    """Each input has a value near a half step, and only what users run goes astray."""
    model = converted(8)
    edges = coded_edges(model)
    edge = edges[0]
    batch = _X[:4].clone()
    batch[:, 0] = edge.offset + 100.4999 * edge.step
    if edge.rounded.args[0].op != "placeholder":
        batch[:, 0] += edge.rounded.args[0].args[1]

    class Astray(_Flipping):
        by = 1

        def outputs(self, values: Any) -> list[Tensor]:
            place = (slice(None), 0)
            moved = _Flipping(model, edge, place, self.by * edge.factor)
            return moved.observe(values).outputs

    class FurtherAstray(Astray):
        by = -20

    for kind, fine in ((Astray, True), (FurtherAstray, False)):
        runtime = kind(model, edge, (0, 0, 0, 0), 0)
        verification = Verification(model, edges, [runtime])
        verification.add([[batch]])
        (one,) = verification.certificate().runtimes
        assert one.differing == 0 and one.differing_inputs == 4
        assert one.ok is fine and one.unexplained_inputs == (0 if fine else 4)


# --- how it is shown ---


def test_print_and_json(converted, tmp_path: Path) -> None:
    imodel = converted(2, deployable=False)
    path = _exported(imodel, tmp_path)
    found = _verified(imodel, path)
    lines = str(found).splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[-1] == "agrees: torch, onnxruntime"
    found.to_json(tmp_path / "certificate.json")
    written = json.loads((tmp_path / "certificate.json").read_text())
    assert written == json.loads(json.dumps(found.to_dict()))
    assert written["ok"] is True and written["file"]["bytes"] == path.stat().st_size
    assert len(written["file"]["sha256"]) == 64
    assert {"torch", "onnxruntime"} <= written["versions"].keys()
    assert written["runtimes"][1]["edges"][1]["name"] == "mid.input"


def test_absent_runtimes_are_listed(
    converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    imodel = converted()
    path = _exported(imodel, tmp_path)
    patterns = "torchao.quantization.pt2e.quantizer.x86_inductor_quantizer"
    for library in ("openvino", "torchao", patterns, "onnxruntime"):
        monkeypatch.setitem(sys.modules, library, None)
    given: dict[str, Any] = {"runtimes": None}
    found = _verified(imodel, path, **given)
    assert [one.name for one in found.runtimes] == ["torch"] and found.ok
    assert set(found.absent) == {"inductor", "onnxruntime", "openvino"}
    assert 'pip install "gdnsq-fx[onnx]"' in str(found)
    with pytest.raises(MissingExtraError, match=r"gdnsq-fx\[openvino\]"):
        _verified(imodel, path, runtimes=["openvino"])


def test_openvino_agrees(converted, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    imodel = converted(4)
    found = _verified(imodel, _exported(imodel, tmp_path), runtimes=["openvino"])
    assert found.ok, str(found)
    assert tuple(edge.name for edge in found.runtimes[0].edges) == _EDGES


# --- refusals ---


def test_what_is_refused(converted, prepared_residual, tmp_path: Path) -> None:
    imodel = converted()
    with pytest.raises(ConfigError, match="'onnxruntime' needs a file"):
        _verified(imodel, runtimes=["onnxruntime"])
    with pytest.raises(ConfigError, match="'tensorrt' is not known"):
        _verified(imodel, runtimes=["tensorrt"])
    with pytest.raises(ConfigError, match="no runtime is named"):
        _verified(imodel, runtimes=[])
    with pytest.raises(BatchStructureError, match="no batches"):
        gdnsq_fx.verify(imodel, None, [], runtimes=["torch"], progress=False)
    with pytest.raises(FileNotFoundError, match=r"absent\.onnx"):
        _verified(imodel, tmp_path / "absent.onnx")
    (tmp_path / "model.txt").write_text("text")
    with pytest.raises(ConfigError, match=r"model\.txt.*\.onnx"):
        _verified(imodel, tmp_path / "model.txt")
    with pytest.raises(PassError):
        _verified(prepared_residual(_X))


def test_files_that_do_not_fit_are_refused(converted, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a model")
    with pytest.raises(FileFormatError, match=r"cannot load .*broken\.onnx"):
        _verified(converted(), broken)
    path = _exported(converted(), tmp_path)
    torch.manual_seed(0)
    x = _X[:, 0, 0, :4]
    qmodel = gdnsq_fx.prepare(nn.Linear(4, 2), x, calibration=[x])
    other = gdnsq_fx.convert(qmodel, deployable=True)
    with pytest.raises(FileFormatError, match="exported from this model"):
        gdnsq_fx.verify(other, path, [x], runtimes=["onnxruntime"], progress=False)
