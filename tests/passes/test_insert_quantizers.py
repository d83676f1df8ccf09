"""One quantizer on each chosen edge, where and as the configuration says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.utils import parametrizations

from gdnsq_fx.annotations import compute_nodes, facts
from gdnsq_fx.capture.capture import capture
from gdnsq_fx.errors import NothingToQuantizeError, PassError, PatternError
from gdnsq_fx.passes import InsertQuantizers, PropagateShapes, run_passes
from gdnsq_fx.quantize.activation_quantizer import ActivationQuantizer
from gdnsq_fx.quantize.quantizer import quantization_disabled
from gdnsq_fx.quantize.weight_quantizer import WeightQuantizer
from gdnsq_fx.sites import activation_sites, sites, weight_sites
from gdnsq_fx.spec import Override, QuantConfig, QuantSpec

_ROWS = torch.randn(3, 4)
_IMAGE = torch.randn(2, 3, 6, 6)


class _Net(nn.Module):
    """Two layers read the output of the first; the last reads both."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.left = nn.Conv2d(4, 4, 1)
        self.right = nn.Conv2d(4, 4, 1, bias=False)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.head((self.left(x) + self.right(x)).mean((2, 3)))


_BEFORE = """\
%0 = x
%1 = stem.weight
%2 = stem.bias
%3 = conv2d(%0, %1, %2, stride=[1, 1], padding=[0, 0], dilation=[1, 1], groups=1)
%4 = .relu(%3)
%5 = left.weight
%6 = left.bias
%7 = conv2d(%4, %5, %6, stride=[1, 1], padding=[0, 0], dilation=[1, 1], groups=1)
%8 = right.weight
%9 = conv2d(%4, %8, None, stride=[1, 1], padding=[0, 0], dilation=[1, 1], groups=1)
%10 = add(%7, %9)
%11 = .mean(%10, [2, 3])
%12 = head.weight
%13 = head.bias
%14 = linear(%11, %12, %13)
return %14"""

_AFTER = """\
%0 = x
%1 = self.quantizers.stem_input(%0)
%2 = stem.weight
%3 = self.quantizers.stem_weight(%2)
%4 = stem.bias
%5 = conv2d(%1, %3, %4, stride=[1, 1], padding=[0, 0], dilation=[1, 1], groups=1)
%6 = .relu(%5)
%7 = self.quantizers.left_input(%6)
%8 = left.weight
%9 = self.quantizers.left_weight(%8)
%10 = left.bias
%11 = conv2d(%7, %9, %10, stride=[1, 1], padding=[0, 0], dilation=[1, 1], groups=1)
%12 = right.weight
%13 = self.quantizers.right_weight(%12)
%14 = conv2d(%7, %13, None, stride=[1, 1], padding=[0, 0], dilation=[1, 1], groups=1)
%15 = add(%11, %14)
%16 = .mean(%15, [2, 3])
%17 = self.quantizers.head_input(%16)
%18 = head.weight
%19 = self.quantizers.head_weight(%18)
%20 = head.bias
%21 = linear(%17, %19, %20)
return %21"""


@pytest.fixture
def inserted(exposed) -> Callable[..., GraphModule]:
    """Capture, expose and insert, without calibration."""

    def make(model: nn.Module, *args: Tensor, **settings: Any) -> GraphModule:
        module = exposed(model, *args)
        config = QuantConfig(**settings)
        return run_passes(module, (PropagateShapes(args), InsertQuantizers(config)))

    return make


def _bits(module: GraphModule) -> dict[str, int]:
    return {site.edge: site.quantizer.spec.bits for site in sites(module)}


def test_before_and_after(exposed, show) -> None:
    module = exposed(_Net(), _IMAGE)
    assert show(module) == _BEFORE
    assert InsertQuantizers()(module).modified is True
    assert show(module) == _AFTER


