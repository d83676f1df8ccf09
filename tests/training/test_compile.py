"""Training through ``torch.compile``: the same run, compiled once."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd.graph import saved_tensors_hooks
from torch.fx import GraphModule

import gdnsq_fx
from gdnsq_fx.errors import ConfigError
from gdnsq_fx.sites import weight_sites

STEPS = 12


def _batches() -> list[Tensor]:
    return list(torch.randn(4, 32, 6, generator=torch.Generator().manual_seed(0)))


def _prepared() -> GraphModule:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)
    )
    config = gdnsq_fx.QuantConfig(4, 4, first_last=None)
    return gdnsq_fx.prepare(model, torch.randn(32, 6), config, [torch.randn(64, 6)])


def _losses(qmodel: GraphModule, **options: Any) -> list[float]:
    result = gdnsq_fx.finetune(
        qmodel, _batches(), steps=STEPS, progress=False, **options
    )
    return [record.loss for record in result.history]


@pytest.mark.parametrize("budget", [None, gdnsq_fx.Budget(mean_weight_bits=4)])
def test_a_step_is_compiled_once(budget: gdnsq_fx.Budget | None) -> None:
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("eager")
    compiled = _prepared()
    found = _losses(
        compiled,
        budget=budget,
        compile={"backend": graphs, "fullgraph": True},
        validate=lambda m: float(m(_batches()[0]).detach().mean()),
        validate_every=4,
    )
    assert graphs.frame_count == 1
    wanted = _losses(_prepared(), budget=budget)
    assert found[:6] == pytest.approx(wanted[:6], rel=1e-4)
    assert not any("_orig_mod" in name for name in compiled.state_dict())
    gdnsq_fx.convert(compiled)


@pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))),
    reason="torch.compile needs a C++ compiler on the CPU",
)
def test_inductor_takes_the_same_steps() -> None:
    torch._dynamo.reset()
    compiled = _prepared()
    found = _losses(compiled, compile=True)
    assert found[:6] == pytest.approx(_losses(_prepared())[:6], rel=1e-4)


def test_features_are_read_from_the_compiled_graph() -> None:
    torch._dynamo.reset()
    qmodel = _prepared()
    (relu,) = (n for n in qmodel.graph.nodes if n.target == "2")
    options: dict[str, Any] = {"features": {relu.name: 1.0}}
    found = _losses(qmodel, compile={"backend": "eager"}, **options)
    assert found[:6] == pytest.approx(_losses(_prepared(), **options)[:6], rel=1e-4)


def test_compiled_backward_keeps_no_levels_of_weights() -> None:
    torch._dynamo.reset()
    qmodel = _prepared().train()
    model = torch.compile(qmodel, fullgraph=True, backend="aot_eager_decomp_partition")
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(torch.randn(2, 6))
    for parameter in qmodel.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    least = min(site.weight().numel() for site in weight_sites(qmodel))
    # Batches of two: no activation is as large as a weight.
    assert max(kept.values()) < least
    output.sum().backward()
    assert all(p.grad is not None for p in qmodel.parameters())


def test_other_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="compile must be"):
        _losses(_prepared(), compile="yes")
