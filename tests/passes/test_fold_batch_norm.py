"""A BatchNorm in evaluation becomes part of the layer before it, or says why not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.modules.batchnorm import _BatchNorm

from gdnsq_fx.annotations import facts
from gdnsq_fx.capture.capture import capture
from gdnsq_fx.errors import PassError
from gdnsq_fx.passes import (
    FoldBatchNorm,
    InsertQuantizers,
    PropagateShapes,
    run_passes,
)

_IMAGE = torch.randn(4, 4, 7, 6)
_ROWS = torch.randn(5, 4)


@pytest.fixture
def exposed(exposed: Callable[..., GraphModule]) -> Callable[..., GraphModule]:
    """With shapes: they tell whether a linear layer's channels are normalized."""
    return lambda model, x: run_passes(exposed(model, x), (PropagateShapes((x,)),))


def _trained(model: nn.Module) -> nn.Module:
    """In evaluation, with statistics and affine parameters that matter."""
    for module in model.modules():
        if not isinstance(module, _BatchNorm):
            continue
        for name in ("running_mean", "running_var", "weight", "bias"):
            if (value := getattr(module, name)) is not None:
                value.data.uniform_(0.5, 2.0)
    return model.eval()


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 5)
        self.norm1 = nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm1(self.fc(self.norm(self.conv(x)).relu().mean((2, 3))))


_AFTER = """\
%0 = x
%1 = conv.weight
%2 = conv.bias
%3 = conv2d(%0, %1, %2, stride=[1, 1], padding=[0, 0], dilation=[1, 1], groups=1)
%4 = .relu(%3)
%5 = .mean(%4, [2, 3])
%6 = fc.weight
%7 = fc.bias
%8 = linear(%5, %6, %7)
return %8"""

_BEFORE = """\
%0 = x
%1 = conv.weight
%2 = conv2d(%0, %1, None, stride=[1, 1], padding=[0, 0], dilation=[1, 1], groups=1)
%3 = self.norm(%2)
%4 = .relu(%3)
%5 = .mean(%4, [2, 3])
%6 = fc.weight
%7 = fc.bias
%8 = linear(%5, %6, %7)
%9 = self.norm1(%8)
return %9"""


def _check_folded(model: nn.Module, module: GraphModule, x: Tensor) -> None:
    wanted = model(x)
    assert FoldBatchNorm()(module).modified is True
    assert not list(module.graph.find_nodes(op="call_module"))
    torch.testing.assert_close(module(x), wanted, rtol=1e-4, atol=1e-5)


def _check_refused(model: nn.Module, module: GraphModule, x: Tensor, why: str) -> None:
    """Nothing changes, and the BatchNorm carries the reason."""
    assert FoldBatchNorm()(module).modified is False
    reasons = [facts(n).skip or "" for n in module.graph.find_nodes(op="call_module")]
    assert any(why in reason for reason in reasons), reasons
    torch.testing.assert_close(module(x), model(x))


def test_before_and_after(exposed, show) -> None:
    model = _trained(_Net())
    module = exposed(model, _IMAGE)
    assert show(module) == _BEFORE
    assert FoldBatchNorm()(module).modified is True
    assert show(module) == _AFTER
    torch.testing.assert_close(module(_IMAGE), model(_IMAGE), rtol=1e-4, atol=1e-5)


def test_second_run_changes_nothing(exposed, show) -> None:
    module = exposed(_trained(_Net()), _IMAGE)
    FoldBatchNorm()(module)
    weights = {k: v.clone() for k, v in module.state_dict().items()}
    assert FoldBatchNorm()(module).modified is False
    assert show(module) == _AFTER
    assert all(torch.equal(v, weights[k]) for k, v in module.state_dict().items())


def test_alone_in_torchs_manager(exposed, alone) -> None:
    model = _trained(_Net())
    result = alone(FoldBatchNorm(), exposed(model, _IMAGE))
    assert result.modified
    got = result.graph_module(_IMAGE)
    torch.testing.assert_close(got, model(_IMAGE), rtol=1e-4, atol=1e-5)


def test_keeps_every_key_of_the_model(exposed) -> None:
    model = _trained(_Net())
    module = exposed(model, _IMAGE)
    FoldBatchNorm()(module)
    assert module.state_dict().keys() - model.state_dict().keys() == {"conv.bias"}
    assert not model.state_dict().keys() - module.state_dict().keys()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_equals_eager(
    exposed, dims: int, transposed: bool, groups: int, affine: bool, bias: bool
) -> None:
    layer = getattr(nn, f"Conv{'Transpose' * transposed}{dims}d")
    norm = getattr(nn, f"BatchNorm{dims}d")(6, affine=affine)
    model = _trained(nn.Sequential(layer(4, 6, 3, groups=groups, bias=bias), norm))
    x = torch.randn(2, 4, *[5, 4, 3][:dims])
    _check_folded(model, exposed(model, x), x)


