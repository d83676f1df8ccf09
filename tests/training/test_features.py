"""Distillation of values inside the network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import gdnsq_fx
from gdnsq_fx.errors import ConfigError
from gdnsq_fx.training.features import Tapped, graph_teacher


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Linear(4, 8), nn.BatchNorm1d(8)
        self.drop, self.two = nn.Dropout(0.5), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.one(x))
        return self.two(self.drop(torch.relu_(x)))


def _prepared() -> tuple[Net, GraphModule, Tensor]:
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(6, 4)
    return model, gdnsq_fx.prepare(model, x, gdnsq_fx.QuantConfig(2, 2), [x]), x


def _finetune(qmodel: GraphModule, x: Tensor, **options: Any) -> Any:
    torch.manual_seed(1)
    given = {"steps": 1, "progress": False, **options}
    return gdnsq_fx.finetune(qmodel, [x], **given)


@pytest.mark.parametrize("training", [False, True])
def test_taps_show_values_and_change_no_output(training: bool) -> None:
    """Before the relu that writes into its input."""
    model, qmodel, x = _prepared()
    with gdnsq_fx.quantization_disabled(qmodel), torch.no_grad():
        qmodel.train(training)
        model.train(training)
        tapped = Tapped(qmodel, ("norm",))
        torch.manual_seed(2)
        wanted = qmodel(x)
        torch.manual_seed(2)
        assert torch.equal(tapped(x), wanted)
        assert torch.allclose(tapped.features["norm"], model.norm(model.one(x)))
        assert bool((tapped.features["norm"] < 0).any())


def test_loss_is_the_sum_by_hand() -> None:
    """0.5 mean squared difference of the named value, on the first step."""
    model, qmodel, x = _prepared()
    seen: list[tuple[Tensor, Tensor]] = []

    def loss(output: Tensor, wanted: Tensor) -> Tensor:
        seen.append((output.detach(), wanted))
        return gdnsq_fx.distillation_loss(output, wanted)

    (last,) = [n for n in qmodel.graph.nodes if n.op == "output"]
    name = last.all_input_nodes[0].name  # the output itself, so that we know it
    result = _finetune(
        qmodel, x, teacher=model, features={name: 0.5}, distillation_loss=loss
    )
    output, wanted = seen[0]
    by_hand = gdnsq_fx.distillation_loss(output, wanted)
    by_hand = by_hand + 0.5 * (output - wanted).square().mean()
    assert result.history[0].loss == pytest.approx(by_hand.item(), rel=1e-5)


def test_features_are_learned() -> None:
    _, qmodel, x = _prepared()
    result = _finetune(qmodel, x, steps=60, features={"norm": 10.0})
    assert result.budget_met
    assert result.history[-1].loss < result.history[0].loss


def test_teacher_as_a_graph_computes_what_it_does() -> None:
    _, qmodel, x = _prepared()
    torch.manual_seed(9)
    other = Net().eval()
    before = {name: t.clone() for name, t in qmodel.state_dict().items()}
    found = graph_teacher(qmodel, other).eval()
    assert torch.allclose(found(x), other(x), atol=1e-6)
    assert all(torch.equal(t, before[n]) for n, t in qmodel.state_dict().items())


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"features": {"nrm": 1.0}}, "'norm'"),
        ({"features": {"norm": 1.0}, "teacher": nn.Linear(4, 3)}, "parameters"),
        (
            {
                "features": {"norm": 1.0},
                "distillation": 0.0,
                "task_loss": lambda output, targets: output.mean(),
            },
            "weight is 0",
        ),
    ],
)
def test_what_cannot_be_is_an_error(options: dict[str, Any], cause: str) -> None:
    _, qmodel, x = _prepared()
    before = {name: t.clone() for name, t in qmodel.state_dict().items()}
    with pytest.raises(ConfigError, match=cause):
        _finetune(qmodel, x, **options)
    assert all(torch.equal(t, before[n]) for n, t in qmodel.state_dict().items())
