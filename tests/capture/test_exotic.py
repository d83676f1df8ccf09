"""What a graph can hardly hold: it agrees with eager, or says that it does not."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gdnsq_fx.capture.capture import capture
from gdnsq_fx.errors import CaptureError

_X, _LARGE = torch.rand(3, 4), torch.rand(5, 4)


class _Block(nn.Module):
    """Applies a function; has a layer for it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


class _Model(nn.Module):
    """A layer, the block, and another layer."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.first, self.block, self.last = nn.Linear(4, 4), block, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.block(self.first(x)))


def _autocast(m: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = m.fc(x)
    return y.float()


def _gradient(m: nn.Module, x: Tensor) -> Tensor:
    """As models of forces do: minus the gradient of an energy."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        energy = m.fc(x).tanh().sum()
        return -torch.autograd.grad(energy, x, create_graph=True)[0]


def _threads(m: nn.Module, x: Tensor) -> Tensor:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(m.fc, x).result()


def _swapped(m: nn.Module, x: Tensor) -> Tensor:
    weight = m.fc.weight
    m.fc.weight = nn.Parameter(weight * 2.0)
    y = m.fc(x)
    m.fc.weight = weight
    return y


def _double(m: nn.Module, x: Tensor) -> Tensor:
    torch.set_default_dtype(torch.float64)
    try:
        return x + torch.ones(4)
    finally:
        torch.set_default_dtype(torch.float32)


def _inference(m: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        y = m.fc(x)
    return y.clone()


def _generator(m: nn.Module, x: Tensor) -> Tensor:
    return x + torch.rand(4, generator=torch.Generator().manual_seed(1))


def _seeded(m: nn.Module, x: Tensor) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return m.fc(x) + torch.rand(4)


def _hooked(m: nn.Module, x: Tensor) -> Tensor:
    y = m.fc(x)
    if y.requires_grad:
        y.register_hook(lambda gradient: -2.0 * gradient)
    return y


def _with(m: nn.Module, **tensors: Tensor) -> dict[str, Tensor]:
    return {**dict(m.fc.named_parameters()), **tensors}


def _scripted(function: Callable[..., Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(function)


def _twice(x: Tensor) -> Tensor:
    return x * 2.0


_script = _scripted(_twice)

_BLOCKS: dict[str, Callable[..., Any]] = {
    "autocast": _autocast,
    "gradient of an energy": _gradient,
    "gradient by functions": lambda m, x: torch.func.grad(lambda y: m.fc(y).sum())(x),
    "vmap": lambda m, x: torch.vmap(lambda row: m.fc(row).sin())(x),
    "functional call": lambda m, x: torch.func.functional_call(
        m.fc, _with(m, weight=m.fc.weight * 2.0), (x,)
    ),
    "cond": lambda m, x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,)),
    "threads": _threads,
    "parameter swapped": _swapped,
    "numpy": lambda m, x: m.fc(x) + torch.from_numpy(2.0 * x.detach().numpy()),
    "function in TorchScript": lambda m, x: _script(m.fc(x)),
    "default dtype": lambda m, x: _double(m, x).float(),
    "inference mode": _inference,
    "generator": _generator,
    "seed": _seeded,
    "hook on a tensor": _hooked,
    "data of a result": lambda m, x: (y := m.fc(x), setattr(y, "data", 2.0 * y))[0],
    "exact type": lambda m, x: m.fc(x) if type(x) is Tensor else x,
}


@pytest.mark.filterwarnings("ignore::gdnsq_fx.errors.CaptureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", _BLOCKS)
@pytest.mark.parametrize("within", [False, True])
def test_what_is_exotic_agrees_or_says_so(case: str, within: bool, agree: Any) -> None:
    """Agrees on other values as well: nothing of the example may be left in it."""
    model = _Block(_BLOCKS[case])
    model = _Model(model) if within else model
    try:
        captured = capture(model, (_X,), {})
    except CaptureError:
        return
    agree(model, captured, (_X,), {}, True)
    if not any(one.kind == "data" for one in captured.facts.specialized):
        agree(model, captured, (torch.rand(3, 4),), {}, False)


_CAN = ("gradient of an energy", "cond", "threads", "exact type")


@pytest.mark.parametrize("case", _CAN)
def test_exotic_blocks_that_need_not_be_refused(case: str, same: Any) -> None:
    same(_Model(_Block(_BLOCKS[case])), _X, others=((_LARGE,),))


def test_backward_hooks_of_an_opened_module(same: Any) -> None:
    inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    inner.register_full_backward_hook(lambda m, given, out: (3.0 * given[0],))
    same(_Model(inner), _X)


class _Yields(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, times: int) -> Any:
        for _ in range(times):
            x = self.fc(x)
            yield x


class _Recurses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, times: int) -> Tensor:
        return self(self.fc(x), times - 1) if times else x


class _Calls(nn.Module):
    def forward(self, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        return function(x)


class _Holder:
    """An object of the user's own."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


class _Holds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> _Holder:
        return _Holder(self.fc(x))


@pytest.mark.parametrize(
    ("inner", "function"),
    [
        (_Yields(), lambda m, x: sum(m.inner(x, 3))),
        (_Recurses(), lambda m, x: m.inner(x, 3)),
        (_Calls(), lambda m, x: m.inner(x, torch.sin) + m.inner(x, m.fc)),
        (_Holds(), lambda m, x: m.inner(x).value * 2.0),
        (nn.DataParallel(nn.Linear(4, 4)), lambda m, x: m.inner(x)),
        (nn.BatchNorm1d(4), lambda m, x: m.inner.forward(x)),
    ],
    ids=["generator", "recursion", "callable", "object", "data parallel", "forward"],
)
def test_calls_of_sub_modules(inner: nn.Module, function: Any, same: Any) -> None:
    model = _Block(function)
    model.inner = inner
    same(model, _X, others=((_LARGE,),))
