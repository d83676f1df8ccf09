"""Random modules: the captured graph computes what the model computes.

A program is a list of steps on values of one shape, ``(batch, 4, 6)``, interpreted by
one small module. A failing program is printed as it can be pasted into ``@example``.
More of them: ``GDNSQ_FX_EXAMPLES=1000 pytest tests/capture/test_random_modules.py``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gdnsq_fx.capture.capture import capture

EXAMPLES = int(os.environ.get("GDNSQ_FX_EXAMPLES", "60"))
CHANNELS, LENGTH = 4, 6


@dataclass(frozen=True)
class Step:
    """A new value: ``op`` of the values made ``a`` and ``b`` steps before; ``k`` varies
    the operation."""

    op: str
    a: int = 0
    b: int = 0
    k: int = 0


@dataclass(frozen=True)
class Program:
    """What a module computes, takes and returns; its blocks are modules of its own."""

    steps: tuple[Step, ...] = ()
    blocks: tuple[Program, ...] = ()
    takes: str = "positional"
    returns: str = "last"


class Pair(NamedTuple):
    """A named tuple to return."""

    first: Tensor
    last: Tensor


class Double(torch.autograd.Function):
    """The identity, with twice the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2.0 * gradient


class Net(nn.Module):
    """Interprets a program; any step may use any layer, any number of times."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.fc, self.tied = nn.Linear(LENGTH, LENGTH), nn.Linear(LENGTH, LENGTH)
        self.tied.weight = self.fc.weight
        self.conv = nn.Conv1d(CHANNELS, CHANNELS, 3, padding=1)
        self.join = nn.Conv1d(2 * CHANNELS, CHANNELS, 1)
        self.norm = nn.BatchNorm1d(CHANNELS)
        self.drop = nn.Dropout(0.3)
        self.chain = nn.Sequential(nn.Linear(LENGTH, LENGTH), nn.ReLU(inplace=True))
        self.named = nn.ModuleDict({"norm": nn.LayerNorm(LENGTH), "same": self.conv})
        self.gru = nn.GRU(LENGTH, LENGTH // 2, bidirectional=True, batch_first=True)
        self.attention = nn.MultiheadAttention(LENGTH, 2, 0.2, batch_first=True)
        self.gain = nn.Parameter(torch.rand(CHANNELS, 1))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(CHANNELS, 1))
        self.register_buffer("table", torch.randn(9, LENGTH), persistent=False)
        self.blocks = nn.ModuleList(map(Net, program.blocks))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        values = tree_leaves((args, kwargs))
        for step in self.program.steps:
            a, b = (values[-1 - back % len(values)] for back in (step.a, step.b))
            values.append(OPS[step.op](self, a, b, step.k))
        return RETURNS[self.program.returns](self, values)


TAKES: dict[str, Callable[[Tensor, Tensor], tuple[tuple[Any, ...], dict[str, Any]]]] = {
    "positional": lambda x, y: ((x, y), {}),
    "keywords": lambda x, y: ((), {"x": x, "y": y}),
    "both": lambda x, y: ((x,), {"y": y}),
    "nested": lambda x, y: (({"x": x, "others": [y, (y, x)]},), {}),
}
RETURNS: dict[str, Callable[[Net, list[Tensor]], Any]] = {
    "last": lambda m, v: v[-1],
    "tuple": lambda m, v: (v[-1], v[0]),
    "dict": lambda m, v: {"out": v[-1], "all": list(v)},
    "named": lambda m, v: Pair(v[0], v[-1]),
    "size": lambda m, v: [v[-1].shape[0] * v[-1].shape[1], v[-1]],
    "auxiliary": lambda m, v: (v[-1], v[0]) if m.training else v[-1],
}


def _call(net: Net, a: Tensor, b: Tensor, k: int) -> Tensor:
    """One of the blocks, if there are any."""
    if not net.blocks:
        return a
    block = net.blocks[k % len(net.blocks)]
    args, kwargs = TAKES[block.program.takes](a, b)
    found = tree_leaves(block(*args, **kwargs))
    return [leaf for leaf in found if isinstance(leaf, Tensor)][-1]


def _layers(net: Net, a: Tensor, b: Tensor, k: int) -> Tensor:
    return torch.stack([layer(a) for layer in (net.fc, *net.named.values())]).sum(0)


def _positions(net: Net, a: Tensor, b: Tensor, k: int) -> Tensor:
    positions = torch.arange(a.size(1) + k, device=a.device)[k:]
    return a + F.embedding(positions, net.table).unsqueeze(0)


def _causal(net: Net, a: Tensor, b: Tensor, k: int) -> Tensor:
    size = a.shape[1]
    mask = torch.tril(torch.ones(size, size, dtype=torch.bool))
    scores = (a @ b.transpose(-2, -1)) * a.size(-1) ** -0.5
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ b


def _heads(net: Net, a: Tensor, b: Tensor, k: int) -> Tensor:
    batch, channels, length = a.shape
    heads = a.view(batch, channels, 2, length // 2).transpose(1, 2)
    out = F.scaled_dot_product_attention(heads, heads, heads, is_causal=bool(k % 2))
    return out.transpose(1, 2).reshape(batch, channels, length)


def _windows(net: Net, a: Tensor, b: Tensor, k: int) -> Tensor:
    size = 4
    pad = (size - a.shape[-1] % size) % size
    padded = F.pad(a, (0, pad))
    windows = padded.unfold(2, size, size).reshape(-1, size).softmax(-1)
    return windows.view(a.size(0), a.size(1), -1)[..., : a.shape[-1]]


def _loop(net: Net, a: Tensor, b: Tensor, k: int) -> Tensor:
    total = torch.zeros_like(a[..., :1])
    for i in range(a.shape[2]):
        total = total + i * a[:, :, i : i + 1]
    return b + total


def _halves(net: Net, a: Tensor, b: Tensor, k: int) -> Tensor:
    half = a.shape[0] // 2
    first, second = a[:half], a[half:]
    return torch.cat([second, 2.0 * first], dim=0) + b


def _filled(net: Net, a: Tensor, b: Tensor, k: int) -> Tensor:
    out = torch.zeros(a.shape[0], a.shape[1], a.shape[2])
    out[:, k] = b[:, 0]
    out[:, :, 0] += a.mean(2)
    return out


def _written_view(net: Net, a: Tensor, b: Tensor, k: int) -> Tensor:
    view = a[:, : 1 + k]
    view.mul_(0.5)
    return a + b


def _assigned(net: Net, a: Tensor, b: Tensor, k: int) -> Tensor:
    a[:, k] = b[:, 0].detach() * 0.5
    return a


def _augmented(net: Net, a: Tensor, b: Tensor, k: int) -> Tensor:
    a += b
    a *= 0.5
    return a


def _centred(net: Net, a: Tensor, b: Tensor, k: int) -> Tensor:
    with torch.no_grad():
        centre = net.fc(a).mean(dim=2, keepdim=True)
    return a - centre


def _in_place_without_gradient(net: Net, a: Tensor, b: Tensor, k: int) -> Tensor:
    with torch.no_grad():
        a.mul_(0.5)
        torch.add(b, 1.0, out=torch.empty_like(b))
    return a * b.tanh()


def _averaged(net: Net, a: Tensor, b: Tensor, k: int) -> Tensor:
    """A buffer that is replaced, not written into."""
    if net.training:
        net.mean = 0.9 * net.mean + 0.1 * a.detach().mean(dim=(0, 2))[:, None]
    return a - net.mean


def _counted(net: Net, a: Tensor, b: Tensor, k: int) -> Tensor:
    net.calls += 1
    if net.training:
        net.table[k].mul_(0.9).add_(a.detach().mean((0, 1)), alpha=0.1)
    return a + net.table[: a.size(1)] / net.calls


def _cached(net: Net, a: Tensor, b: Tensor, k: int) -> Tensor:
    net.cache = {"value": a}
    return net.cache["value"] * b.tanh()


OPS: dict[str, Callable[[Net, Tensor, Tensor, int], Tensor]] = {
    # layers, one used under two names, one with its weight tied to another
    "fc": lambda m, a, b, k: m.fc(a),
    "tied": lambda m, a, b, k: m.tied(input=a),
    "conv": lambda m, a, b, k: m.conv(a),
    "norm": lambda m, a, b, k: m.norm(a),
    "chain": lambda m, a, b, k: m.chain(a),
    "layers": _layers,
    "block": _call,
    "function": lambda m, a, b, k: F.conv1d(a, weight=m.conv.weight, padding=1),
    "attention": lambda m, a, b, k: m.attention(a, b, b, need_weights=bool(k % 2))[0],
    "gru": lambda m, a, b, k: m.gru(a)[0],
    "gain": lambda m, a, b, k: m.gain.exp() * a,
    # joins
    "add": lambda m, a, b, k: a + b,
    "mul": lambda m, a, b, k: torch.mul(a, other=b.tanh()),
    "cat": lambda m, a, b, k: m.join(torch.cat([a, b], dim=1)),
    "stack": lambda m, a, b, k: torch.stack((a, b), dim=k % 3).mean(k % 3),
    "where": lambda m, a, b, k: torch.where(a > b, a, 0.5 * b),
    "attend": _causal,
    "indexed": lambda m, a, b, k: (
        a[:, [2, 0, 3, 1]] + b[torch.arange(b.size(0)), k, None]
    ),
    "sorted": lambda m, a, b, k: a.sort(dim=2, descending=True).values + b.topk(1)[0],
    "masked": lambda m, a, b, k: a * (b > 0).to(a.dtype) - (a == a.max()).float(),
    "double": lambda m, a, b, k: (a.double() + b).to(dtype=a.dtype),
    # random numbers and modes
    "drop": lambda m, a, b, k: m.drop(a),
    "dropout": lambda m, a, b, k: F.dropout(a, 0.3, m.training),
    "noise": lambda m, a, b, k: a + torch.randn(a.shape[0], 1, a.size(2)),
    "mode": lambda m, a, b, k: m.fc(a) if m.training else a.relu(),
    # shapes
    "flat": lambda m, a, b, k: a.reshape(a.size(0), -1).softmax(-1).view(b.shape),
    "rows": lambda m, a, b, k: a.reshape(a.size(0) * a.size(1), -1).view_as(b).sin(),
    "expand": lambda m, a, b, k: a + b.mean(1, keepdim=True).expand(-1, a.size(1), -1),
    "pieces": lambda m, a, b, k: torch.cat(a.split(a.size(2) // 2, dim=2)[::-1], 2),
    "roll": lambda m, a, b, k: torch.roll(a, shifts=k, dims=(2,)),
    "heads": _heads,
    "windows": _windows,
    "positions": _positions,
    "halves": _halves,
    "resized": lambda m, a, b, k: F.interpolate(F.avg_pool1d(a, 2), size=a.shape[-1]),
    "scaled": lambda m, a, b, k: a * a.size(-1) ** -0.5 / (1 + b.shape[0]),
    "plain": lambda m, a, b, k: a * math.sqrt(a.shape[2]) / len(b) + int(b.size(0) / 2),
    "filled": _filled,
    # control flow on shapes
    "wide": lambda m, a, b, k: a * 2.0 if a.shape[1] > k + 2 else a - 1.0,
    "loop": _loop,
    "chunks": lambda m, a, b, k: torch.cat([c * i for i, c in enumerate(a.chunk(2))]),
    # data are read
    "item": lambda m, a, b, k: a / (1.0 + b.detach().abs().amax().item()),
    "finite": lambda m, a, b, k: a if torch.isfinite(b).all() else m.fc(b),
    # gradients
    "autograd": lambda m, a, b, k: Double.apply(a) + b,
    "in_place_without_gradient": _in_place_without_gradient,
    "centred": _centred,
    # views, writes in place, state
    "view": lambda m, a, b, k: a.transpose(1, 2)[:, :].transpose(1, 2),
    "detached": lambda m, a, b, k: a.detach(),
    "add_": lambda m, a, b, k: a.add_(b, alpha=0.5),
    "relu_": lambda m, a, b, k: F.relu(a, inplace=True) if k % 2 else a.relu_(),
    "written_view": _written_view,
    "assigned": _assigned,
    "augmented": _augmented,
    "averaged": _averaged,
    "counted": _counted,
    "cached": _cached,
}


def _programs(depth: int) -> st.SearchStrategy[Program]:
    back = st.integers(0, 4)
    steps = st.builds(Step, st.sampled_from(list(OPS)), back, back, st.integers(0, 3))
    return st.builds(
        Program,
        st.lists(steps, max_size=8).map(tuple),
        st.lists(_programs(depth - 1), max_size=2).map(tuple) if depth else st.just(()),
        st.sampled_from(list(TAKES)),
        st.sampled_from(list(RETURNS)),
    )


# Explaining a failure would trace every line of torch that runs.
_PHASES = [phase for phase in Phase if phase is not Phase.explain]


@settings(max_examples=EXAMPLES, deadline=None, phases=_PHASES)
@given(program=_programs(depth=2))
@example(
    program=Program((Step("block"), Step("block", 1)), (Program((Step("norm"),)),))
)
@example(program=Program((Step("view"), Step("add_", 0, 1), Step("add", 1, 2))))
def test_a_random_module(program: Program, agree: Callable[..., None]) -> None:
    torch.manual_seed(0)
    model = Net(program)
    small, large = (
        TAKES[program.takes](*torch.randn(2, batch, CHANNELS, LENGTH))
        for batch in (2, 5)
    )
    captured = capture(model, *small)
    assert list(captured.state_dict()) == list(model.state_dict())
    for training in (False, True):
        for args, kwargs in (small, large):
            agree(model, captured, args, kwargs, training, may_refuse=True)
