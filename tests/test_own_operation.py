"""Rows of the user's: functions, modules, the example, and rows that make no sense."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Tracer, wrap

import gdnsq_fx
from gdnsq_fx.annotations import compute_nodes
from gdnsq_fx.capture.captured import CapturedModule
from gdnsq_fx.operands import Call, Stored
from gdnsq_fx.opinfo import OpInfo
from gdnsq_fx.optable import DEFAULT_TABLE
from gdnsq_fx.passes import (
    AnnotateOperations,
    Calibrate,
    ExposeWeights,
    InsertQuantizers,
    PropagateShapes,
    run_passes,
)
from gdnsq_fx.sites import sites

EXAMPLE = Path(__file__).parents[1] / "examples" / "own_operation.py"
_X = torch.randn(3, 4)


def _product(x: Tensor, w: Tensor, gain: float = 1.0) -> Tensor:
    return gain * (x @ w.t())


scaled_product = gdnsq_fx.operation(_product)


@wrap
def wrapped_product(x: Tensor, w: Tensor, gain: float = 1.0) -> Tensor:
    return gain * (x @ w.t())


class Layer(nn.Module):
    """A layer of the user's with a fused forward."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(5, 4))
        self.gain = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return _product(x, self.matrix, self.gain)


ROW = OpInfo(
    "product",
    ("x", "w", "gain"),
    roles={"x": "activation", "w": "weight"},
    functions=(scaled_product, wrapped_product, _product),
    modules=(Layer,),
    macs=lambda shapes, output: math.prod(output) * shapes["x"][-1],
    layout=gdnsq_fx.ChannelLayout(axis=0),
    open=lambda module, given: Call(
        _product, (given["x"], Stored("matrix")), {"gain": module.gain}
    ),
    inputs=("x",),
)
TABLE = DEFAULT_TABLE.with_rows(ROW)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return scaled_product(x, self.matrix, gain=2.0)


def test_a_function_of_the_users(tmp_path: Path) -> None:
    config = gdnsq_fx.QuantConfig(4, 4, strict=True)
    qmodel = gdnsq_fx.prepare(Functional(), _X, config, [_X], table=TABLE)
    assert [node.target for node in compute_nodes(qmodel)] == [scaled_product]
    report = gdnsq_fx.analyze(qmodel, [_X])
    assert report.coverage == gdnsq_fx.Coverage(1.0, 1.0, ())
    assert report.totals.macs == 20
    imodel = gdnsq_fx.convert(qmodel)
    assert torch.equal(imodel(_X), qmodel(_X))
    gdnsq_fx.save(imodel, tmp_path / "m.safetensors")
    path = tmp_path / "m.safetensors"
    again = gdnsq_fx.load(path, Functional(), _X, table=TABLE)
    assert torch.equal(again(_X), imodel(_X))


def test_outside_of_a_capture_it_is_the_function() -> None:
    weight = torch.randn(5, 4)
    assert torch.equal(scaled_product(_X, weight), _product(_X, weight))
    assert scaled_product.__name__ == "_product"


class _Leaves(Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return TABLE.find_module(m) is not None


class _Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return wrapped_product(x, self.matrix, gain=2.0)


@pytest.mark.parametrize("model", [nn.Sequential(Layer()), _Wrapped()])
def test_a_module_and_a_wrapped_function_in_a_graph_of_torchs_tracer(
    model: nn.Module,
) -> None:
    module: Any = CapturedModule(model, _Leaves().trace(model))
    passes = (
        AnnotateOperations(TABLE),
        ExposeWeights(TABLE),
        PropagateShapes((_X,)),
        InsertQuantizers(gdnsq_fx.QuantConfig(8, 8)),
        Calibrate([_X], gdnsq_fx.InputStructure.of(_X)),
    )
    module = run_passes(module, passes)
    assert len(sites(module)) == 2
    assert all(node.op == "call_function" for node in compute_nodes(module))
    with gdnsq_fx.quantization_disabled(module):
        assert torch.equal(module(_X), model(_X))


def test_the_example_runs(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLE)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "correlate" in done.stdout
    assert "loaded model computes the same: True" in done.stdout


_NONSENSE: list[tuple[dict[str, Any], str]] = [
    ({"functions": ()}, "no spelling; name the module class"),
    ({"functions": _product}, r"functions must be a tuple.*write functions=\(...,\)"),
    ({"functions": (Layer,)}, "give functions"),
    ({"modules": (_product,)}, "give classes derived from nn.Module"),
    ({"methods": (1,)}, "give names of tensor methods"),
    ({"name": ""}, "name must be a string"),
    ({"roles": {"y": "weight"}}, "roles names 'y', which is not among its parameters"),
    ({"roles": {"x": "input"}}, "role 'input' of x; a role is one of activation"),
    ({"aliases": {"a": "y"}}, "aliases names 'y'"),
    ({"sign": "positive"}, "sign 'positive'; it is one of"),
    ({"kind": "matmul"}, "kind 'matmul'; it is one of"),
    ({"macs": 3}, "macs must be a function, got 3"),
    ({"roles": {}}, "no role says which"),
    ({"kind": "view"}, "only rows without macs have a kind"),
    ({"open": lambda m, g: None}, "modules is empty"),
    ({"functions": (), "modules": (Layer,)}, "open is missing; write open=lambda"),
    (
        {"functions": (), "modules": (Layer,), "open": lambda m, g: None},
        "write functions=",
    ),
]


@pytest.mark.parametrize(("changes", "message"), _NONSENSE)
def test_rows_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "name": "product",
        "parameters": ("x", "w", "gain"),
        "roles": {"x": "activation", "w": "weight"},
        "functions": (_product,),
        "macs": lambda shapes, output: 0,
    }
    with pytest.raises(gdnsq_fx.ConfigError, match=f"op table row .*{message}"):
        OpInfo(**{**given, **changes})


def test_a_table_takes_rows_only() -> None:
    with pytest.raises(gdnsq_fx.ConfigError, match="is no row of an op table"):
        DEFAULT_TABLE.with_rows(_product)  # type: ignore[arg-type]