def test_identity_precision_equals_eager(inserted) -> None:
    model = _Net()
    module = inserted(model, _IMAGE)
    for training in (False, True):
        model.train(training), module.train(training)
        with quantization_disabled(module):
            assert torch.equal(module(_IMAGE), model(_IMAGE))


def test_second_run_changes_nothing(inserted, show) -> None:
    module = inserted(_Net(), _IMAGE)
    names = list(module.state_dict())
    assert InsertQuantizers()(module).modified is False
    assert show(module) == _AFTER and list(module.state_dict()) == names


def test_alone_in_torchs_manager(exposed, alone, show) -> None:
    result = alone(InsertQuantizers(), exposed(_Net(), _IMAGE))
    assert result.modified and show(result.graph_module) == _AFTER


def test_quantizers_know_their_edge_and_its_shape(inserted) -> None:
    module = inserted(_Net(), _IMAGE)
    shapes = {site.edge: facts(site.node).shape for site in sites(module)}
    assert shapes == {
        "stem.input": (2, 3, 6, 6),
        "stem.weight": (4, 3, 3, 3),
        "left.input": (2, 4, 4, 4),
        "left.weight": (4, 4, 1, 1),
        "right.weight": (4, 4, 1, 1),
        "head.input": (2, 4),
        "head.weight": (2, 4),
    }
    assert all(facts(site.node).layer == site.edge for site in sites(module))


def test_refuses_a_graph_without_annotations() -> None:
    with pytest.raises(PassError, match="InsertQuantizers needs annotated operations"):
        InsertQuantizers()(capture(_Net(), (_IMAGE,), {}))


class _Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LayerNorm((3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).relu()


def test_refuses_a_model_without_operations_and_says_why(exposed) -> None:
    with pytest.raises(NothingToQuantizeError) as caught:
        InsertQuantizers()(exposed(_Norm(), _ROWS))
    assert "no operation that can be quantized (convolution, linear" in str(
        caught.value
    )
    assert "LayerNorm is not in the op table" in str(caught.value)


def test_refuses_when_everything_is_excluded_and_says_why(inserted) -> None:
    with pytest.raises(NothingToQuantizeError, match=r"stem.*excluded by the config"):
        inserted(_Net(), _IMAGE, exclude=("op:conv2d", "head"))
    with pytest.raises(NothingToQuantizeError, match="first_last='exclude'"):
        inserted(nn.Sequential(nn.Linear(4, 4)), _ROWS, first_last="exclude")


def test_refuses_to_share_a_name_with_the_model(exposed) -> None:
    class Clash(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quantizers = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.quantizers(x)

    with pytest.raises(PassError, match=r"attribute named 'quantizers'.*rename it"):
        InsertQuantizers()(exposed(Clash(), _ROWS))


# --- which edges ------------------------------------------------------------------


def test_a_tensor_read_by_two_layers_gets_one_quantizer_of_the_larger_width(
    inserted,
) -> None:
    overrides = {"right": Override(act_bits=6)}
    module = inserted(_Net(), _IMAGE, overrides=overrides)
    assert _bits(module)["left.input"] == 6
    assert "right.input" not in _bits(module)


def test_an_excluded_reader_keeps_the_original_tensor(inserted, show) -> None:
    module = inserted(_Net(), _IMAGE, exclude=("right",))
    assert set(_bits(module)) == {
        "stem.input", "stem.weight", "left.input", "left.weight",
        "head.input", "head.weight",
    }  # fmt: skip
    right = next(n for n in compute_nodes(module) if facts(n).layer == "right")
    assert facts(right).skip == "excluded by the configuration"
    assert [a.op for a in right.all_input_nodes] == ["call_method", "get_attr"]


class _Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.last = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.linear(self.fc(self.fc(x)), self.fc.weight))


def test_a_weight_used_three_times_gets_one_quantizer(inserted) -> None:
    module = inserted(_Twice(), _ROWS)
    assert [site.edge for site in weight_sites(module)] == ["fc.weight", "last.weight"]
    assert [site.edge for site in activation_sites(module)] == [
        "fc.input", "fc#2.input", "fc#3.input", "last.input",
    ]  # fmt: skip


def test_a_pattern_selects_every_call_of_a_layer(inserted) -> None:
    module = inserted(_Twice(), _ROWS, exclude=("fc",))
    assert set(_bits(module)) == {"last.input", "last.weight"}
    module = inserted(_Twice(), _ROWS, overrides={"fc": {"act_bits": 3}})
    bits = _bits(module)
    assert bits["fc.input"] == bits["fc#2.input"] == bits["fc#3.input"] == 3


def test_a_weight_with_two_layouts_is_quantized_as_a_whole(inserted) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(3, 3, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv_transpose2d(F.conv2d(x, self.kernel), self.kernel)

    (site,) = weight_sites(inserted(Both(), _IMAGE))
    assert site.quantizer.log2_step.numel() == 1


def test_a_parametrized_weight_is_a_weight(inserted) -> None:
    nested = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)))
    whole = parametrizations.weight_norm(nn.Linear(4, 4))
    for model in (nested, whole):
        module = inserted(model, _ROWS)
        (site,) = weight_sites(module)
        assert site.quantizer.log2_step.shape == (4, 1)
        assert len(activation_sites(module)) == 1


