"""Saved models that need no class: what comes back, and what is said otherwise."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

import gdnsq_fx
from gdnsq_fx.deploy.edges import coded_edges
from gdnsq_fx.deploy.qdq import deploy_facts
from gdnsq_fx.errors import (
    ClassNeededWarning,
    ConfigError,
    FileFormatError,
    PassError,
)


class _Residual(nn.Module):
    """Choices by mode, a hidden buffer, modules and functions, sizes, a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(4, 3)
        self.register_buffer("mask", torch.tensor([1.0, 0.5, 2.0]), persistent=False)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = F.gelu(self.norm(self.conv1(x)))
        y = F.dropout(self.conv2(y) + y, 0.1, self.training).mean((2, 3))
        if self.training:
            y = y + 0.01 * torch.randn_like(y)
        return {"out": self.head(self.drop(y)) * self.mask, "rows": y.shape[0]}


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LSTM(4, 8, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, (hidden, _) = self.inner(x)
        return self.head(y[:, -1]), hidden


def _encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)


def _converted(
    net: nn.Module, x: Tensor, deployable: bool = False, **settings: Any
) -> GraphModule:
    given: dict[str, Any] = {"weight_bits": 3, "act_bits": 4, **settings}
    config = gdnsq_fx.QuantConfig(**given)
    qmodel = gdnsq_fx.prepare(net.eval(), x, config, [x])
    return gdnsq_fx.convert(qmodel, deployable=deployable)


def _assert_same(loaded: GraphModule, imodel: GraphModule, x: Tensor) -> None:
    """Outputs, state and kinds of tensors, to the bit."""
    for given in (x, x[:1]):
        pairs = zip(tree_leaves(loaded(given)), tree_leaves(imodel(given)), strict=True)
        for one, two in pairs:
            assert torch.equal(one, two) if isinstance(one, Tensor) else one == two
    state, wanted = loaded.state_dict(), imodel.state_dict()
    assert state.keys() == wanted.keys()
    for name, value in wanted.items():
        assert state[name].dtype == value.dtype, name
        assert torch.equal(state[name], value), name
    parameters = {name for name, _ in imodel.named_parameters()}
    assert {name for name, _ in loaded.named_parameters()} == parameters
    assert not loaded.training


@pytest.mark.parametrize("deployable", [False, True])
@pytest.mark.parametrize(
    ("build", "shape"),
    [(_Residual, (3, 1, 8, 8)), (_Recurrent, (3, 5, 4)), (_encoder, (3, 5, 16))],
)
def test_round_trip(
    build: Callable[[], nn.Module],
    shape: tuple[int, ...],
    deployable: bool,
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    imodel = _converted(build(), x, deployable)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ClassNeededWarning)
        gdnsq_fx.save(imodel, tmp_path / "m.safetensors")
    loaded = gdnsq_fx.load(tmp_path / "m.safetensors")
    _assert_same(loaded, imodel, x)
    # A second file of it is the same file.
    gdnsq_fx.save(loaded, tmp_path / "again.safetensors")
    _assert_same(gdnsq_fx.load(tmp_path / "again.safetensors"), imodel, x)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8, 12])
@pytest.mark.parametrize("deployable", [False, True])
def test_all_widths(bits: int, deployable: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 1, 8, 8)
    settings = {"weight_bits": bits, "act_bits": bits, "first_last": None}
    imodel = _converted(_Residual(), x, deployable, **settings)
    gdnsq_fx.save(imodel, tmp_path / "m.safetensors")
    _assert_same(gdnsq_fx.load(tmp_path / "m.safetensors"), imodel, x)


def test_with_and_without_the_class_are_one_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 1, 8, 8)
    gdnsq_fx.save(_converted(_Residual(), x), tmp_path / "m.safetensors")
    one = gdnsq_fx.load(tmp_path / "m.safetensors")
    two = gdnsq_fx.load(tmp_path / "m.safetensors", _Residual(), x)
    _assert_same(one, two, x)


