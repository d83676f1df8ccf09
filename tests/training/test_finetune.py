"""Fine-tuning meets its budget, whatever the steps, and survives what goes wrong."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import gdnsq_fx
from gdnsq_fx.analysis.divergence import jeffreys
from gdnsq_fx.channels import ChannelLayout
from gdnsq_fx.errors import (
    BatchStructureError,
    ConfigError,
    PassError,
    TrainingDivergedError,
)
from gdnsq_fx.sites import activation_sites, weight_sites
from gdnsq_fx.spec import Estimator, Offset
from gdnsq_fx.training.divergence import DivergenceGuard
from gdnsq_fx.training.losses import squared_distillation_loss

ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)
OFFSETS: tuple[Offset, ...] = get_args(Offset)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv1(x)))
        x = torch.tanh(x + self.conv2(x))
        return self.fc(x.mean((2, 3)))


def _images(count: int = 4, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(6, 1, 4, 4, generator=generator) for _ in range(count)]


IMAGES = _images()


def _prepared(
    weight_bits: int = 2, act_bits: int = 2, **options: Any
) -> tuple[Net, GraphModule]:
    torch.manual_seed(0)
    model = Net().eval()
    config = gdnsq_fx.QuantConfig(
        weight_bits, act_bits, **{"first_last": None, **options}
    )
    return model, gdnsq_fx.prepare(model, IMAGES[0], config, IMAGES)


def _finetune(
    qmodel: GraphModule, batches: Any = None, *, steps: int = 20, **options: Any
) -> gdnsq_fx.FinetuneResult:
    batches = IMAGES if batches is None else batches
    return gdnsq_fx.finetune(qmodel, batches, steps=steps, progress=False, **options)


def _is_finite(model: nn.Module) -> bool:
    tensors = [t for n, t in model.state_dict().items() if not n.endswith("observed")]
    return all(bool(torch.isfinite(t).all()) for t in tensors)


# --- the guarantee ---


def _most_levels(layout: ChannelLayout, quantized: Tensor) -> int:
    view = layout.grouped(quantized)
    reduced = layout.reduced_dims(quantized.ndim)
    kept = [d for d in range(view.ndim) if d not in reduced]
    count = math.prod(view.shape[d] for d in kept)
    rows = view.permute(*kept, *reduced).reshape(count, -1)
    return max(row.unique().numel() for row in rows)


@torch.no_grad()
def _assert_budget(qmodel: GraphModule, result: gdnsq_fx.FinetuneResult) -> None:
    """By the result, and by counting the levels that come out."""
    assert result.budget_met
    assert set(result.bits) == set(result.target_bits)
    assert all(result.bits[e] <= b for e, b in result.target_bits.items()), result.bits
    for site in weight_sites(qmodel):
        quantized = site.quantizer.quantize(site.weight())
        levels = _most_levels(site.quantizer.layout, quantized)
        assert levels <= 2 ** result.target_bits[site.edge], site.edge
    wide = torch.linspace(-100.0, 100.0, 100_001)
    for found in activation_sites(qmodel):
        levels = found.quantizer.quantize(wide).unique().numel()
        assert levels <= 2 ** result.target_bits[found.edge], found.edge
    assert _is_finite(qmodel)


@pytest.mark.parametrize("steps", [100, 137])
@pytest.mark.parametrize("bits", [(1, 1), (2, 2), (3, 5)])
def test_budget_is_met(bits: tuple[int, int], steps: int) -> None:
    _, qmodel = _prepared(*bits)
    result = _finetune(qmodel, steps=steps)
    _assert_budget(qmodel, result)
    assert set(result.target_bits.values()) == set(bits)


@pytest.mark.parametrize(
    ("offset", "estimator"), list(itertools.product(OFFSETS, ESTIMATORS))
)
def test_budget_is_met_in_every_mode(offset: Offset, estimator: Estimator) -> None:
    _, qmodel = _prepared(1, 2, offset=offset, estimator=estimator)
    _assert_budget(qmodel, _finetune(qmodel, steps=100))


@pytest.mark.parametrize("per_channel", [True, False])
def test_budget_is_met_for_mixed_bits(per_channel: bool) -> None:
    overrides = {
        "conv2": {"weight_bits": 1, "act_bits": 5, "offset": "integer"},
        "op:linear": gdnsq_fx.Override(weight_bits=10, act_bits=3, estimator="aewgs"),
    }
    _, qmodel = _prepared(3, 2, overrides=overrides, per_channel=per_channel)
    result = _finetune(qmodel, steps=100)
    _assert_budget(qmodel, result)
    assert result.target_bits == {
        "conv1.input": 2,
        "conv1.weight": 3,
        "conv2.input": 5,
        "conv2.weight": 1,
        "fc.input": 3,
        "fc.weight": 10,
    }


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_few_steps_meet_the_budget_too(steps: int) -> None:
    _, qmodel = _prepared(1, 1)
    _assert_budget(qmodel, _finetune(qmodel, steps=steps))


def test_budget_is_met_with_large_steps_of_the_optimizer() -> None:
    _, qmodel = _prepared(2, 3)
    _assert_budget(qmodel, _finetune(qmodel, steps=100, lr=0.3))


@pytest.mark.parametrize("descent", [0.0, 1.0])
def test_budget_is_met_with_any_descent(descent: float) -> None:
    _, qmodel = _prepared(2, 2)
    schedule = gdnsq_fx.Schedule(30, descent=descent)
    _assert_budget(qmodel, _finetune(qmodel, steps=30, schedule=schedule))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bits", [2, 8])
def test_budget_is_met_in_other_precisions(bits: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, images = Net().to(dtype).eval(), [x.to(dtype) for x in IMAGES]
    config = gdnsq_fx.QuantConfig(bits, bits, first_last=None)
    qmodel = gdnsq_fx.prepare(model, images[0], config, images)
    _assert_budget(qmodel, _finetune(qmodel, images, steps=30))


def test_constant_and_dead_channels_do_not_hinder() -> None:
    torch.manual_seed(0)
    model = Net().eval()
    with torch.no_grad():
        model.conv1.weight[0] = 0.0
        model.conv1.weight[1] = 0.1
        model.conv2.weight[2] *= 1e-41
        model.norm.weight[3] = 0.0
    config = gdnsq_fx.QuantConfig(1, 1, first_last=None)
    qmodel = gdnsq_fx.prepare(model, IMAGES[0], config, IMAGES)
    _assert_budget(qmodel, _finetune(qmodel, steps=30))


def test_dead_channel_does_not_stop_the_others() -> None:
    """Its capacity has a gradient of 1 / span, which must not eat the whole norm."""
    moved: list[float] = []
    for scale in (1.0, 1e-14):
        torch.manual_seed(0)
        model = Net().eval()
        with torch.no_grad():
            model.conv2.weight[0] *= scale
        config = gdnsq_fx.QuantConfig(2, 2, first_last=None)
        qmodel = gdnsq_fx.prepare(model, IMAGES[0], config, IMAGES)
        before = qmodel.get_parameter("fc.weight").detach().clone()
        _finetune(qmodel, steps=30)
        after = qmodel.get_parameter("fc.weight").detach()
        moved.append(float((after - before).norm()))
    assert moved[1] > 0.3 * moved[0], moved


# --- the result, the model afterwards ---


def test_result_fields() -> None:
    _, qmodel = _prepared()
    result = _finetune(qmodel, steps=40, validate=lambda model: 0.5, validate_every=16)
    assert (result.steps, result.budget_met, result.metric) == (40, True, 0.5)
    assert result.seconds > 0
    steps = [record.step for record in result.history]
    assert steps == sorted(set(steps)) and steps[0] == 0 and steps[-1] == 39
    assert [r.step for r in result.history if r.metric is not None] == [15, 31]
    assert all(math.isfinite(r.loss) for r in result.history)
    assert result.history[0].mean_bits > result.history[-1].mean_bits
    assert result.history[-1].mean_bits <= 2.0 + 1e-3
    assert "40 steps" in str(result) and "metric 0.5" in str(result)


def test_model_is_left_in_evaluation() -> None:
    _, qmodel = _prepared()
    _finetune(qmodel)
    assert not any(module.training for module in qmodel.modules())


@pytest.mark.parametrize("bits", [1, 2])
def test_fine_tuning_does_better_than_placing_levels(bits: int) -> None:
    torch.manual_seed(0)
    layers = nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)
    model = nn.Sequential(*layers).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)  # outputs that differ between samples
    batches = list(torch.randn(8, 64, 8))
    config = gdnsq_fx.QuantConfig(bits, bits, first_last=None)
    qmodel = gdnsq_fx.prepare(model, batches[0], config, batches)

    @torch.no_grad()
    def divergence() -> float:
        found = [jeffreys(qmodel(x), model(x)).mean() for x in batches]
        return float(torch.stack(found).mean())

    before = divergence()
    _finetune(qmodel, batches, steps=200)
    assert divergence() < 0.8 * before


@pytest.mark.parametrize("bits", [1, 3])
def test_converted_equals_fine_tuned(bits: int) -> None:
    _, qmodel = _prepared(bits, bits)
    _finetune(qmodel, steps=30)
    with torch.no_grad():
        for batch in IMAGES:
            got, wanted = gdnsq_fx.convert(qmodel)(batch), qmodel(batch)
            assert torch.equal(got.argmax(1), wanted.argmax(1))
            assert (got - wanted).abs().max() <= 1e-4 * (wanted.max() - wanted.min())


def test_fine_tuning_twice_goes_on() -> None:
    _, qmodel = _prepared(2, 2)
    _finetune(qmodel, steps=10)
    _assert_budget(qmodel, _finetune(qmodel, steps=10))


def test_same_seed_same_result() -> None:
    states: list[dict[str, Tensor]] = []
    for _ in range(2):
        _, qmodel = _prepared(2, 2, estimator="ste")
        torch.manual_seed(5)
        _finetune(qmodel)
        states.append(qmodel.state_dict())
    assert all(torch.equal(states[0][k], v) for k, v in states[1].items())


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_scale_of_the_input_does_not_matter(scale: float) -> None:
    """A lower bound learns in units of its tensor, not in absolute ones."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)
            with torch.no_grad():
                self.first.weight.mul_(4.0 / scale)
                self.last.weight.mul_(8.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.relu(self.first(x)))

    torch.manual_seed(0)
    model = Scaled()
    batches = [x * scale for x in torch.randn(4, 64, 8)]
    overrides = {"last": {"weight_bits": 8, "act_bits": 8}}
    config = gdnsq_fx.QuantConfig(8, 4, first_last=None, overrides=overrides)
    qmodel = gdnsq_fx.prepare(model, batches[0], config, batches)
    _finetune(qmodel, batches, steps=100, lr=1e-6)
    (quantizer,) = [
        s.quantizer for s in activation_sites(qmodel) if s.edge == "first.input"
    ]
    x = torch.cat(batches)
    clipped = quantizer.clipped(x).float().mean().item()
    noise = (quantizer(x) - x).square().mean() / x.square().mean()
    assert clipped < 0.3, clipped
    assert noise < 0.1, noise


