"""Which levels rest while a model is fine-tuned, and what that spares."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import gdnsq_fx
from gdnsq_fx.sites import activation_sites
from gdnsq_fx.training.settled_inputs import settled_inputs


def _images() -> Tensor:
    return torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def prepared() -> Callable[..., GraphModule]:
    def make(**settings: object) -> GraphModule:
        torch.manual_seed(0)
        head = [nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)]
        model = nn.Sequential(nn.Conv2d(3, 4, 3), *head).eval()
        config = gdnsq_fx.QuantConfig(4, 4, **settings)  # type: ignore[arg-type]
        return gdnsq_fx.prepare(model, _images(), config, [_images()])

    return make


def _learning(qmodel: GraphModule) -> dict[str, set[bool]]:
    quantizers = [site.quantizer for site in activation_sites(qmodel)]
    return {q.edge: {p.requires_grad for p in q.parameters()} for q in quantizers}


def test_eight_bits_of_an_input_rest_for_the_time_of_the_block(
    prepared: Callable[..., GraphModule],
) -> None:
    qmodel = prepared()
    with settled_inputs(qmodel):
        assert _learning(qmodel) == {"0.input": {False}, "3.input": {True}}
        images = _images()
        qmodel(images).sum().backward()
    assert _learning(qmodel) == {"0.input": {True}, "3.input": {True}}
    few = prepared(first_last=None)
    with settled_inputs(few):
        assert _learning(few) == {"0.input": {True}, "3.input": {True}}


@pytest.mark.parametrize("budget", [None, gdnsq_fx.Budget(mean_act_bits=5.0)])
def test_finetune_leaves_them_unless_bits_are_learned(
    budget: gdnsq_fx.Budget | None, prepared: Callable[..., GraphModule]
) -> None:
    qmodel = prepared()
    quantizer = activation_sites(qmodel)[0].quantizer
    before = [p.detach().clone() for p in quantizer.parameters()]
    gdnsq_fx.finetune(qmodel, [_images()], steps=5, budget=budget, progress=False)
    rested = all(map(torch.equal, before, quantizer.parameters()))
    assert rested == (budget is None)
    assert all(p.requires_grad for p in quantizer.parameters())
