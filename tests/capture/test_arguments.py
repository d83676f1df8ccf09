"""Arguments and outputs of every kind keep their names, nesting and types."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

_X, _Y = torch.randn(2, 3, 4)
_LARGE = torch.randn(5, 4), torch.randn(5, 4)


class _Pair(NamedTuple):
    first: Tensor
    second: Tensor


@dataclass
class _Data:
    first: Tensor
    rest: list[Tensor]
    gain: float = 2.0


class _Output(OrderedDict[str, Tensor]):
    """A dict with attributes, as many libraries return."""

    @property
    def logits(self) -> Tensor:
        return self["logits"]


class _Calls(nn.Module):
    """Applies a function to itself and to what it is given."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


# --- arguments --------------------------------------------------------------------


class _KeywordOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(
        self, x: Tensor, *, shift: Tensor, gain: float = 2.0, mask: Any = None
    ) -> Tensor:
        y = self.fc(x) * gain + shift
        return y if mask is None else y * mask


def test_keyword_only_arguments(same: Any) -> None:
    same(_KeywordOnly(), _X, shift=_Y)
    captured = same(_KeywordOnly(), _X, mask=_Y.relu(), shift=_Y)
    order = captured(mask=_Y, x=_X, shift=_X)
    torch.testing.assert_close(order, captured(_X, shift=_X, mask=_Y))


def test_variadic_arguments(same: Any) -> None:
    def positional(m: nn.Module, *xs: Tensor) -> Tensor:
        return sum(m.fc(x) * i for i, x in enumerate(xs, 1))

    def named(m: nn.Module, first: Tensor, **named: Tensor) -> dict[str, Tensor]:
        return {name: m.fc(first) + value for name, value in named.items()}

    same(_Calls(positional), _X, _Y, _X, others=((*_LARGE, _LARGE[0]),))
    same(_Calls(named), _X, b=_Y, a=_X)
    same(_Calls(named), _X)


class _Variadic(nn.Module):
    def forward(
        self, x: Tensor, *rest: Tensor, gain: float = 1.0, **named: Tensor
    ) -> Tensor:
        return torch.stack([x, *rest, *named.values()]).sum(0) * gain


def test_every_kind_of_parameter_at_once(same: Any) -> None:
    same(_Variadic(), _X, _Y, _X, gain=3.0, b=_Y, a=_X)


def test_nested_lists_and_dicts(same: Any) -> None:
    def nested(m: nn.Module, tree: Any, pair: Any) -> Tensor:
        y = m.fc(tree["x"]) + pair[0]
        for key, value in tree["more"].items():
            y = y + value if key == "add" else y * value
        return y + sum(pair[1])

    def example(x: Tensor, y: Tensor) -> tuple[Any, ...]:
        return {"x": x, "more": {"add": y, "times": x}}, [y, (x, y)]

    same(_Calls(nested), *example(_X, _Y), others=(example(*_LARGE),))


def test_named_tuples(same: Any) -> None:
    def named(m: nn.Module, pair: _Pair) -> Tensor:
        assert isinstance(pair, _Pair)
        return m.fc(pair.first) - pair.second

    same(_Calls(named), _Pair(_X, _Y), others=((_Pair(*_LARGE),),))


def test_dataclasses(same: Any) -> None:
    def data(m: nn.Module, given: _Data) -> Tensor:
        assert isinstance(given, _Data)
        return m.fc(given.first) * given.gain + given.rest[0]

    large = _Data(_LARGE[0], [_LARGE[1]])
    same(_Calls(data), _Data(_X, [_Y]), others=((large,),))


def test_a_mapping_of_a_class_of_its_own(same: Any) -> None:
    def mapping(m: nn.Module, given: Any) -> Tensor:
        return m.fc(given["x"]) + given.get("y", 0.0)

    same(_Calls(mapping), OrderedDict(y=_Y, x=_X))
    same(_Calls(mapping), _Output(x=_X))
    same(_Calls(mapping), UserDict(x=_X, y=_Y))


@pytest.mark.parametrize("value", [None, True, False, "tanh", 2, 0.5, torch.float64])
@pytest.mark.parametrize("keyword", [False, True])
def test_arguments_that_are_no_tensors(value: Any, keyword: bool, same: Any) -> None:
    def choose(m: nn.Module, x: Tensor, option: Any) -> Tensor:
        y = m.fc(x)
        if isinstance(option, torch.dtype):
            return y.to(option)
        if isinstance(option, str):
            return getattr(torch, option)(y)
        if option is None or isinstance(option, bool):
            return y.relu() if option else y
        return y * option

    if keyword:
        same(_Calls(choose), _X, option=value)
    else:
        same(_Calls(choose), _X, value, others=((_LARGE[0], value),))


def test_none_within_a_structure(same: Any) -> None:
    def some(m: nn.Module, given: list[Tensor | None]) -> list[Tensor | None]:
        return [None if one is None else m.fc(one) for one in given]

    same(_Calls(some), [_X, None, _Y])


def test_one_tensor_given_twice_stays_two_inputs(same: Any) -> None:
    same(_Calls(lambda m, x, y: m.fc(x) - y), _X, _X, others=((_X, _Y),))


# --- outputs ----------------------------------------------------------------------

_OUTPUTS: dict[str, Callable[..., Any]] = {
    "input itself": lambda m, x: x,
    "list": lambda m, x: [m.fc(x), [x]],
    "named tuple": lambda m, x: _Pair(m.fc(x), x),
    "dataclass": lambda m, x: _Data(m.fc(x), [x, x], gain=3.0),
    "dataclass in a dict": lambda m, x: {"data": _Data(x, [m.fc(x)])},
    "ordered dict": lambda m, x: OrderedDict(second=m.fc(x), first=x),
    "dict subclass": lambda m, x: _Output(logits=m.fc(x)),
    "default dict": lambda m, x: defaultdict(list, {"logits": [m.fc(x)]}),
    "user dict": lambda m, x: UserDict(logits=m.fc(x)),
    "mixed": lambda m, x: (m.fc(x), None, "name", 3, 0.5, True, x.shape[0]),
    "shape": lambda m, x: (m.fc(x), x.shape),
    "dtype and device": lambda m, x: (m.fc(x), x.dtype, x.device),
    "numbers as keys": lambda m, x: {0: m.fc(x), 1: x},
    "tuples as keys": lambda m, x: {(0, "a"): m.fc(x), (1, "b"): x},
    "parameter": lambda m, x: (m.fc(x), m.fc.weight),
    "nothing": lambda m, x: None,
    "no tensor": lambda m, x: {},
    "torch's named tuple": lambda m, x: torch.max(m.fc(x), dim=1),
}


@pytest.mark.parametrize("case", _OUTPUTS)
def test_outputs_keep_their_type(case: str, same: Any) -> None:
    same(_Calls(_OUTPUTS[case]), _X, others=((_LARGE[0],),))


def test_attributes_of_an_output_can_be_read(same: Any) -> None:
    captured = same(_Calls(lambda m, x: _Output(logits=m.fc(x))), _X)
    assert captured(_X).logits.shape == (3, 4)


def test_outputs_of_sub_modules_are_unpacked(same: Any) -> None:
    model = _Calls(lambda m, x: m.inner(x).rest[0] + m.pair(x).second)
    model.inner = _Calls(lambda m, x: _Data(x, [m.fc(x)]))
    model.pair = _Calls(lambda m, x: _Pair(x, m.fc(x)))
    same(model, _X, others=((_LARGE[0],),))