def test_deployable_codes_take_their_bits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 16)
    net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
    imodel = _converted(net, x, True, weight_bits=2, first_last=None)
    gdnsq_fx.save(imodel, tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", framework="pt") as opened:  # type: ignore[no-untyped-call]
        packed = json.loads(opened.metadata()["packed"])
    assert {entry["bits"] for entry in packed.values()} == {2}


def test_what_deployment_reads_comes_back(tmp_path: Path) -> None:
    """Names of edges, facts of the form, layers: so verify gives one certificate."""
    torch.manual_seed(0)
    x = torch.randn(4, 1, 8, 8)
    for deployable in (False, True):
        imodel = _converted(_Residual(), x, deployable)
        gdnsq_fx.save(imodel, tmp_path / "m.safetensors")
        loaded = gdnsq_fx.load(tmp_path / "m.safetensors")
        found, wanted = (
            gdnsq_fx.verify(m, batches=[x], runtimes=["torch"], progress=False)
            for m in (loaded, imodel)
        )
        assert found.ok and found.runtimes == wanted.runtimes
    assert deploy_facts(loaded) == deploy_facts(imodel)
    names = [edge.name for edge in coded_edges(imodel)]
    assert names and [edge.name for edge in coded_edges(loaded)] == names


def _own(x: Tensor) -> Tensor:
    return x * 2


torch.fx.wrap("_own")


class _Looped(nn.Module):
    """Its Python runs as often as the data say: no graph holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(int(x.abs().sum()) % 3 + 1):
            x = self.inner(x).relu()
        return x


def test_what_no_file_holds_is_said(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    path = tmp_path / "m.safetensors"

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), _Looped(), nn.Linear(8, 2))

    qmodel = gdnsq_fx.prepare(build().eval(), x, calibration=[x])
    imodel = gdnsq_fx.convert(qmodel)
    with pytest.warns(ClassNeededWarning, match="could not be looked into"):
        gdnsq_fx.save(imodel, path)
    with pytest.raises(FileFormatError, match=r"looked into.*load\(path, model"):
        gdnsq_fx.load(path)
    assert torch.equal(gdnsq_fx.load(path, build(), x)(x), imodel(x))
    other = tmp_path / "deployable.safetensors"
    with pytest.raises(PassError, match=r"looked into.*without deployable=True"):
        gdnsq_fx.save(gdnsq_fx.convert(qmodel, deployable=True), other)
    assert not other.exists()


@pytest.mark.parametrize("kind", ["function", "method", "attribute", "module"])
def test_calls_that_no_table_holds(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 1, 8, 8)
    imodel = _converted(_Residual(), x)
    (output,) = imodel.graph.find_nodes(op="output")
    first = next(iter(imodel.graph.nodes))
    with imodel.graph.inserting_before(output):
        if kind == "function":
            imodel.graph.call_function(_own, (first,))
        elif kind == "method":
            imodel.graph.call_method("numpy", (first,))
        elif kind == "attribute":
            imodel.graph.call_function(getattr, (first, "__class__"))
        else:
            imodel.add_module("odd", _Looped())
            imodel.graph.call_module("odd", (first,))
    with pytest.warns(ClassNeededWarning, match=f"the {kind} .*will|{kind}"):
        gdnsq_fx.save(imodel, tmp_path / "m.safetensors")
    with pytest.raises(FileFormatError, match="does not hold its graph"):
        gdnsq_fx.load(tmp_path / "m.safetensors")


@pytest.mark.parametrize("name", ["a-b", "graph", "code", "meta", "naïve"])
def test_names_that_no_graph_may_have(name: str, tmp_path: Path) -> None:
    """Said when the model is saved, and not when it is read."""
    torch.manual_seed(0)
    x = torch.randn(4, 8)

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.ModuleDict({name: nn.Linear(8, 2)}))

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = build()

        def forward(self, x: Tensor) -> Tensor:
            first, rest = self.parts.children()
            assert isinstance(rest, nn.ModuleDict)
            return rest[name](first(x).relu())

    imodel = _converted(Named(), x)
    with pytest.warns(ClassNeededWarning, match="the name"):
        gdnsq_fx.save(imodel, tmp_path / "m.safetensors")
    loaded = gdnsq_fx.load(tmp_path / "m.safetensors", Named(), x)
    assert torch.equal(loaded(x), imodel(x))


def test_arguments_that_do_not_go_together(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 1, 8, 8)
    path = tmp_path / "m.safetensors"
    gdnsq_fx.save(_converted(_Residual(), x, True), path)
    with pytest.raises(ConfigError, match="or neither"):
        gdnsq_fx.load(path, _Residual())
    with pytest.raises(ConfigError, match="or neither"):
        gdnsq_fx.load(path, example_input=x)
    with pytest.raises(FileFormatError, match="deployable form"):
        gdnsq_fx.load(path, _Residual(), x)
