"""Many quantizers at once are what each alone would be, and wait for no device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import gdnsq_fx
from gdnsq_fx.sites import activation_sites, assign_targets, weight_sites
from gdnsq_fx.training.constraint import Constraint
from gdnsq_fx.training.side_by_side import EPSILON, side_by_side


def _x() -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def _prepared() -> GraphModule:
    """Three widths: 8 bits first and last, 2 and 3 in between."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3),
        nn.GELU(),
        nn.ConvTranspose2d(4, 4, 3, groups=2),
        nn.Flatten(),
        nn.Linear(144, 5),
    )
    config = gdnsq_fx.QuantConfig(3, 2, overrides={"2": {"weight_bits": 2}})
    return gdnsq_fx.prepare(model, _x(), config, [_x()]).train()


def _state(qmodel: GraphModule) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in qmodel.state_dict().items()}


@pytest.mark.parametrize("cap", [1.0, 1.7, 2.0, 6.0])
def test_projection_is_that_of_each_alone(cap: float) -> None:
    qmodel = _prepared()
    Constraint(qmodel).open_to(8.0)
    before = _state(qmodel)
    Constraint(qmodel).project(lambda target: cap + 0.1 * target)
    found = _state(qmodel)
    qmodel.load_state_dict(before)
    for site in weight_sites(qmodel):
        bits = site.quantizer.spec.bits
        site.quantizer.project(site.weight(), cap + 0.1 * bits)
    for activation in activation_sites(qmodel):
        bits = activation.quantizer.spec.bits
        activation.quantizer.project(cap + 0.1 * bits)
    wanted = _state(qmodel)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert any(not torch.equal(found[name], before[name]) for name in before)


def test_excess_is_the_sum_over_tensors_of_their_means() -> None:
    qmodel = _prepared()
    Constraint(qmodel).open_to(6.0)
    weights, activations = side_by_side(weight_sites(qmodel), activation_sites(qmodel))
    assert [group.bits for group in weights] == [8, 2, 3]
    wanted, violated = 0.0, 0
    for site in weight_sites(qmodel):
        excess = site.quantizer.capacity(site.weight()) - site.quantizer.spec.bits
        wanted += float(torch.relu(excess.detach() + EPSILON).mean())
        violated += bool((excess > 0).any())
    assert sum(float(g.excess().total.detach()) for g in weights) == pytest.approx(
        wanted
    )
    assert sum(int(g.excess().violated) for g in weights) == violated == 2
    acts = [s.quantizer for s in activation_sites(qmodel)]
    wanted = sum(float(torch.relu(q.capacity() - q.spec.bits + EPSILON)) for q in acts)
    found = sum(float(g.excess().total.detach()) for g in activations)
    assert found == pytest.approx(wanted)


def test_new_targets_make_new_groups() -> None:
    qmodel = _prepared()
    constraint = Constraint(qmodel)
    constraint.open_to(8.0)
    constraint.penalty(1.0)
    assign_targets(qmodel, dict.fromkeys(constraint.targets, 5))
    constraint.project(float)
    assert constraint.violations() == {}
    assert constraint.mean_capacity() == pytest.approx(5.0, abs=1e-3)


def test_a_step_waits_for_no_device() -> None:
    """On the meta device there is nothing to wait for: `.item()` raises there."""
    qmodel = _prepared().to("meta")
    constraint = Constraint(qmodel)
    with pytest.raises(RuntimeError):
        bool(torch.ones((), device="meta") > 0)
    with gdnsq_fx.recomputed_levels():
        output = qmodel(_x().to("meta"))
    loss = output.square().mean()
    constraint.observe_loss(loss)
    (loss + constraint.penalty(0.5)).backward()
    constraint.project(float)
    assert all(p.grad is not None for p in qmodel.parameters())


def test_gradients_at_the_cap_move_step_and_range_alike() -> None:
    qmodel = _prepared()
    constraint = Constraint(qmodel)
    constraint.open_to(4.0)
    for number, site in enumerate(activation_sites(qmodel)):
        site.quantizer.log2_step.grad = torch.tensor(1.0 + number)
        site.quantizer.log2_range.grad = torch.tensor(-4.0)
    constraint.align_gradients(lambda target: 4.0 if target == 2 else 9.0)
    for number, site in enumerate(activation_sites(qmodel)):
        step, range_ = site.quantizer.log2_step.grad, site.quantizer.log2_range.grad
        assert step is not None and range_ is not None
        if site.quantizer.spec.bits == 2:  # at its cap
            assert float(step) == float(range_) == (number - 3.0) / 2
        else:
            assert (float(step), float(range_)) == (1.0 + number, -4.0)


def test_aligning_needs_no_gradient_of_an_activation_that_was_not_used() -> None:
    qmodel = _prepared()
    Constraint(qmodel).align_gradients(float)
    assert all(p.grad is None for p in qmodel.parameters())


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_the_scale_at_the_cap_can_grow_and_shrink_under_adam(sign: float) -> None:
    qmodel = _prepared()
    constraint = Constraint(qmodel)
    (quantizer, *_) = [
        site.quantizer
        for site in activation_sites(qmodel)
        if site.quantizer.spec.bits == 2
    ]
    constraint.project(float)
    before = float(quantizer.step)
    optimizer = torch.optim.Adam([quantizer.log2_step, quantizer.log2_range], 0.05)
    for _ in range(5):
        optimizer.zero_grad()
        # What lies above the clamp: dy/dq = 1, dy/ds = -1.
        (sign * (quantizer.range - quantizer.step)).backward()
        constraint.align_gradients(float)
        optimizer.step()
        constraint.project(float)
    change = float(quantizer.step) / before
    assert change < 0.9 if sign > 0 else change > 1.1
    assert float(quantizer.capacity()) == pytest.approx(2.0, abs=1e-5)