# --- teachers and losses ---


def test_teacher_is_left_as_it_was() -> None:
    model, qmodel = _prepared()
    model.train()
    model.norm.eval()
    model.conv1.weight.requires_grad_(False)
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    state = copy.deepcopy(model.state_dict())
    _finetune(qmodel, teacher=model)
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())


def test_teacher_is_left_as_it_was_after_an_error() -> None:
    model, qmodel = _prepared()
    model.train()
    with pytest.raises(BatchStructureError):
        _finetune(qmodel, [], teacher=model)
    assert all(m.training for m in model.modules())


def test_teacher_runs_in_evaluation() -> None:
    model, qmodel = _prepared()
    seen: set[bool] = set()
    model.train().register_forward_pre_hook(lambda m, _: seen.add(m.training))
    _finetune(qmodel, teacher=model)
    assert seen == {False}


def test_default_teacher_is_the_model_as_it_was() -> None:
    """At identity precision it is the original, so both give the same run."""
    states: list[dict[str, Tensor]] = []
    for given in (True, False):
        model, qmodel = _prepared()
        _finetune(qmodel, teacher=model if given else None)
        states.append(qmodel.state_dict())
    for key, value in states[0].items():
        assert torch.allclose(states[1][key].float(), value.float(), atol=1e-3), key


