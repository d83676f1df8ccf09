"""Capturing changes nothing: neither the model, nor the example, nor random numbers."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy
from torch.utils._pytree import tree_leaves

from gdnsq_fx.capture.capture import capture
from gdnsq_fx.errors import CaptureError

_X = torch.randn(3, 4)


class _Stateful(nn.Module):
    """Buffers of both kinds, tied and frozen parameters, modes of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.tied = nn.Linear(4, 4), nn.Linear(4, 4)
        self.tied.weight = self.fc.weight
        self.norm, self.held = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
        self.drop = nn.Dropout()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("scratch", torch.ones(4), persistent=False)
        self.history: list[int] = []
        self.note: dict[str, Any] = {"text": "mine"}
        self.fc.bias.requires_grad_(False)
        self.held.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.scratch = self.scratch * 0.5
        self.last_input = x
        self.fc.seen = x
        self.note["shape"] = x.shape
        self.history.append(x.shape[0])
        x = self.held(self.norm(self.tied(self.fc(x))))
        return self.drop(x) * self.scratch


def _facts(model: nn.Module) -> dict[str, Any]:
    """What can be said of a model without its values."""
    return {
        "modules": [(name, id(m), type(m)) for name, m in model.named_modules()],
        "modes": [m.training for m in model.modules()],
        "tensors": [
            (name, id(t), t._version, t.requires_grad, t.grad)
            for name, t in (*model.named_parameters(), *model.named_buffers())
        ],
        "attributes": [
            {name: id(value) for name, value in vars(m).items()}
            for m in model.modules()
        ],
        "hooks": [
            [len(value) for name, value in vars(m).items() if name.endswith("_hooks")]
            for m in model.modules()
        ],
    }


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_as_it_was(training: bool) -> None:
    model = _Stateful().train(training)
    model.norm.register_forward_hook(lambda *_: None)
    values = {name: b.clone() for name, b in model.named_buffers()}
    before = _facts(model)
    captured = capture(model, (_X,), {})
    assert _facts(model) == before
    assert all(torch.equal(b, values[name]) for name, b in model.named_buffers())
    assert model.history == [] and model.note == {"text": "mine"}
    assert not {id(t) for t in captured.parameters()} & set(map(id, model.parameters()))


def test_the_captured_model_starts_with_the_models_state() -> None:
    model = _Stateful().train()
    captured = capture(model, (_X,), {})
    wanted = dict(model.named_buffers())
    assert all(torch.equal(b, wanted[name]) for name, b in captured.named_buffers())
    modes = {name: m.training for name, m in model.named_modules()}
    assert modes == {name: m.training for name, m in captured.named_modules()}
    needed = {name: p.requires_grad for name, p in model.named_parameters()}
    assert needed == {name: p.requires_grad for name, p in captured.named_parameters()}


def test_no_attribute_holds_what_tracing_left() -> None:
    captured = capture(nn.Sequential(_Stateful(), nn.Linear(4, 4)), (_X,), {})
    for module in captured.modules():
        kept = {k: v for k, v in vars(module).items() if k not in ("_graph", "meta")}
        for leaf in tree_leaves(kept):
            assert not isinstance(leaf, Proxy)
            assert not isinstance(leaf, Tensor) or type(leaf) in (Tensor, nn.Parameter)
            assert not isinstance(leaf, int) or type(leaf) in (int, bool)
    captured(_X)


def test_random_states_are_as_they_were() -> None:
    model = _Stateful().train()
    state, python = torch.get_rng_state(), random.getstate()
    capture(model, (_X,), {})
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == python


def test_global_settings_are_as_they_were() -> None:
    settings: list[Callable[[], Any]] = [
        torch.is_grad_enabled,
        torch.get_default_dtype,
        torch.is_inference_mode_enabled,
        lambda: torch.zeros(2).sum().item(),
        lambda: type(nn.Linear(2, 2)(torch.zeros(1, 2))),
        lambda: (nn.Module.__call__, torch.zeros, F.relu, Tensor.add, torch.Size),
    ]
    before = [setting() for setting in settings]
    capture(_Stateful(), (_X,), {})
    assert [setting() for setting in settings] == before
    with torch.no_grad():
        capture(_Stateful(), (_X,), {})
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


