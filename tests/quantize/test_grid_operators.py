"""Operators for compilers: the numbers and gradients of what they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from gdnsq_fx.channels import ChannelLayout
from gdnsq_fx.quantize import grid_operators, native
from gdnsq_fx.quantize.activation_quantizer import ActivationQuantizer
from gdnsq_fx.quantize.weight_quantizer import WeightQuantizer
from gdnsq_fx.spec import Offset, QuantSpec

OFFSETS: tuple[Offset, ...] = get_args(Offset)


@pytest.fixture(params=["native", "eager"])
def _kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers by the kernels in C, where there are any, and without them."""
    if request.param == "eager":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("no C compiler here")


def _gradients(found: Sequence[Tensor], learned: list[Tensor]) -> tuple[Tensor, ...]:
    learnable = [one for one in found if one.requires_grad]
    total = sum(((1.0 + n) * one.sum() for n, one in enumerate(learnable)))
    return torch.autograd.grad(total, learned)  # type: ignore[arg-type]


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("offset", OFFSETS)
def test_grids_of_activations(offset: Offset) -> None:
    spec = QuantSpec(2, "lsq", offset)
    quantizer = ActivationQuantizer("x", spec, nonnegative=False)
    quantizer.cover(-0.61, 2.2, 2.0)
    learned: list[Tensor] = [
        quantizer.log2_step,
        quantizer.log2_range,
        quantizer.lower,
    ]
    wanted = quantizer.step, quantizer.range, quantizer.offset
    found = grid_operators.activation_grid(*learned, offset)
    assert all(map(torch.equal, found, wanted))
    torch.testing.assert_close(_gradients(found, learned), _gradients(wanted, learned))
    torch.library.opcheck(grid_operators.activation_grid, (*learned, offset))


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("offset", OFFSETS)
def test_grids_of_weights(offset: Offset) -> None:
    weight = torch.randn(4, 3, 5)
    spec = QuantSpec(3, "lsq", offset)
    quantizer = WeightQuantizer("w", spec, ChannelLayout(0), weight)
    quantizer.open_to(weight, 3.0)
    wanted = quantizer._grid(weight)
    given = quantizer.log2_step, *quantizer.extremes(weight), offset
    found = grid_operators.weight_grid(*given)
    assert all(map(torch.equal, found, wanted))
    learned: list[Tensor] = [quantizer.log2_step]
    torch.testing.assert_close(
        _gradients(found[:1], learned), _gradients(wanted[:1], learned)
    )
    torch.library.opcheck(grid_operators.weight_grid, given)


def _operators(compiled: Any, module: nn.Module, x: Tensor) -> set[str]:
    """Names of our operators in the graph that a compiler is given."""
    found: set[str] = set()

    def backend(graph_module: Any, inputs: Any) -> Any:
        for node in graph_module.graph.nodes:
            found.add(str(node.target))
        return graph_module

    compiled(module, backend=backend, fullgraph=True)(x)
    return {name for name in found if name.startswith("gdnsq_fx.")}


def test_compilers_are_given_them_and_exporters_are_not() -> None:
    quantizer = ActivationQuantizer("x", QuantSpec(3), nonnegative=True)
    quantizer.cover(0.0, 2.2, 3.0)
    x = torch.rand(5)
    assert _operators(torch.compile, quantizer, x) == {
        "gdnsq_fx.activation_grid.default"
    }
    program = torch.export.export(quantizer.eval(), (x,))
    assert not any("gdnsq_fx" in str(node.target) for node in program.graph.nodes)