def test_model_as_its_own_teacher() -> None:
    _, qmodel = _prepared()
    _assert_budget(qmodel, _finetune(qmodel, teacher=qmodel))


def _labelled(count: int = 4) -> list[tuple[Tensor, Tensor]]:
    return [(x, torch.arange(6) % 3) for x in _images(count)]


def test_task_loss_sees_outputs_and_targets() -> None:
    _, qmodel = _prepared(4, 4)
    seen: list[tuple[torch.Size, torch.Size]] = []

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        seen.append((output.shape, targets.shape))
        return nn.functional.cross_entropy(output, targets)

    result = _finetune(qmodel, _labelled(), task_loss=loss, distillation=0.0, steps=60)
    assert set(seen) == {(torch.Size([6, 3]), torch.Size([6]))}
    assert result.history[-1].loss < result.history[0].loss


def test_losses_add_up() -> None:
    """2 * distillation + task, on the first step."""
    model, qmodel = _prepared()
    constant = torch.tensor(3.0)
    options: dict[str, Any] = {"teacher": model, "steps": 1}
    one = _finetune(copy.deepcopy(qmodel), _labelled(), **options)
    both = _finetune(
        copy.deepcopy(qmodel),
        _labelled(),
        task_loss=lambda output, targets: constant + 0.0 * output.sum(),
        distillation=2.0,
        **options,
    )
    wanted = 2.0 * one.history[0].loss + 3.0
    assert both.history[0].loss == pytest.approx(wanted, rel=1e-5)