def test_a_weight_that_depends_on_the_input_is_an_activation(inserted) -> None:
    class Scaled(_Twice):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, x.mean() * self.fc.weight)

    module = inserted(Scaled(), _ROWS)
    assert [site.edge for site in activation_sites(module)] == [
        "linear.input", "linear.weight",
    ]  # fmt: skip


class _Products(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.bmm(a, mat2=b) + torch.matmul(a, other=b) + a @ b


def test_both_sides_of_a_matrix_product(inserted) -> None:
    a, b = torch.randn(2, 3, 4), torch.randn(2, 4, 5)
    module = inserted(_Products(), a, b)
    assert {site.edge for site in sites(module)} == {"bmm.input", "bmm.other"}
    for node in compute_nodes(module):
        assert {a.op for a in node.all_input_nodes} == {"call_module"}


def test_names_that_meet_in_one_key_get_two(inserted) -> None:
    model = nn.ModuleDict({"a_b": nn.Linear(4, 4)})
    model["a"] = nn.ModuleDict({"b": nn.Linear(4, 4)})

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x: Tensor) -> Tensor:
            return self.parts["a"]["b"](self.parts["a_b"](x))

    module = inserted(Net(), _ROWS)
    edges = [site.edge for site in weight_sites(module)]
    assert edges == ["parts.a_b.weight", "parts.a.b.weight"]
    assert len(module.quantizers) == 4
    owners = [site.quantizer.edge for site in sites(module)]
    assert len(set(owners)) == 4


def test_an_in_place_operation_between_producer_and_reader(inserted) -> None:
    """The quantizer must see what its reader would have seen."""

    class InPlace(_Twice):
        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x)
            F.relu_(y)
            return self.last(y)

    model = InPlace()
    module = inserted(model, _ROWS, weight_bits=16, act_bits=16)
    for site in weight_sites(module):
        site.quantizer.open_to(site.weight(), 16)
    for site in activation_sites(module):
        site.quantizer.cover(-8.0, 8.0, 16)
    torch.testing.assert_close(module(_ROWS), model(_ROWS), rtol=0.0, atol=1e-2)


@pytest.mark.parametrize("spelling", ["method", "function", "module"])
def test_an_in_place_operation_between_two_readers(inserted, spelling: str) -> None:
    """The first reads the value before, the second after: two edges of one tensor."""

    class Between(_Twice):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x)
            before = self.last(y)
            if spelling == "method":
                y.relu_()
            elif spelling == "function":
                F.relu(y, inplace=True)
            else:
                self.act(y)
            return before + self.last(y)

    model = Between()
    module = inserted(model, _ROWS, weight_bits=16, act_bits=16)
    for site in weight_sites(module):
        site.quantizer.open_to(site.weight(), 16)
    for site in activation_sites(module):
        site.quantizer.cover(-8.0, 8.0, 16)
    torch.testing.assert_close(module(_ROWS), model(_ROWS), rtol=0.0, atol=1e-2)
    with quantization_disabled(module):
        assert torch.equal(module(_ROWS), model(_ROWS))


