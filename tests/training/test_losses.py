"""What fine-tuning minimizes besides the penalty."""

from __future__ import annotations

import math

import pytest
import torch

from gdnsq_fx.training.losses import distillation_loss, squared_distillation_loss

P = torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log()
Q = torch.tensor([[0.9, 0.1], [0.5, 0.5]]).log()


def test_distillation_is_the_mean_jeffreys_divergence() -> None:
    """0.4 ln 9 for the first sample, 0 for the second."""
    wanted = 0.2 * math.log(9.0)
    assert distillation_loss(P, Q).item() == pytest.approx(wanted, rel=1e-5)
    assert distillation_loss(P, P).item() == 0.0


def test_distillation_reads_the_logits_of_any_output() -> None:
    wanted = distillation_loss(P, Q)
    assert torch.equal(distillation_loss((P, None), (Q, None)), wanted)
    assert torch.equal(distillation_loss({"logits": P}, {"logits": Q}), wanted)


def test_distillation_gradient() -> None:
    """Of KL(p||q) + KL(q||p) with respect to the logits, by finite differences."""
    student = P.double().clone().requires_grad_()
    teacher = Q.double()
    distillation_loss(student, teacher).backward()
    assert student.grad is not None
    moved, h = student.detach().clone(), 1e-3
    moved[0, 0] += h
    above = distillation_loss(moved, teacher)
    moved[0, 0] -= 2 * h
    slope = (above - distillation_loss(moved, teacher)) / (2 * h)
    assert student.grad[0, 0].item() == pytest.approx(slope.item(), rel=1e-2)


def test_squared_distillation_by_hand() -> None:
    output, wanted = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 5.0]])
    assert squared_distillation_loss(output, wanted).item() == 4.5