def test_another_distillation_loss() -> None:
    _, qmodel = _prepared()
    result = _finetune(qmodel, distillation_loss=squared_distillation_loss)
    _assert_budget(qmodel, result)


def test_task_loss_without_targets_is_an_error() -> None:
    _, qmodel = _prepared()
    with pytest.raises(BatchStructureError, match="targets"):
        _finetune(qmodel, IMAGES, task_loss=nn.functional.cross_entropy)


# --- validation ---


def test_validate_runs_in_evaluation_without_gradients() -> None:
    _, qmodel = _prepared()
    seen: list[tuple[bool, bool]] = []

    def validate(model: nn.Module) -> float:
        training = any(m.training for m in model.modules())
        seen.append((training, torch.is_grad_enabled()))
        model(IMAGES[0])
        return float(len(seen))

    result = _finetune(qmodel, steps=20, validate=validate, validate_every=5)
    assert set(seen) == {(False, False)}
    assert result.metric == len(seen)
    assert [r.step for r in result.history if r.metric is not None] == [4, 9, 14, 19]


def test_validation_does_not_change_the_run() -> None:
    states: list[dict[str, Tensor]] = []
    for every in (None, 3):
        _, qmodel = _prepared()
        _finetune(qmodel, validate=lambda m: 0.0, validate_every=every)
        states.append(qmodel.state_dict())
    assert all(torch.equal(states[0][k], v) for k, v in states[1].items())


# --- batches ---


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x, y: x,
        lambda x, y: (x,),
        lambda x, y: (x, y),
        lambda x, y: [x, y],
        lambda x, y: (x, y, y),
    ],
)
def test_batches_of_every_structure(wrap: Callable[[Tensor, Tensor], Any]) -> None:
    _, qmodel = _prepared()
    batches = [wrap(x, y) for x, y in _labelled()]
    _assert_budget(qmodel, _finetune(qmodel, batches, steps=5))


def test_keyword_inputs() -> None:
    torch.manual_seed(0)
    batches = [{"x": x} for x in IMAGES]
    config = gdnsq_fx.QuantConfig(2, 2, first_last=None)
    qmodel = gdnsq_fx.prepare(Net().eval(), batches[0], config, batches)
    labelled = [(one, torch.arange(6) % 3) for one in batches]
    loss = nn.functional.cross_entropy
    _assert_budget(qmodel, _finetune(qmodel, labelled, task_loss=loss, steps=5))


def test_foreign_batch_is_an_error_that_shows_both_structures() -> None:
    _, qmodel = _prepared()
    with pytest.raises(BatchStructureError, match=r"expected Tensor.*got"):
        _finetune(qmodel, [*IMAGES, {"image": IMAGES[0]}])
    assert _is_finite(qmodel)


def test_list_is_iterated_again_and_again() -> None:
    _, qmodel = _prepared()
    assert _finetune(qmodel, IMAGES[:1], steps=9).steps == 9


def _stream(count: int) -> Iterator[Tensor]:
    yield from itertools.islice(itertools.cycle(IMAGES), count)


def test_one_shot_iterator_that_lasts() -> None:
    _, qmodel = _prepared()
    _assert_budget(qmodel, _finetune(qmodel, _stream(12), steps=12))


@pytest.mark.parametrize("count", [0, 1, 11])
def test_one_shot_iterator_that_ends_early_is_an_error(count: int) -> None:
    _, qmodel = _prepared()
    with pytest.raises(BatchStructureError, match=rf"gave {count} of the 12 batches"):
        _finetune(qmodel, _stream(count), steps=12)
    assert _is_finite(qmodel)
    assert not qmodel.training


# --- what goes wrong ---


def _poisoned(at: int, value: float = math.nan) -> list[Tensor]:
    return [x * value if n == at else x for n, x in enumerate(_images(40))]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 1, 25, 39])
def test_poisoned_batch_stops_with_the_last_good_state(at: int, value: float) -> None:
    """Also what BatchNorm took from it in the forward pass must go."""
    _, qmodel = _prepared()
    with pytest.raises(TrainingDivergedError, match=f"step {at} ") as caught:
        _finetune(qmodel, _poisoned(at, value), steps=40)
    assert caught.value.step == at
    assert _is_finite(qmodel)
    with torch.no_grad():
        assert torch.isfinite(qmodel.eval()(IMAGES[0])).all()


