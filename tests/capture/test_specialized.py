"""Control flow on sizes goes as the example does; what it fixes is noted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gdnsq_fx.errors import CaptureWarning


class _Apply(nn.Module):
    """Applies a function; has a layer for it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(self, *args)


_FIXED: dict[str, Callable[..., Any]] = {
    "range": lambda m, x: sum(x[:, i] for i in range(x.shape[1])),
    "list": lambda m, x: x + torch.tensor([1.0 * i for i in range(x.size(1))])[:, None],
    "number of elements": lambda m, x: x.reshape(-1, x.shape[1:].numel()),
    "branch": lambda m, x: x if x.shape[1] > 4 else x * 2.0,
    "smaller one": lambda m, x: x[:, : sorted([x.shape[1], 4])[0]],
    "set": lambda m, x: x if x.shape[1] in {3, 6} else x * 2.0,
}


@pytest.mark.parametrize("case", _FIXED)
def test_a_way_that_sizes_chose_is_fixed_and_noted(case: str, same: Any) -> None:
    x = torch.randn(2, 6, 4)
    captured = same(_Apply(_FIXED[case]), x, others=((torch.randn(5, 6, 4),),))
    places = [one.source.partition(":")[0] for one in captured.facts.specialized]
    assert "test_specialized.py" in places


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: sum(m.fc(x[i]) for i in range(x.shape[0])),
        lambda m, x: torch.stack([m.fc(row) for row in x]),
    ],
)
def test_a_batch_size_that_is_fixed_is_a_warning(function: Any, same: Any) -> None:
    with pytest.warns(CaptureWarning, match="size of the example only"):
        same(_Apply(function), torch.randn(2, 6, 4))


def test_a_loop_over_time_is_unrolled(same: Any, operations: Any) -> None:
    def recurrent(m: Any, x: Tensor) -> Tensor:
        state = torch.zeros(x.shape[0], x.shape[2])
        states = []
        for t in range(x.shape[1]):
            state = torch.tanh(m.fc(x[:, t] + state))
            states.append(state)
        return torch.stack(states, dim=1)

    x = torch.randn(2, 5, 4)
    captured = same(_Apply(recurrent), x, others=((torch.randn(7, 5, 4),),))
    assert operations(captured).count("tanh") == 5


@pytest.mark.parametrize("limit", [4, 8])
def test_a_branch_on_a_size_goes_as_the_example_does(
    limit: int, same: Any, operations: Any
) -> None:
    def branch(m: Any, x: Tensor) -> Tensor:
        return m.fc(x).sin() if x.shape[1] > limit else m.fc(x).cos()

    x = torch.randn(2, 6, 4)
    captured = same(_Apply(branch), x, others=((torch.randn(5, 6, 4),),))
    assert ("sin" in operations(captured)) is (limit == 4)


def test_sizes_are_compared_by_assertions(same: Any) -> None:
    def checked(m: Any, x: Tensor, y: Tensor) -> Tensor:
        assert x.shape == y.shape and x.size(-1) == 4 and x.shape[0] in (2, 5)
        if x.shape[:2] != y.shape[:2] or len(x.shape) != 3:
            raise ValueError("sizes differ")
        return x + y

    others = (tuple(torch.randn(2, 5, 6, 4)),)
    same(_Apply(checked), *torch.randn(2, 2, 6, 4), others=others)
