"""A model and an example become a graph; the model is left untouched."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Proxy, symbolic_trace

from gdnsq_fx.annotations import source_of
from gdnsq_fx.capture.capture import capture
from gdnsq_fx.errors import CaptureError

_X = torch.randn(4, 4)


class _Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)


class _Norm(_Linear):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.norm(self.fc(x)))


def _snapshot(model: nn.Module) -> Any:
    tensors = {k: (id(v), v._version, v.clone()) for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    names = [sorted(vars(m)) for m in model.modules()]
    grads = {k: p.grad for k, p in model.named_parameters()}
    needed = {k: p.requires_grad for k, p in model.named_parameters()}
    return tensors, modes, names, grads, needed


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_untouched(training: bool) -> None:
    model = _Norm().train(training)
    model.norm.eval()
    model.fc.bias.requires_grad_(False)
    model(_X).sum().backward()
    before = _snapshot(model)
    parameters = [id(p) for p in model.parameters()]
    state, example = torch.get_rng_state(), _X.clone()
    captured = capture(model, (example,), {})
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(example, _X)
    after = _snapshot(model)
    for (_, version, value), (_, later, now) in zip(
        before[0].values(), after[0].values(), strict=True
    ):
        assert later == version and torch.equal(now, value)
    assert after[1:3] == before[1:3] and after[4] == before[4]
    assert all(after[3][k] is g for k, g in before[3].items())
    assert [id(p) for p in model.parameters()] == parameters
    assert not captured.get_submodule("norm").training
    assert not captured.get_parameter("fc.bias").requires_grad
    assert type(model).__call__ is nn.Module.__call__


def test_the_example_is_left_untouched_by_a_model_that_writes_into_it() -> None:
    class InPlace(_Linear):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.mul_(2.0))

    x = _X.clone()
    capture(InPlace(), (x,), {})
    assert torch.equal(x, _X)


def test_captured_state_equals_the_models_state() -> None:
    model = _Norm()
    captured = capture(model, (_X,), {}).state_dict()
    assert all(torch.equal(captured[k], v) for k, v in model.state_dict().items())


def test_another_batch_size() -> None:
    model = _Norm().eval()
    captured = capture(model, (_X,), {})
    for batch in (1, 7):
        x = torch.randn(batch, 4)
        assert torch.equal(captured(x), model(x))


def test_nodes_know_their_line_in_the_model() -> None:
    captured = capture(_Norm(), (_X,), {})
    calls = captured.graph.find_nodes(op="call_module")
    assert all(source_of(n).startswith("test_capture.py:") for n in calls)


# --- arguments --------------------------------------------------------------------


class _Two(_Linear):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.fc(a) - b


def test_tuple_and_keyword_examples() -> None:
    model, other = _Two(), torch.randn(4, 4)
    wanted = model(_X, other)
    captured = capture(model, (_X, other), {})
    assert torch.equal(captured(_X, other), wanted)
    assert torch.equal(captured(b=other, a=_X), wanted)
    captured = capture(model, (), {"b": other, "a": _X})
    assert torch.equal(captured(_X, other), wanted)
    captured = capture(model, (_X,), {"b": other})
    assert torch.equal(captured(_X, b=other), wanted)


def test_nested_inputs_and_outputs() -> None:
    class Nested(_Linear):
        def forward(self, pair: Any, named: Any) -> Any:
            return {"sum": self.fc(pair[0]) + pair[1][0], "same": (named["x"],)}

    model = Nested()
    args = ((_X, [_X]), {"x": _X})
    captured = capture(model, args, {})
    wanted, got = model(*args), captured(*args)
    assert torch.equal(got["sum"], wanted["sum"]) and got["same"][0] is _X


@pytest.mark.parametrize(
    "default", [None, True, 2, 1.5, "name", (2, 2), [2, 2], {"k": 2}, torch.relu]
)
def test_arguments_left_out_keep_their_default(default: Any) -> None:
    class Optional(_Linear):
        def forward(self, x: Tensor, option: Any = default) -> Tensor:
            return self.fc(x) if option == default else x

    model = Optional()
    captured = capture(model, (_X,), {})
    assert torch.equal(captured(_X), model(_X))
    captured = capture(model, (), {"x": _X})
    assert torch.equal(captured(x=_X), model(_X))


def test_keyword_only_and_variadic_arguments() -> None:
    class KeywordOnly(_Linear):
        def forward(self, x: Tensor, *, gain: float = 2.0, other: Any = None) -> Tensor:
            return self.fc(x) * gain

    class Variadic(_Linear):
        def forward(self, *xs: Tensor) -> Tensor:
            return self.fc(xs[0]) + xs[1]

    class Keywords(_Linear):
        def forward(self, x: Tensor, **others: Tensor) -> Tensor:
            return self.fc(x) + others["y"]

    for model, args, kwargs in (
        (KeywordOnly(), (_X,), {}),
        (KeywordOnly(), (_X,), {"other": _X}),
        (Variadic(), (_X, _X), {}),
        (Keywords(), (_X,), {"y": _X}),
    ):
        captured = capture(model, args, kwargs)
        assert torch.equal(captured(*args, **kwargs), model(*args, **kwargs))


class _Flag(_Linear):
    def forward(self, x: Tensor, flag: Any = None) -> Tensor:
        return self.fc(x) if flag is None or flag == 3 else x.neg()


@pytest.mark.parametrize("flag", [False, None, "name", 3])
def test_arguments_that_are_no_tensors_are_fixed_or_refused(flag: Any) -> None:
    _check_captured_or_refused(_Flag(), (_X, flag), {})
    _check_captured_or_refused(_Flag(), (), {"flag": flag, "x": _X})


def _check_captured_or_refused(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """What cannot be captured is a `CaptureError`, never another graph or error."""
    try:
        captured = capture(model, args, kwargs)
    except CaptureError:
        return
    wanted = copy.deepcopy(model).eval()(*args, **kwargs)
    torch.testing.assert_close(captured.eval()(*args, **kwargs), wanted)


# --- kinds of models --------------------------------------------------------------


def test_a_graph_module_is_taken_as_it_is() -> None:
    model = symbolic_trace(_Norm().eval())
    code = model.code
    captured = capture(model, (_X,), {})
    assert captured is not model and model.code == code
    assert captured.graph is not model.graph
    assert torch.equal(captured(_X), model(_X))
    assert list(captured.state_dict()) == list(model.state_dict())
    assert isinstance(model, GraphModule)


def test_modules_that_are_built_on_the_first_call() -> None:
    model = nn.Sequential(nn.LazyLinear(5), nn.ReLU(), nn.LazyLinear(2))
    captured = capture(model, (_X,), {})
    assert captured(_X).shape == (4, 2)
    assert captured.state_dict()["0.weight"].shape == (5, 4)
    assert isinstance(model[0].weight, nn.UninitializedParameter)


def test_a_model_without_parameters() -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x)

    captured = capture(nn.Sequential(Plain()), (_X,), {})
    assert torch.equal(captured(_X), _X.relu())


def test_a_weight_that_is_no_leaf() -> None:
    """Torch's old weight_norm: deepcopy alone would refuse the model."""
    with pytest.warns(FutureWarning):
        model = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 4)))
    captured = capture(model, (_X,), {})
    torch.testing.assert_close(captured(_X), model(_X))
    assert list(captured.state_dict()) == list(model.state_dict())


