"""A graph that does not compute what the model computes is an error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gdnsq_fx.capture.capture import capture
from gdnsq_fx.capture.captured import CapturedModule
from gdnsq_fx.capture.self_check import observe, self_check
from gdnsq_fx.errors import CaptureError, CaptureWarning
from gdnsq_fx.state import preserved_state

_X = torch.randn(4, 4)


class _Switch(nn.Module):
    def __init__(self, evaluation: Callable[..., Any], training: Callable[..., Any]):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.head = nn.Linear(4, 4)
        self.paths = (evaluation, training)

    def forward(self, x: Tensor) -> Any:
        return self.paths[self.training](self, x)


_PATHS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "another value": (lambda m, x: m.fc(x), lambda m, x: 2.0 * m.fc(x)),
    "another shape": (lambda m, x: m.fc(x).mean(1), lambda m, x: m.fc(x)),
    "one more output": (lambda m, x: m.fc(x), lambda m, x: (m.fc(x), m.head(x))),
    "one output fewer": (lambda m, x: (m.fc(x), m.head(x)), lambda m, x: m.fc(x)),
    "more in a dict": (
        lambda m, x: {"out": m.fc(x)},
        lambda m, x: {"out": m.fc(x), "aux": m.head(x)},
    ),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("case", _PATHS)
def test_train_and_eval_that_differ_are_one_graph(case: str, training: bool) -> None:
    model = _Switch(*_PATHS[case]).train(training)
    captured = capture(model, (_X,), {})
    assert model.training is training and captured.training is training
    for mode in (True, False, True):
        wanted, got = model.train(mode)(_X), captured.train(mode)(_X)
        torch.testing.assert_close(got, wanted)


class _Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)


class _Rows(_Linear):
    """Knows one batch size only."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).reshape(4, 4)


class _AnyRows(_Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def test_another_batch_is_compared_and_is_a_warning() -> None:
    graph = capture(_Rows(), (_X,), {}).graph  # eager refuses it as well: no warning
    model = _AnyRows()
    seen = observe(model, (_X,), {})
    with pytest.warns(CaptureWarning, match=r"on another batch it fails.*shape"):
        self_check(seen, model, CapturedModule(model, graph), ((_X,), {}))


class _Counting(_Linear):
    """Notes how many samples each call in Python gets."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.shape[0])
        return self.fc(x)


def test_a_few_samples_stand_for_a_large_example() -> None:
    model = _Counting()
    seen = observe(model, (torch.randn(64, 4),), {})
    assert model.seen == [2, 2]
    assert [(one.training, one.is_example) for one in seen] == [
        (False, False),
        (True, False),
    ]


def test_an_example_that_others_do_not_stand_for_is_run_itself() -> None:
    model = _Rows()
    seen = observe(model, (_X,), {})  # 4 rows; eager refuses 2
    assert [one.is_example for one in seen] == [False, False, True]
    with pytest.raises(CaptureError, match="fails on the example"):
        observe(model, (torch.randn(8, 4),), {})


class _Twice(_Linear):
    """Two layers, of which a wrong graph may leave one out."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.fc(2.0 * x))


@pytest.mark.parametrize("mode", [False, True])
def test_a_wrong_graph_is_an_error_that_names_the_first_node(mode: bool) -> None:
    model = _Twice().train(mode)
    captured = capture(model, (_X,), {}, inplace=True)
    factor = next(n for n in captured.graph.nodes if n.op == "call_function")
    factor.args = (factor.args[0], 3.0)
    captured.recompile()
    with pytest.raises(CaptureError, match=r"other values.*first at fc \(.*\.py:\d+\)"):
        self_check(observe(model, (_X,), {}), model, captured, ((_X,), {}))


def test_a_graph_that_fails_is_an_error() -> None:
    model = _Twice()
    captured = capture(model, (_X,), {})
    next(n for n in captured.graph.nodes if n.name == "act").target = "fc.weight"
    captured.recompile()
    with pytest.raises(CaptureError, match="the captured graph fails"):
        self_check(observe(model, (_X,), {}), model, captured, ((_X,), {}))


def test_outputs_that_are_not_finite_are_compared_too() -> None:
    class Infinite(_Linear):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) / torch.zeros(()) * 0.0

    capture(Infinite(), (_X,), {})


def test_outputs_that_are_no_tensors_are_compared() -> None:
    class Mixed(_Linear):
        def forward(self, x: Tensor) -> tuple[Any, ...]:
            return self.fc(x), x.shape[0], None, "name", x.argmax(1), x > 0

    found = capture(Mixed(), (_X,), {})(_X)
    assert found[1:4] == (4, None, "name")


@dataclass
class _Answer:
    logits: Tensor
    hidden: Tensor


class _PlainDataclass(_Linear):
    def forward(self, x: Tensor) -> _Answer:
        y = self.fc(x)
        return _Answer(logits=y, hidden=2.0 * y)


class _OtherHidden(_PlainDataclass):
    def forward(self, x: Tensor) -> _Answer:
        y = self.fc(x)
        return _Answer(logits=y, hidden=y)


def test_dataclasses_are_compared_field_by_field() -> None:
    captured = capture(_PlainDataclass(), (_X,), {})
    assert isinstance(captured(_X), _Answer)
    model = _OtherHidden()
    with pytest.raises(CaptureError, match="returns other values"):
        self_check(observe(model, (_X,), {}), model, captured, ((_X,), {}))


def test_preserved_state_restores_buffers_modes_and_random_state() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout())
    model[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), preserved_state(model):
        model.train()
        model(_X)
        raise ZeroDivisionError
    assert [m.training for m in model.modules()] == [True, True, False]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_random_state_of_every_device_stays() -> None:
    model = nn.Linear(4, 4).cuda()  # no buffer says that it is on a GPU
    state = torch.cuda.get_rng_state()
    capture(model, (_X.cuda(),), {})
    assert torch.equal(torch.cuda.get_rng_state(), state)
