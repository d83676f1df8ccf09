"""Losses between parts of outputs of any structure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

import gdnsq_fx
from gdnsq_fx.errors import ConfigError
from gdnsq_fx.training.losses import kl_distillation_loss
from gdnsq_fx.training.outputs import select

P = torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log()
Q = torch.tensor([[0.9, 0.1], [0.5, 0.5]]).log()


@dataclass
class Boxes(ModelOutput):
    """An output with names."""

    scores: Tensor | None = None
    boxes: Tensor | None = None


@pytest.mark.parametrize(
    ("output", "selector"),
    [
        ((P, Q), 1),
        ([P, Q], -1),
        ({"boxes": Q, "scores": P}, "boxes"),
        (Boxes(scores=P, boxes=Q), "boxes"),
        (Boxes(scores=P, boxes=Q), 1),
        ({"deep": [P, Q]}, lambda output: output["deep"][1]),
    ],
)
def test_parts_of_every_structure(output: Any, selector: Any) -> None:
    assert select(output, selector) is Q


@pytest.mark.parametrize(
    ("output", "selector", "shown"),
    [
        ({"a": P}, "b", r"keys \['a'\]"),
        ((P,), 3, "1 parts"),
        (P, "logits", "a tensor of shape"),
    ],
)
def test_a_part_that_is_missing(output: Any, selector: Any, shown: str) -> None:
    with pytest.raises(ConfigError, match=shown):
        select(output, selector)


def test_kl_by_hand() -> None:
    """KL(Q || P) = 0.9 ln 1.8 + 0.1 ln 0.2 for the first sample, 0 for the second."""
    wanted = (0.9 * math.log(1.8) + 0.1 * math.log(0.2)) / 2
    assert kl_distillation_loss(P, Q).item() == pytest.approx(wanted, rel=1e-5)
    assert kl_distillation_loss(P, P).item() == 0.0


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.one, self.two = (
            nn.Linear(4, 8),
            nn.Linear(8, 3),
            nn.Linear(8, 2),
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = torch.relu(self.body(x))
        return {"one": self.one(x), "two": self.two(x)}


def _first_loss(**options: Any) -> float:
    torch.manual_seed(0)
    model, x = TwoHeads(), torch.randn(6, 4)
    qmodel = gdnsq_fx.prepare(model, x, gdnsq_fx.QuantConfig(2, 2), [x])
    batches = [(x, torch.arange(6) % 2)]
    result = gdnsq_fx.finetune(
        qmodel, batches, steps=1, teacher=model, progress=False, **options
    )
    return result.history[0].loss


def test_the_selected_part_is_what_is_distilled() -> None:
    seen: list[tuple[int, ...]] = []

    def loss(output: Tensor, wanted: Tensor) -> Tensor:
        seen.append(tuple(output.shape))
        return gdnsq_fx.distillation_loss(output, wanted)

    default, two = _first_loss(), _first_loss(output="two", distillation_loss=loss)
    assert seen == [(6, 2)]
    assert two != default
    assert _first_loss(output=lambda o: o["one"]) == default


def test_weights_of_both_losses() -> None:
    constant = torch.tensor(3.0)

    def task(output: Any, targets: Tensor) -> Tensor:
        return constant + 0.0 * output["two"].sum()

    alone = _first_loss()
    both = _first_loss(task_loss=task, task_weight=0.5, distillation=2.0)
    assert both == pytest.approx(2.0 * alone + 1.5, rel=1e-5)


def test_a_part_that_the_model_lacks_changes_nothing() -> None:
    torch.manual_seed(0)
    model, x = TwoHeads(), torch.randn(6, 4)
    qmodel = gdnsq_fx.prepare(model, x, gdnsq_fx.QuantConfig(2, 2), [x])
    before = {name: t.clone() for name, t in qmodel.state_dict().items()}
    with pytest.raises(ConfigError, match=r"keys \['one', 'two'\]"):
        gdnsq_fx.finetune(qmodel, [x], steps=3, output="three", progress=False)
    assert all(torch.equal(t, before[n]) for n, t in qmodel.state_dict().items())
