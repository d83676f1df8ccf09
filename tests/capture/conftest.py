"""What the tests of capture share: a captured graph compared with its model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves, tree_map

from gdnsq_fx.capture.capture import capture


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="session")
def agree() -> Callable[..., None]:
    """``agree(model, captured, args, kwargs, training)``: one call of each is the same.

    Compared are outputs (values, types, structure), gradients of parameters and
    inputs, buffers after the call, and how far the random state went. ``training=None``
    leaves the modes as they are; ``may_refuse`` lets both refuse the backward pass.
    """
    return _agree


@pytest.fixture(scope="session")
def same() -> Callable[..., GraphModule]:
    """``same(model, *args, **kwargs)``: captured and model agree; returns the captured.

    ``others`` are further examples to compare on: tuples of arguments, or dicts of
    keyword arguments in place of ``kwargs``.
    """

    def check(
        model: nn.Module,
        *args: Any,
        others: tuple[Any, ...] = (),
        modes: tuple[bool | None, ...] = (False, True),
        **kwargs: Any,
    ) -> GraphModule:
        captured = capture(model, args, kwargs)
        assert list(captured.state_dict()) == list(model.state_dict())
        for training in modes:
            _agree(model, captured, args, kwargs, training)
            for other in others:
                if isinstance(other, dict):
                    _agree(model, captured, (), other, training)
                else:
                    _agree(model, captured, other, kwargs, training)
        return captured

    return check


@pytest.fixture(scope="session")
def operations() -> Callable[[GraphModule], list[str]]:
    """Names of what a captured model calls: functions, methods, classes of modules."""

    def names(captured: GraphModule) -> list[str]:
        found: list[str] = []
        for node in captured.graph.nodes:
            if node.op == "call_module":
                target = captured.get_submodule(str(node.target))
                found.append(type(target).__name__)
            elif node.op.startswith("call_"):
                found.append(getattr(node.target, "__name__", str(node.target)))
        return found

    return names


def _agree(
    model: nn.Module,
    captured: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    training: bool | None,
    may_refuse: bool = False,
) -> None:
    wanted = _run(model, args, kwargs, training, may_refuse)
    got = _run(captured, args, kwargs, training, may_refuse)
    mode = {None: "as it is", True: "training", False: "evaluation"}[training]
    for what, value in wanted.items():
        _equal(value, got[what], f"{what} ({mode})")


def _run(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    training: bool | None,
    may_refuse: bool,
) -> dict[str, Any]:
    if training is not None:
        module.train(training)
    sources: dict[str, Tensor] = {}
    args, kwargs = tree_map(lambda leaf: _fresh(leaf, sources), (args, kwargs))
    sources |= {name: p for name, p in module.named_parameters() if p.requires_grad}
    torch.manual_seed(0)
    output = module(*args, **kwargs)
    return {
        "output": output,
        "buffers": {
            name: b.clone()
            for name, b in module.named_buffers()
            if not name.startswith("_tensor_constant")
        },
        "random state": torch.get_rng_state(),
        "gradients": _gradients(output, sources, may_refuse),
    }


def _fresh(leaf: Any, sources: dict[str, Tensor]) -> Any:
    """A copy that the model may write into; of a float, one with a gradient."""
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
        return copy.deepcopy(leaf)
    source = leaf.detach().clone().requires_grad_()
    sources[f"input {len(sources)}"] = source
    return source.clone()


def _gradients(output: Any, sources: dict[str, Tensor], may_refuse: bool) -> Any:
    reached = [t for t in _tensors(output) if t.requires_grad]
    if not reached or not sources:
        return None
    # Unequal weights: a plain sum hides what normalization and softmax do.
    weighted = [
        (t * torch.linspace(0.5, 1.5, t.numel(), dtype=t.dtype).view_as(t)).sum()
        for t in reached
    ]
    total = torch.stack([one.double() for one in weighted]).sum()
    try:
        found = torch.autograd.grad(total, list(sources.values()), allow_unused=True)
    except RuntimeError as error:
        if may_refuse and "inplace operation" in str(error):
            return "refused"
        raise
    return dict(zip(sources, found, strict=True))


def _tensors(output: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif is_dataclass(leaf):
            found += _tensors([getattr(leaf, field.name) for field in fields(leaf)])
        elif isinstance(leaf, Mapping):
            found += _tensors(list(leaf.values()))
    return found


def _equal(wanted: Any, got: Any, where: str) -> None:
    if isinstance(wanted, Tensor):
        assert isinstance(got, Tensor), f"{where}: {got!r} is no tensor"
        assert got.requires_grad == wanted.requires_grad, f"{where}: requires_grad"
        torch.testing.assert_close(
            got, wanted, equal_nan=True, msg=lambda text: f"{where}: {text}"
        )
        return
    assert type(got) is type(wanted), f"{where}: {type(got)}, not {type(wanted)}"
    if is_dataclass(wanted):
        for field in fields(wanted):
            name = field.name
            _equal(getattr(wanted, name), getattr(got, name), f"{where}.{name}")
    elif isinstance(wanted, Mapping):
        assert list(got) == list(wanted), f"{where}: keys {list(got)}"
        for key in wanted:
            _equal(wanted[key], got[key], f"{where}[{key!r}]")
    elif isinstance(wanted, tuple | list):
        assert len(got) == len(wanted), f"{where}: {len(got)} items"
        for index, (one, other) in enumerate(zip(wanted, got, strict=True)):
            _equal(one, other, f"{where}[{index}]")
    else:
        assert got == wanted, f"{where}: {got!r}, not {wanted!r}"
