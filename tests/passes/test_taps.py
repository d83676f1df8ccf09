"""Gradients handed out at taps, and which values are cloned for them."""

from __future__ import annotations

import pytest
import torch
from gdnsq_fx.passes._memory import written_values
from gdnsq_fx.passes._taps import Taps
from torch import Tensor, nn

import gdnsq_fx


@pytest.mark.parametrize("copy", [False, True])
def test_taps_receive_the_gradient_of_each_backward_pass(copy: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, direction = torch.randn(2, 3, 4, generator=generator)
    weight = torch.randn(3, 4, generator=generator, requires_grad=True)
    taps, found = Taps(), dict[int, Tensor]()
    first = taps.set(x, copy=copy)
    second = taps.set(first * weight, copy=copy)
    unused = taps.set(first + 1.0, copy=copy)
    output = second.square() + first
    assert (first.data_ptr() == x.data_ptr()) is not copy
    at_second = 2.0 * second.detach() * direction
    wanted = [direction + at_second * weight.detach(), at_second]
    for last in (False, True):
        found.clear()
        taps.backward(output, direction, found.__setitem__, last=last)
        assert found.keys() == {0, 1}
        assert torch.allclose(found[0], wanted[0])
        assert torch.allclose(found[1], wanted[1])
    assert len(taps) == 3 and unused.requires_grad
    assert weight.grad is None


class _Reader(nn.Module):
    """Layers whose inputs and outputs are written into before, after or never."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after, self.made = (nn.Linear(4, 4) for _ in range(3))
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(torch.relu_(self.norm(x) * 2.0))  # written before it is read
        z = y * 3.0
        w = self.after(z.detach())
        z.view(-1).mul_(2.0)  # through a view, after it was read
        return self.made(w + z).sub_(1.0)  # what an operation made


def test_only_what_is_written_later_is_cloned() -> None:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    qmodel = gdnsq_fx.prepare(_Reader().eval(), x, gdnsq_fx.QuantConfig(4, 4), [x])
    written = {node.name for node in written_values(qmodel)}
    assert {"after_input_q", "made"} <= written
    assert written.isdisjoint({"before_input_q", "before", "made_input_q", "after"})


def test_writing_into_a_value_leaves_its_predictions_alone() -> None:
    class InPlace(_Reader):
        def forward(self, x: Tensor) -> Tensor:
            y = self.before(x)
            z = self.after(y * 1.0)
            return self.made(z).mul_(2.0) + y.mul_(0.5)

    class OutOfPlace(InPlace):
        def forward(self, x: Tensor) -> Tensor:
            y = self.before(x)
            z = self.after(y * 1.0)
            return self.made(z) * 2.0 + y * 0.5

    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    inplace, other = InPlace().eval(), OutOfPlace().eval()
    other.load_state_dict(inplace.state_dict())
    config = gdnsq_fx.QuantConfig(3, 3)
    reports = [
        gdnsq_fx.analyze(gdnsq_fx.prepare(model, x, config, [x]), [x])
        for model in (inplace, other)
    ]
    found, wanted = ({e.name: e for e in r.edges} for r in reports)
    assert found.keys() == wanted.keys() and len(found) == 6
    for name, edge in wanted.items():
        assert found[name].predicted_divergence == pytest.approx(
            edge.predicted_divergence, rel=1e-5
        )
        assert found[name].joint_divergence == pytest.approx(
            edge.joint_divergence, rel=1e-4
        )
