"""The reference executor: integers inside layers, and the model's own results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

import gdnsq_fx
from gdnsq_fx.deploy.qdq import calls
from gdnsq_fx.deploy.reference import ReferenceExecutor
from gdnsq_fx.errors import PassError

_X = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(1))


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu()
        x = self.up(self.depthwise(x) + x)
        tokens = x.flatten(2).transpose(1, 2)
        mixed = torch.softmax(tokens @ tokens.transpose(1, 2), -1) @ tokens
        return self.fc(mixed).mean(1)


def _deployable(model: nn.Module, x: Tensor = _X, **settings: Any) -> GraphModule:
    torch.manual_seed(0)
    config = gdnsq_fx.QuantConfig(**{"first_last": None, **settings})
    qmodel = gdnsq_fx.prepare(model.eval(), x, config, [x])
    return gdnsq_fx.convert(qmodel, deployable=True)


def test_a_layer_by_hand() -> None:
    """Every number of one linear layer, computed again from the stored codes."""
    x = torch.randn(5, 4)
    model = _deployable(nn.Sequential(nn.Linear(4, 3)), x, weight_bits=4, act_bits=4)
    (layer,) = [n for n in model.graph.nodes if n.target is F.linear]
    value, weight, bias = layer.args
    codes = model.get_buffer(weight.args[0].target).long()
    scale = model.get_buffer(weight.args[1].target).double() * value.args[1]
    whole = torch.round(model.get_buffer(bias.target).double() / scale).long()
    executor = ReferenceExecutor(model)
    seen: dict[str, Any] = {}
    run_node = executor.run_node

    def noted(n: Any) -> Any:
        seen[n.name] = run_node(n)
        return seen[n.name]

    executor.run_node = noted  # type: ignore[method-assign]
    got = executor.run(x)
    read = seen[value.args[0].name].long() - value.args[2]
    total = (read[:, None, :] * codes[None]).sum(-1) + whole
    assert torch.equal(got, (total.double() * scale).float())
    assert executor.largest == int(total.abs().max()) < 2**31
    assert executor.integer == {layer.name} and executor.floating == set()


@pytest.mark.parametrize("bits", [8, 2, 1])
def test_computes_what_the_model_does(bits: int) -> None:
    torch.manual_seed(0)
    model = _deployable(_Net(), weight_bits=bits, act_bits=bits)
    executor = ReferenceExecutor(model)
    got, wanted = executor.run(_X), model(_X)
    assert got.dtype == wanted.dtype
    # Some value may lie between two codes and fall to either side.
    spread = float((wanted.max() - wanted.min()).detach())
    assert float((got - wanted).abs().max()) <= 0.02 * spread
    assert executor.floating == set() and len(executor.integer) == 6
    assert 0 < executor.largest < 2**31


def test_a_sum_on_one_grid_is_a_sum_of_integers() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.last = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.a(x) + self.b(x))

    x = torch.randn(16, 4)
    model = _deployable(Sum(), x, weight_bits=4, act_bits=4, scope="full")
    (total,) = [n for n in model.graph.nodes if n.name == "add"]
    assert all(calls(n, "dequantize_per_tensor") for n in total.args)
    assert total.args[0].args[1] == total.args[1].args[1]
    torch.testing.assert_close(
        ReferenceExecutor(model).run(x), model(x), rtol=1e-4, atol=1e-4
    )


def test_layers_in_floating_point_are_named() -> None:
    model = _deployable(nn.Sequential(nn.Conv2d(3, 4, 3)), weight_bits=9)
    executor = ReferenceExecutor(model)
    torch.testing.assert_close(executor.run(_X), model(_X))
    assert len(executor.floating) == 1 and executor.integer == set()


def test_refuses_another_form() -> None:
    qmodel = gdnsq_fx.prepare(
        nn.Linear(4, 2), torch.randn(2, 4), None, [_X[0, 0, :, :4]]
    )
    with pytest.raises(PassError, match="deployable=True"):
        ReferenceExecutor(gdnsq_fx.convert(qmodel))