def test_poisoned_first_batch_leaves_the_model_as_it_was() -> None:
    _, qmodel = _prepared()
    before = copy.deepcopy(qmodel.state_dict())
    with pytest.raises(TrainingDivergedError):
        _finetune(qmodel, _poisoned(0), steps=40)
    after = qmodel.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())


def test_loss_that_turns_nan_stops() -> None:
    _, qmodel = _prepared()
    calls = itertools.count()

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        return output.sum() * (math.nan if next(calls) == 7 else 1e-3)

    with pytest.raises(TrainingDivergedError) as caught:
        _finetune(qmodel, _labelled(), task_loss=loss)
    assert caught.value.step == 7
    assert _is_finite(qmodel)


def test_gradient_that_turns_nan_stops() -> None:
    """sqrt at 0: a finite loss with an infinite slope."""
    _, qmodel = _prepared()

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        return (output - output.detach()).square().sum().sqrt()

    with pytest.raises(TrainingDivergedError) as caught:
        _finetune(qmodel, _labelled(), task_loss=loss)
    assert caught.value.step == DivergenceGuard.MAX_SKIPPED
    assert _is_finite(qmodel)


def test_gradient_that_overflows_once_is_skipped() -> None:
    _, qmodel = _prepared()
    calls = itertools.count()

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        if next(calls) == 3:
            return (output - output.detach()).square().sum().sqrt()
        return output.square().mean()

    result = _finetune(qmodel, _labelled(), task_loss=loss, steps=20)
    assert result.budget_met
    assert _is_finite(qmodel)


def test_an_error_before_the_first_update_changes_nothing() -> None:
    """Targets that are missing show only when the loss is taken."""
    _, qmodel = _prepared()
    before = {k: v.clone() for k, v in qmodel.state_dict().items()}
    with pytest.raises(BatchStructureError, match="task_loss needs targets"):
        _finetune(qmodel, task_loss=lambda output, targets: output.mean())
    assert all(torch.equal(v, before[k]) for k, v in qmodel.state_dict().items())


def test_a_teacher_of_another_shape_is_refused() -> None:
    """A single column would broadcast, and train towards nonsense."""
    model, qmodel = _prepared()
    narrow = nn.Sequential(model, nn.LazyLinear(1))
    with pytest.raises(ConfigError, match="teacher's output has shape"):
        _finetune(qmodel, teacher=narrow)


def test_error_in_the_users_loss_goes_through_and_leaves_finite_weights() -> None:
    _, qmodel = _prepared()
    calls = itertools.count()

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        if next(calls) == 7:
            raise ZeroDivisionError("the user's own")
        return output.square().mean()

    with pytest.raises(ZeroDivisionError, match="the user's own"):
        _finetune(qmodel, _labelled(), task_loss=loss)
    assert _is_finite(qmodel)
    _assert_budget(qmodel, _finetune(qmodel, steps=5))


def test_frozen_weights_stay_frozen() -> None:
    _, qmodel = _prepared()
    weight = qmodel.get_parameter("conv2.weight").requires_grad_(False)
    before = weight.detach().clone()
    _assert_budget(qmodel, _finetune(qmodel))
    assert torch.equal(weight, before) and not weight.requires_grad


def test_all_weights_frozen_leaves_the_quantizers_to_learn() -> None:
    _, qmodel = _prepared()
    for name, parameter in qmodel.named_parameters():
        parameter.requires_grad_(name.startswith("quantizers."))
    _assert_budget(qmodel, _finetune(qmodel))


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0},
        {"schedule": gdnsq_fx.Schedule(7)},
        {"distillation": 0.0},
        {"validate": lambda m: 0.0, "validate_every": 0},
        # Each of these would train, and away from the goal.
        {"distillation": -1.0},
        {"lr": -1e-3},
        {"max_grad_norm": -1.0},
    ],
)
def test_settings_that_make_no_sense_are_errors(options: dict[str, Any]) -> None:
    _, qmodel = _prepared()
    before = copy.deepcopy(qmodel.state_dict())
    with pytest.raises(ConfigError):
        _finetune(qmodel, **options)
    after = qmodel.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())


def test_progress_bar_shows_loss_and_bits(capsys: pytest.CaptureFixture[str]) -> None:
    _, qmodel = _prepared()
    gdnsq_fx.finetune(qmodel, IMAGES, steps=5, validate=lambda m: 1.0, validate_every=2)
    shown = capsys.readouterr().err
    assert all(part in shown for part in ("fine-tune", "5/5", "loss=", "bits="))


def test_model_that_was_not_prepared_is_an_error() -> None:
    with pytest.raises(PassError, match="prepare"):
        gdnsq_fx.finetune(Net(), IMAGES, steps=5)  # type: ignore[arg-type]
