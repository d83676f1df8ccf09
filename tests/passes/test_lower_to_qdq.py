"""The integer graph in the operations that exporters and compilers know."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import gdnsq_fx
from gdnsq_fx.deploy.integer import dequantize, quantize
from gdnsq_fx.deploy.qdq import calls, deploy_facts, is_activation, is_weight
from gdnsq_fx.errors import PassError
from gdnsq_fx.passes import LowerToQdq


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


_X = torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def prepared(residual_net) -> Callable[..., GraphModule]:
    """Of values of either sign, where no model is given."""

    def make(model: nn.Module | None = None, **settings: Any) -> GraphModule:
        config = gdnsq_fx.QuantConfig(**{"first_last": None, **settings})
        net = model or residual_net(rectified=False)
        return gdnsq_fx.prepare(net.eval(), _X, config, [_X])

    return make


_BEFORE = """\
%0 = input
%1 = quantizers.0_input.step
%2 = quantizers.0_input.offset
%3 = quantize(%0, %1, %2, 3)
%4 = dequantize(%3, %1, %2, torch.float32)
%5 = quantizers.0_weight.codes
%6 = quantizers.0_weight.step
%7 = quantizers.0_weight.offset
%8 = dequantize(%5, %6, %7, torch.float32)
%9 = 0.bias
%10 = conv2d(%4, %8, %9, stride=[1, 1], padding=[0, 0], dilation=[1, 1], groups=1)
return %10"""

_AFTER = """\
%0 = input
%1 = sub(%0, -1.5)
%2 = quantize_per_tensor.default(%1, 1.0, 0, 0, 255, torch.uint8)
%3 = clamp(%2, max=3)
%4 = dequantize_per_tensor.default(%3, 1.0, 0, 0, 255, torch.uint8)
%5 = add(%4, -1.5)
%6 = quantize_per_tensor.default(%5, 0.5, 3, 0, 255, torch.uint8)
%7 = dequantize_per_tensor.default(%6, 0.5, 3, 0, 255, torch.uint8)
%8 = quantizers.0_weight.codes
%9 = quantizers.0_weight.scale
%10 = quantizers.0_weight.zero_points
%11 = dequantize_per_channel.default(%8, %9, %10, 0, -128, 127, torch.int8)
%12 = quantizers.0_weight._0_bias
%13 = conv2d(%7, %11, %12, stride=[1, 1], padding=[0, 0], dilation=[1, 1], groups=1)
return %13"""


def test_before_and_after(prepared, show) -> None:
    imodel = gdnsq_fx.convert(prepared(nn.Sequential(nn.Conv2d(3, 4, 3))))
    grid = imodel.quantizers.get_submodule("0_input")
    grid.step.fill_(1.0)
    grid.offset.fill_(-1.5)
    assert show(imodel) == _BEFORE
    result = LowerToQdq()(imodel)
    assert result.modified and show(result.graph_module) == _AFTER
    again = LowerToQdq()(result.graph_module)
    assert again.modified is False and again.graph_module is result.graph_module


@pytest.mark.parametrize("offset", ["half_step", "integer"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6])
def test_levels_on_half_steps_do_not_move(prepared, bits: int, offset: Any) -> None:
    """One padded layer without a bias: nothing differs but float rounding."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False))
    settings: Any = {"weight_bits": bits, "act_bits": bits, "offset": offset}
    qmodel = prepared(net, **settings)
    model = gdnsq_fx.convert(qmodel, deployable=True)
    assert deploy_facts(model).moved == {} and deploy_facts(model).kept == {}
    torch.testing.assert_close(model(_X), qmodel(_X), rtol=1e-5, atol=1e-5)


def test_nothing_is_left_of_floating_point_quantization(prepared) -> None:
    model = gdnsq_fx.convert(prepared(), deployable=True)
    targets = [node.target for node in model.graph.nodes]
    assert quantize not in targets and dequantize not in targets
    assert not list(model.graph.find_nodes(op="call_module"))  # the norm is folded
    readers = [n.users for n in model.graph.nodes if is_activation(n)]
    assert len(readers) == 4 and all(len(users) == 1 for users in readers)
    weights = [n for n in model.graph.nodes if is_weight(n)]
    assert [calls(n, "dequantize_per_channel") for n in weights] == [True] * 3
    names = set(model.state_dict())
    assert not any(n.endswith((".step", ".offset")) for n in names)
    assert {v.dtype for k, v in model.state_dict().items() if "codes" in k} == {
        torch.int8
    }