def test_linear_and_a_norm_that_two_layers_share(exposed) -> None:
    norm = nn.BatchNorm1d(4)
    model = _trained(nn.Sequential(nn.Linear(4, 4), norm, nn.Linear(4, 4), norm))
    _check_folded(model, exposed(model, _ROWS), _ROWS)


class _Functional(nn.Module):
    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(6, 4, 3, 3))
        self.norm = nn.BatchNorm2d(6)
        self.arguments, self.settings = arguments, settings

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.kernel, *self.arguments, **self.settings)
        return self.norm(y)


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [((), {}), ((None,), {}), ((None, 2), {}), ((), {"bias": None, "padding": 1})],
)
def test_a_functional_convolution(exposed, arguments: Any, settings: Any) -> None:
    model = _trained(_Functional(*arguments, **settings))
    _check_folded(model, exposed(model, _IMAGE), _IMAGE)


class _Kernels(nn.Module):
    """Three kernels of one module: each needs a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = nn.ParameterList(torch.randn(4, 4, 1, 1) for _ in range(3))
        self.first = nn.Parameter(torch.randn(4, 4, 1, 1))
        self.second = nn.Parameter(torch.randn(4, 4, 1, 1))
        self.third = nn.Parameter(torch.randn(4, 4, 1, 1))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        kernels = (*self.kernels, self.first, self.second, self.third)
        for kernel, norm in zip(kernels, self.norms, strict=True):
            x = norm(F.conv2d(x, kernel)).tanh()
        return x


def test_several_kernels_of_one_module(exposed) -> None:
    model = _trained(_Kernels())
    module = exposed(model, _IMAGE)
    wanted = model(_IMAGE)
    assert FoldBatchNorm()(module).modified is True
    torch.testing.assert_close(module(_IMAGE), wanted, rtol=1e-4, atol=1e-5)


def test_refuses_to_run_on_a_model_in_training(exposed) -> None:
    module = exposed(_trained(_Net()).train(), _IMAGE)
    with pytest.raises(PassError, match=r"off while training; call eval\(\)"):
        FoldBatchNorm()(module)


def test_refuses_a_graph_without_annotations() -> None:
    module = capture(_trained(_Net()), (_IMAGE,), {})
    with pytest.raises(PassError, match="FoldBatchNorm needs annotated operations"):
        FoldBatchNorm()(module)


def test_refuses_a_norm_without_running_statistics(exposed) -> None:
    norm = nn.BatchNorm2d(6, track_running_stats=False)
    model = _trained(nn.Sequential(nn.Conv2d(4, 6, 3), norm))
    _check_refused(model, exposed(model, _IMAGE), _IMAGE, "no running statistics")


def test_refuses_a_norm_that_is_itself_in_training(exposed) -> None:
    model = _trained(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)))
    model[1].train()
    _check_refused(model, exposed(model, _IMAGE), _IMAGE, "BatchNorm not folded")


class _ReadTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + y


def test_refuses_where_others_read_the_output(exposed) -> None:
    model = _trained(_ReadTwice())
    _check_refused(model, exposed(model, _IMAGE), _IMAGE, "others read the layer's")


class _CalledTwice(_ReadTwice):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.conv(x)))


def test_refuses_a_shared_weight(exposed) -> None:
    model = _trained(_CalledTwice())
    _check_refused(model, exposed(model, _IMAGE), _IMAGE, "shares a parameter")


def test_refuses_a_parametrized_weight(exposed) -> None:
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 6, 3))
    model = _trained(nn.Sequential(conv, nn.BatchNorm2d(6)))
    _check_refused(model, exposed(model, _IMAGE), _IMAGE, "parametrized")


def test_refuses_a_quantized_weight(exposed) -> None:
    model = _trained(_Net())
    module = run_passes(exposed(model, _IMAGE), (InsertQuantizers(),))
    assert FoldBatchNorm()(module).modified is False
    reasons = [facts(n).skip for n in module.graph.nodes if "norm" in str(n.target)]
    assert (
        reasons == ["BatchNorm not folded: the weight is quantized or parametrized"] * 2
    )


class _NormRelu(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


def test_refuses_a_norm_with_a_forward_of_its_own(exposed) -> None:
    """Such a module may do more than normalize: here it is an activation as well."""
    model = _trained(nn.Sequential(nn.Conv2d(4, 6, 3), _NormRelu(6)))
    _check_refused(model, exposed(model, _IMAGE), _IMAGE, "BatchNorm not folded")


def test_refuses_a_norm_with_hooks(exposed) -> None:
    model = _trained(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)))
    model[1].register_forward_hook(lambda module, args, output: 2.0 * output)
    _check_refused(model, exposed(model, _IMAGE), _IMAGE, "hooks")


def test_refuses_a_norm_over_another_dimension_than_the_channels(exposed) -> None:
    """BatchNorm1d of ``[B, T, C]`` normalizes T, not the layer's outputs."""
    model = _trained(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)))
    x = torch.randn(5, 6, 4)
    _check_refused(model, exposed(model, x), x, "BatchNorm not folded")
