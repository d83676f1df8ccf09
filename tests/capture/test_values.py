"""Models that read data or iterate over tensors: the path of the example is taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

_X = torch.rand(4, 4) + 0.5
_LARGE = (torch.rand(6, 4) + 0.5,)


class _Apply(nn.Module):
    """Applies a function; has parameters for it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.gain = nn.Parameter(torch.rand(4))
        self.register_buffer("limit", torch.tensor(2.0))
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(self, *args)


# --- data are read ----------------------------------------------------------------

_READS: dict[str, Callable[..., Any]] = {
    "if": lambda m, x: m.fc(x) if x.sum() > 0 else m.fc(x).neg(),
    "if not": lambda m, x: m.fc(x) if not (x < 0).any() else x,
    "if of a result": lambda m, x: x * 2 if m.fc(x).abs().max() < 1e6 else x,
    "if of a buffer": lambda m, x: m.fc(x) if m.limit > 1 else x,
    "if of a parameter": lambda m, x: m.fc(x) if m.gain.min() < 2 else x,
    "if allclose": lambda m, x: m.fc(x) if torch.allclose(x, x) else x,
    "if equal": lambda m, x: m.fc(x) if torch.equal(x, x.clone()) else x,
    "if all zeros": lambda m, x: x if not x.count_nonzero() else m.fc(x),
    "and": lambda m, x: m.fc(x) if x.min() > 0 and x.max() < 9 else x,
    "or": lambda m, x: m.fc(x) if x.isnan().any() or x.max() < 9 else x,
    "while": lambda m, x: _halved(m.fc(x), int(m.limit)),
    "item of a buffer": lambda m, x: m.fc(x) * m.limit.item(),
    "float of a buffer": lambda m, x: m.fc(x) * float(m.limit) + int(m.limit),
    "list of a buffer": lambda m, x: x * sum(torch.arange(3).tolist()) * m.limit,
    "item used as a size": lambda m, x: x[:, : (x[0] > 0).sum().item()],
    "split by values": lambda m, x: x.split([*(x[0, :2] > 0).long().tolist(), 2], 1),
    "in": lambda m, x: m.fc(x) if 2.0 in m.limit.view(1) else x,
    "assert": lambda m, x: _asserted(x),
    "text": lambda m, x: {f"{m.limit:.1f}": m.fc(x), str(int(m.limit)): x},
}


def _halved(x: Tensor, times: int) -> Tensor:
    while times > 0:
        x, times = x / 2, times - 1
    return x


def _asserted(x: Tensor) -> Tensor:
    assert torch.isfinite(x).all(), "not finite"
    torch._assert(x.shape[1] == 4, "four columns")
    return x.sqrt()


@pytest.mark.parametrize("case", _READS)
def test_control_flow_on_data_goes_as_the_example_does(case: str, same: Any) -> None:
    same(_Apply(_READS[case]), _X, others=(_LARGE,))


def test_what_was_read_is_noted(same: Any) -> None:
    captured = same(_Apply(_READS["if"]), _X)
    (found,) = captured.facts.specialized
    assert found.kind == "data" and found.source.startswith("test_values.py:")
    assert captured.facts.real


def test_an_item_of_the_input_stays_symbolic(same: Any) -> None:
    model = _Apply(lambda m, x: m.fc(x) / x.amax().item())
    same(model, _X, others=((2.0 * _X,), (3.0 * _LARGE[0],)))


def test_a_branch_that_training_alone_takes(same: Any) -> None:
    """What is read may differ between the modes."""

    def branch(m: Any, x: Tensor) -> Tensor:
        y = F.dropout(x, 0.999, m.training)
        return m.fc(x) if y.count_nonzero() < 8 else x

    same(_Apply(branch), _X)


def test_the_number_of_selected_rows_may_differ(same: Any) -> None:
    def selected(m: Any, x: Tensor) -> Tensor:
        kept = x[x[:, 0] > 0]
        rows, _ = torch.nonzero(kept > 1, as_tuple=True)
        return m.fc(kept).index_add(0, rows, torch.ones(rows.shape[0], 4))

    others = ((torch.randn(8, 4),), (torch.randn(5, 4).abs(),))
    same(_Apply(selected), torch.randn(6, 4), others=others)


def test_lengths_of_selections_are_no_constants(same: Any) -> None:
    """As a detector samples proposals: split sizes and quotas depend on data."""

    def sampled(m: Any, x: Tensor) -> Any:
        some, rest = x[x[:, 0] > 0], x[x[:, 0] <= 0]
        quota = min(len(some), 2)
        left = m.fc(torch.cat([some[:quota], rest]))
        parts = left.split([quota, len(rest)])
        return *parts, max(some.numel(), 5) - quota

    x = torch.tensor([[1.0], [2.0], [3.0], [-1.0]]).expand(4, 4)
    others = ((-x,), (torch.cat([x, x]),), (x.abs(),), (-x.abs(),))
    captured = same(_Apply(sampled), x, others=others)
    assert not captured.facts.specialized


# --- iteration and unpacking ------------------------------------------------------

_ITERATES: dict[str, Callable[..., Any]] = {
    "for": lambda m, x: torch.stack([m.fc(row) * i for i, row in enumerate(x)]),
    "reversed": lambda m, x: torch.stack([m.fc(row) for row in reversed(x)]),
    "zip": lambda m, x: torch.stack([a * b for a, b in zip(x, m.gain, strict=True)]),
    "length": lambda m, x: m.fc(x) * len(x),
    "list": lambda m, x: torch.stack(list(x)[1:]),
    "star": lambda m, x: torch.stack([*x]).sum(0),
    "sum": lambda m, x: sum(x),
    "unpack": lambda m, x: _unpacked(*x),
    "unbind": lambda m, x: _unpacked(*x.unbind(1)),
    "chunk": lambda m, x: torch.mul(*x.chunk(2, dim=1)),
    "split": lambda m, x: torch.cat(x.split([1, 3], dim=1)[::-1], dim=1),
    "max": lambda m, x: _named(x.max(dim=1)),
    "topk": lambda m, x: _named(x.topk(2)),
    "index": lambda m, x: x[0] + x[-1, None] + x[..., 1] + x[x[0].argsort()],
    "dict": lambda m, x: {name: row for name, row in zip("abcd", x, strict=True)},
}


def _unpacked(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    return a - b * c / d


def _named(found: Any) -> Tensor:
    values, indices = found
    return values * indices.sum() + found.values + found[0]


@pytest.mark.filterwarnings("ignore::gdnsq_fx.errors.CaptureWarning")
@pytest.mark.parametrize("case", _ITERATES)
def test_iteration(case: str, same: Any) -> None:
    same(_Apply(_ITERATES[case]), _X, others=((torch.randn(4, 4),),))