class _NoCopy(_Linear):
    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise TypeError("there can be only one")

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def test_a_model_that_cannot_be_copied_is_captured_in_place() -> None:
    model = _NoCopy()
    with pytest.raises(CaptureError, match=r"only one\. Pass inplace=True"):
        capture(model, (_X,), {})
    captured = capture(model, (_X,), {}, inplace=True)
    assert captured.get_parameter("fc.weight") is model.fc.weight
    assert set(vars(model)["_modules"]) == {"fc"}
    torch.testing.assert_close(captured(_X), model(_X))


def test_state_that_is_replaced_in_forward_is_left_as_it_was() -> None:
    class Counting(_Linear):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls = self.calls + 1.0
            return self.fc(x)

    model = Counting()
    captured = capture(model, (_X,), {})
    assert float(model.calls) == 0.0 and float(captured.calls) == 0.0


class _Caching(_Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.last_input = x
        return self.fc(x)


def test_attributes_written_in_forward_leave_no_trace() -> None:
    captured = capture(nn.Sequential(_Caching(), nn.Linear(4, 2)), (_X,), {})
    assert not isinstance(vars(captured.get_submodule("0")).get("last_input"), Proxy)
    assert torch.equal(copy.deepcopy(captured)(_X), captured(_X))


class _Guarded(_Norm):
    """``train()`` keeps a BatchNorm in evaluation, as detection backbones do."""

    def train(self, mode: bool = True) -> _Norm:
        super().train(mode)
        self.norm.eval()
        return self


def test_a_model_that_guards_its_mode() -> None:
    _check_captured_or_refused(_Guarded().train(), (_X,), {})


# --- errors -----------------------------------------------------------------------


class _Branch(_Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        return y if x.sum() > 0 else y.neg()


class _Size(_Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)[: int(x.abs().sum())]


@pytest.mark.parametrize("cls", [_Branch, _Size])
def test_control_flow_that_depends_on_data_goes_as_on_the_example(cls: Any) -> None:
    model, x = cls(), torch.full((4, 4), 0.2)
    captured = capture(model, (x,), {})
    torch.testing.assert_close(captured(x), model(x))
    facts = captured.facts
    assert facts.real
    assert any(s.source.startswith("test_capture.py:") for s in facts.specialized)


class _Iterator(_Linear):
    def forward(self, x: Tensor) -> Any:
        return iter([self.fc(x)])


def test_a_model_that_no_graph_holds_names_cause_and_remedy() -> None:
    with pytest.raises(CaptureError) as caught:
        capture(_Iterator(), (_X,), {})
    message = str(caught.value)
    assert message.startswith("_Iterator cannot be captured: ")
    assert "list_iterator" in message and "return tensors in tuples" in message


def test_a_model_that_fails_on_the_example() -> None:
    with pytest.raises(CaptureError, match=r"_Norm fails on the example.*Check exam"):
        capture(_Norm(), (torch.randn(4, 5),), {})
    with pytest.raises(CaptureError, match="fails on the example input"):
        capture(_Two(), (_X,), {})


def test_a_failed_capture_leaves_the_model_untouched() -> None:
    model = nn.Sequential(_Norm(), _Iterator()).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CaptureError):
        capture(model, (_X,), {})
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(m.training for m in model.modules())


def test_a_keyword_only_argument_after_an_optional_one() -> None:
    class Mixed(_Linear):
        def forward(self, x: Tensor, scale: float = 1.0, *, shift: Tensor) -> Tensor:
            return self.fc(x) * scale + shift

    captured = capture(Mixed(), (_X, 2.0), {"shift": torch.ones(4)})
    wanted = captured.get_submodule("fc")(_X) * 2.0 + 1.0
    torch.testing.assert_close(captured(_X, 2.0, shift=torch.ones(4)), wanted)


def test_an_ordered_dict_is_a_dict() -> None:
    class Named(_Linear):
        def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
            return OrderedDict(out=self.fc(x))

    captured = capture(Named(), (_X,), {})
    torch.testing.assert_close(captured(_X)["out"], captured.get_submodule("fc")(_X))


def test_a_captured_model_can_be_pickled() -> None:
    captured = capture(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), (_X,), {})
    again = pickle.loads(pickle.dumps(captured))
    torch.testing.assert_close(again(_X), captured(_X))