# --- never negative ---------------------------------------------------------------


def _linear_after(function: Callable[..., Tensor]) -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.pool = nn.MaxPool1d(1)
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(function(self, x))

    return Net()


_SIGNS: dict[str, tuple[bool, Callable[[Any, Tensor], Tensor]]] = {
    "relu module": (True, lambda m, x: m.act(x)),
    "relu method": (True, lambda m, x: x.relu()),
    "relu torch": (True, lambda m, x: torch.relu(x)),
    "relu in place": (True, lambda m, x: F.relu(x + 1.0, inplace=True)),
    "relu6, sigmoid": (True, lambda m, x: F.relu6(x) * x.sigmoid()),
    "softmax": (True, lambda m, x: F.softmax(x, dim=1)),
    "abs": (True, lambda m, x: x.abs() + torch.abs(x)),
    "abs of Python": (True, lambda m, x: abs(x)),
    "relu, pool, flatten": (True, lambda m, x: m.pool(x.relu()).flatten(1)),
    "relu, functional pool": (True, lambda m, x: F.max_pool1d(x.relu(), 1)),
    "relu, mean": (True, lambda m, x: x.relu().mean(0, keepdim=True)),
    "relu, dropout": (True, lambda m, x: F.dropout(x.relu(), 0.0)),
    "relu, shape": (True, lambda m, x: x.relu().view(-1, 2, 2).reshape(-1, 4)),
    "add of relus": (True, lambda m, x: x.relu() + torch.add(x.relu(), x.relu())),
    "cat of relus": (True, lambda m, x: torch.cat([x.relu(), x.relu()], 0)),
    "positive constants": (True, lambda m, x: 2.0 * (x.relu() + 3)),
    "input": (False, lambda m, x: x),
    "silu": (False, lambda m, x: F.silu(x)),
    "linear": (False, lambda m, x: m.fc(x)),
    "add of relu and input": (False, lambda m, x: x.relu() + x),
    "cat of relu and input": (False, lambda m, x: torch.cat([x.relu(), x])),
    "product of two inputs": (False, lambda m, x: x * x),
    "minus": (False, lambda m, x: x.relu() - 3.0),
    "plus a negative": (False, lambda m, x: x.relu() + (-3.0)),
    "times a negative": (False, lambda m, x: x.relu() * -1.0),
    "torch.mul negative": (False, lambda m, x: torch.mul(x.relu(), -2)),
    "negated": (False, lambda m, x: -x.relu()),
    "add with negative alpha": (
        False,
        lambda m, x: torch.add(x.relu(), x.abs(), alpha=-1),
    ),
    "add method with alpha": (False, lambda m, x: x.relu().add(x.abs(), alpha=-1)),
}


@pytest.mark.parametrize("case", _SIGNS)
def test_what_cannot_be_negative_has_no_learnable_lower_bound(
    inserted, case: str
) -> None:
    wanted, function = _SIGNS[case]
    module = inserted(_linear_after(function), _ROWS)
    quantizer = activation_sites(module)[-1].quantizer
    assert quantizer.nonnegative is wanted
    learned = "lower" in dict(quantizer.named_parameters())
    assert learned is not wanted
    assert float(quantizer.lower) == 0.0 or learned


@pytest.mark.parametrize("through_a_view", [False, True])
def test_a_value_made_negative_in_place_is_signed(
    inserted, through_a_view: bool
) -> None:
    def shifted(model: Any, x: Tensor) -> Tensor:
        y = x.relu()
        (y.view(-1) if through_a_view else y).sub_(3.0)
        return y

    module = inserted(_linear_after(shifted), _ROWS)
    assert not activation_sites(module)[-1].quantizer.nonnegative