def test_biases_are_whole_multiples_of_the_accumulators_scale(prepared) -> None:
    model = gdnsq_fx.convert(prepared(weight_bits=4, act_bits=4), deployable=True)
    checked = 0
    for node in model.graph.nodes:
        if node.target in (torch.conv2d, torch.nn.functional.linear):
            value, weight, bias = node.args[:3]
            scale = model.get_buffer(weight.args[1].target).double() * value.args[1]
            whole = model.get_buffer(bias.target).double() / scale
            torch.testing.assert_close(whole, whole.round(), rtol=0, atol=1e-3)
            checked += 1
    assert checked == 3


def test_a_bias_that_dwarfs_its_channel_does_not_overflow(
    prepared, residual_net
) -> None:
    """A normalization with a gamma of nearly 0 leaves its bias alone."""
    net = residual_net(rectified=False)
    net.norm.weight.data[:3] = torch.tensor([0.0, 1e-12, -1e-9])
    net.norm.bias.data[:3] = torch.tensor([0.5, 2.0, -3.0])
    qmodel = prepared(net, weight_bits=4, act_bits=4)
    model = gdnsq_fx.convert(qmodel, deployable=True)
    (norm_free,) = [n for n in model.graph.nodes if n.name == "conv"]
    value, weight, bias = norm_free.args[:3]
    scale = model.get_buffer(weight.args[1].target).double() * value.args[1]
    assert float((model.get_buffer(bias.target) / scale).abs().max()) < 2**30 * 1.01
    probe = torch.fx.Interpreter(model)
    inner: dict[str, Tensor] = {}
    run = probe.run_node

    def noted(node: torch.fx.Node) -> Any:
        inner[node.name] = run(node)
        return inner[node.name]

    probe.run_node = noted  # type: ignore[method-assign]
    probe.run(_X)
    wanted = torch.tensor([0.5, 2.0, -3.0])
    got = inner["conv"][:, :3].mean((0, 2, 3))
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


def test_edges_that_move_are_named(prepared) -> None:
    qmodel = prepared(weight_bits=8, act_bits=8, offset="free")
    model = gdnsq_fx.convert(qmodel, deployable=True)
    moved = deploy_facts(model).moved
    assert set(moved) <= {"conv_weight", "mid_weight", "fc_weight", "conv_input"}
    assert moved and all(0 < distance < 1 for distance in moved.values())


def test_what_needs_more_than_eight_bits_stays_and_says_why(prepared) -> None:
    qmodel = prepared(weight_bits=9, act_bits=12)
    model = gdnsq_fx.convert(qmodel, deployable=True)
    kept = deploy_facts(model).kept
    assert kept == dict.fromkeys(
        [f"{n}_{k}" for n in ("conv", "mid", "fc") for k in ("weight", "input")],
        "more than 8 bits",
    )
    torch.testing.assert_close(model(_X), qmodel(_X), rtol=1e-3, atol=1e-3)


def test_other_precisions_stay(residual_net) -> None:
    config = gdnsq_fx.QuantConfig(first_last=None)
    x = _X.double()
    qmodel = gdnsq_fx.prepare(
        residual_net(rectified=False).double().eval(), x, config, [x]
    )
    model = gdnsq_fx.convert(qmodel, deployable=True)
    assert set(deploy_facts(model).kept.values()) == {"computed in torch.float64"}
    torch.testing.assert_close(model(x), qmodel(x))


def test_a_plain_graph_module(prepared) -> None:
    model = gdnsq_fx.convert(prepared(), deployable=True)
    assert not model.training and type(model).__mro__[1] is GraphModule
    wanted = model(_X)
    assert torch.equal(copy.deepcopy(model)(_X), wanted)
    other = gdnsq_fx.convert(prepared(), deployable=True)
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(_X[:3]), model(_X)[:3])
    exported = torch.export.export(model, (_X,))
    torch.testing.assert_close(exported.module()(_X), wanted)


def test_refusals(prepared) -> None:
    qmodel = prepared()
    with pytest.raises(PassError, match="needs a converted model"):
        LowerToQdq()(qmodel)
    with pytest.raises(PassError, match="deployable=True"):
        deploy_facts(gdnsq_fx.convert(qmodel))