def test_the_example_is_as_it_was() -> None:
    class Writes(nn.Module):
        def forward(self, batch: dict[str, Any]) -> Tensor:
            batch["more"] = batch["x"].add_(1.0)
            batch["others"].append(batch.pop("gone"))
            return batch["more"] * sum(batch["others"])

    batch = {"x": _X.clone(), "others": [_X.clone()], "gone": _X.clone()}
    captured = capture(Writes(), (batch,), {})
    assert list(batch) == ["x", "others", "gone"] and len(batch["others"]) == 1
    assert torch.equal(batch["x"], _X) and torch.equal(batch["others"][0], _X)
    torch.testing.assert_close(captured(dict(batch)), (_X + 1.0) * (_X + _X))


def test_an_example_that_needs_a_gradient() -> None:
    x = _X.clone().requires_grad_()
    captured = capture(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), (x * 1.0,), {})
    captured(x).sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape


def test_a_failed_capture_leaves_everything_as_it_was() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            self.left = x
            raise ValueError("on purpose")

    model = nn.Sequential(_Stateful(), Fails()).train()
    before, state = _facts(model), torch.get_rng_state()
    with pytest.raises(CaptureError, match="on purpose"):
        capture(model, (_X,), {})
    assert _facts(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert type(torch.zeros(1) + 1) is Tensor


def test_a_capture_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    capture(_Stateful(), (_X,), {})
    found = capfd.readouterr()
    assert found.out == "" and found.err == ""


def test_a_buffer_registered_in_forward() -> None:
    class Caches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if not hasattr(self, "table"):
                table = torch.arange(x.shape[-1]).float()
                self.register_buffer("table", table, persistent=False)
            return x * self.table

    model = Caches()
    captured = capture(model, (_X,), {})
    assert not dict(model.named_buffers()) and not captured.state_dict()
    large = torch.randn(5, 4)
    assert torch.equal(captured(large), model(large))


def test_a_buffer_that_forward_replaces(same: Any) -> None:
    class Running(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
            return x - self.mean

    captured = same(Running(), _X)
    before = captured.get_buffer("mean").clone()
    captured(_X)
    assert not torch.equal(captured.get_buffer("mean"), before)


class _Lazy(nn.Module):
    """As ConViT caches the distances between patches: of its first size until then."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(1, 3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.table.shape[1] != x.shape[1]:
            self.table = torch.arange(x.shape[1]).float()[None]
        return x * self.table


def test_a_buffer_that_forward_replaces_by_one_of_another_shape(same: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), _Lazy())
    captured = same(model, _X, others=((torch.randn(5, 4),),))
    assert captured.get_buffer("1.table").shape == (1, 4)


def test_it_is_replaced_in_the_copy_that_runs() -> None:
    captured = capture(nn.Sequential(nn.Linear(4, 4), _Lazy()), (_X,), {})
    for twin in (copy.deepcopy(captured), pickle.loads(pickle.dumps(captured))):
        twin(_X)
        assert twin.get_buffer("1.table").shape == (1, 4)
        assert captured.get_buffer("1.table").shape == (1, 3)


def test_a_buffer_that_forward_writes_into(same: Any) -> None:
    class Queue(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("queue", torch.zeros(8, 4))
            self.register_buffer("count", torch.zeros((), dtype=torch.long))

        def forward(self, x: Tensor) -> Tensor:
            self.queue[: x.shape[0]] = x.detach()
            self.queue.mul_(0.5)
            self.count += 1
            return x @ self.queue.T + self.count

    captured = same(Queue(), _X, others=((torch.randn(5, 4),),))
    assert int(captured.get_buffer("count")) == 4