def test_padding_keeps_the_sign(inserted) -> None:
    """A convolution with a padding mode of its own still reads what ReLU gave."""
    model = nn.Sequential(
        nn.ReLU(), nn.Conv2d(3, 2, 3, padding=1, padding_mode="reflect")
    )
    module = inserted(model, _IMAGE)
    assert activation_sites(module)[0].quantizer.nonnegative


def test_a_chain_of_additions_is_walked_once(
    inserted, monkeypatch: pytest.MonkeyPatch
) -> None:
    def doubled(model: Any, x: Tensor) -> Tensor:
        x = x.relu()
        for _ in range(24):
            x = x + x
        return x

    asked = 0

    def counted(node: Any) -> Any:
        nonlocal asked
        asked += 1
        assert asked < 20_000, "every addition doubles the work"
        return facts(node)

    path = "gdnsq_fx.passes.insert_quantizers.facts"
    monkeypatch.setattr(path, counted, raising=False)
    module = inserted(_linear_after(doubled), _ROWS)
    assert activation_sites(module)[-1].quantizer.nonnegative


# --- settings ---------------------------------------------------------------------


class _Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.body = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
        self.fc1 = nn.Linear(4, 4)
        self.fc2 = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(self.body(self.stem(x)).mean((2, 3))))


_LAYERS = ("stem", "body.0", "body.1", "fc1", "fc2")


def _layer_bits(module: GraphModule) -> dict[str, tuple[int, int]]:
    bits = _bits(module)
    found = [layer for layer in _LAYERS if f"{layer}.weight" in bits]
    return {k: (bits[f"{k}.weight"], bits[f"{k}.input"]) for k in found}


@pytest.mark.parametrize(
    ("first_last", "ends"), [(8, (8, 8)), (3, (3, 4)), (None, (2, 4)), (16, (16, 16))]
)
def test_first_and_last_layer_have_at_least_so_many_bits(
    inserted, first_last: int | None, ends: tuple[int, int]
) -> None:
    module = inserted(_Deep(), _IMAGE, weight_bits=2, act_bits=4, first_last=first_last)
    inner = (2, 4)
    assert _layer_bits(module) == {
        "stem": ends, "body.0": inner, "body.1": inner, "fc1": inner, "fc2": ends
    }  # fmt: skip


def test_first_and_last_layer_excluded(inserted) -> None:
    module = inserted(_Deep(), _IMAGE, first_last="exclude")
    assert set(_layer_bits(module)) == {"body.0", "body.1", "fc1"}
    skipped = {facts(n).layer for n in compute_nodes(module) if facts(n).skip}
    assert skipped == {"stem", "fc2"}


@pytest.mark.parametrize(
    ("settings", "layers"),
    [
        ({"include": ("body.*",)}, {"body.0", "body.1"}),
        ({"include": ("fc?", "stem")}, {"stem", "fc1", "fc2"}),
        ({"include": ("op:conv*",)}, {"stem", "body.0", "body.1"}),
        ({"exclude": ("op:linear", "*.1")}, {"stem", "body.0"}),
        ({"include": ("op:conv2d",), "exclude": ("body*",)}, {"stem"}),
    ],
)
def test_include_and_exclude(
    inserted, settings: dict[str, Any], layers: set[str]
) -> None:
    module = inserted(_Deep(), _IMAGE, **settings)
    assert set(_layer_bits(module)) == layers
    skipped = {facts(n).layer for n in compute_nodes(module) if facts(n).skip}
    assert skipped == set(_LAYERS) - layers


def test_overrides_by_name_and_operation_later_ones_win(inserted) -> None:
    overrides = {
        "op:conv*": {"weight_bits": 3},
        "body.*": Override(act_bits=5, estimator="ste", offset="free"),
        "body.1": {"per_channel": False, "weight_bits": 6},
        "fc2": {"weight_bits": 1},
    }
    module = inserted(_Deep(), _IMAGE, overrides=overrides)
    assert _layer_bits(module) == {
        "stem": (3, 8), "body.0": (3, 5), "body.1": (6, 5), "fc1": (2, 2), "fc2": (1, 8)
    }  # fmt: skip
    specs = {site.edge: site.quantizer.spec for site in sites(module)}
    assert specs["body.0.weight"] == QuantSpec(3, "ste", "free", per_channel=True)
    assert specs["body.1.weight"] == QuantSpec(6, "ste", "free", per_channel=False)
    assert specs["body.1.input"] == QuantSpec(5, "ste", "free")
    assert specs["fc1.weight"] == QuantSpec(2, "lsq", "half_step", per_channel=True)
    sizes = {s.edge: s.quantizer.log2_step.numel() for s in weight_sites(module)}
    assert sizes["body.0.weight"] == 4 and sizes["body.1.weight"] == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"include": ("layer9.*",)},
            ["include", "'layer9.*'", "stem, body.0", "conv2d"],
        ),
        ({"exclude": ("body",)}, ["exclude", "'body'", "Layers: stem, body.0"]),
        ({"overrides": {"op:gru": {}}}, ["overrides", "'op:gru'", "conv2d, linear"]),
    ],
)
def test_refuses_a_pattern_that_matches_nothing(
    inserted, settings: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(PatternError) as caught:
        inserted(_Deep(), _IMAGE, **settings)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_pattern_may_name_a_layer_that_cannot_be_opened(inserted) -> None:
    model = _Deep()
    model.fc1.register_forward_hook(lambda *_: None)
    module = inserted(model, _IMAGE, exclude=("fc1",))
    assert set(_layer_bits(module)) == {"stem", "body.0", "body.1", "fc2"}


# --- layout -----------------------------------------------------------------------


def _naive(weight: Tensor, channels: list[Tensor], bits: int) -> Tensor:
    """Quantize each output channel by itself; ``channels`` are masks."""
    result = weight.clone()
    for mask in channels:
        values = weight[mask]
        step = (values.max() - values.min()) / (2**bits - 1)
        codes = ((values - values.min()) / step).round()
        result[mask] = codes * step + values.min()
    return result


def _channel_masks(layer: nn.Module) -> list[Tensor]:
    """Which weights reach one output channel, found by asking the layer itself."""
    weight = layer.weight
    x = torch.rand(1, layer.in_channels, *[6, 5, 4][: weight.ndim - 2]) + 1.0
    masks = []
    for channel in range(layer.out_channels):
        (gradient,) = torch.autograd.grad(layer(x)[0, channel].sum(), weight)
        masks.append(gradient != 0)
    return masks


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(
    "name", ["Conv1d", "Conv2d", "Conv3d"] + [f"ConvTranspose{d}d" for d in (1, 2, 3)]
)
def test_per_channel_layout_against_a_loop_over_channels(
    inserted, name: str, groups: int
) -> None:
    layer = getattr(nn, name)(4, 8, 2, groups=groups)
    x = torch.randn(1, 4, *[6, 5, 4][: int(name[-2])])
    module = inserted(nn.Sequential(layer), x, first_last=None, offset="free")
    (site,) = weight_sites(module)
    assert site.quantizer.log2_step.numel() == 8
    site.quantizer.open_to(site.weight(), 3)
    wanted = _naive(layer.weight.detach(), _channel_masks(layer), 3)
    got = site.quantizer(layer.weight)
    torch.testing.assert_close(got, wanted, rtol=0.0, atol=1e-5)


def test_module_types_and_modes(inserted) -> None:
    module = inserted(_Net().eval(), _IMAGE)
    kinds = {site.edge: type(site.quantizer) for site in sites(module)}
    assert kinds["stem.input"] is ActivationQuantizer
    assert kinds["stem.weight"] is WeightQuantizer
    assert not any(q.training for q in module.quantizers.values())
    module = inserted(_Net().train(), _IMAGE)
    assert all(q.training for q in module.quantizers.values())
