"""Accumulation, mixed precision, averages, statistics, best states, early stops."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import gdnsq_fx
from gdnsq_fx.errors import ConfigError
from gdnsq_fx.inputs import Batch
from gdnsq_fx.sites import hard_bits
from gdnsq_fx.training.amp import MixedPrecision
from gdnsq_fx.training.batch_norm import reestimate_batch_norm
from gdnsq_fx.training.schedule import Schedule

STEPS = 20


def _batches(count: int = 6, size: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(count, size, 1, 4, 4, generator=generator))


def _prepared(*, norm: bool = True, bits: int = 2) -> GraphModule:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4) if norm else nn.Identity(),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 3),
    )
    config = gdnsq_fx.QuantConfig(bits, bits, first_last=None)
    return gdnsq_fx.prepare(model.eval(), _batches()[0], config, _batches())


def _finetune(
    qmodel: GraphModule, batches: Any = None, **options: Any
) -> gdnsq_fx.FinetuneResult:
    batches = _batches() if batches is None else batches
    torch.manual_seed(1)
    options = {"steps": STEPS, "progress": False, **options}
    result = gdnsq_fx.finetune(qmodel, batches, **options)
    found = hard_bits(qmodel)
    assert all(found[edge] <= bits for edge, bits in result.target_bits.items())
    assert result.bits == found
    return result


def _state(qmodel: GraphModule) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in qmodel.state_dict().items()}


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


# --- accumulation ---


def test_accumulated_halves_act_as_the_whole_batch() -> None:
    """The mean of two halves is the whole, where no layer looks across samples."""
    whole, halves = _prepared(norm=False), _prepared(norm=False)
    split = [half for batch in _batches() for half in batch.split(3)]
    one = _finetune(whole, steps=3)
    two = _finetune(halves, split, steps=3, accumulate=2)
    assert two.steps == 3
    assert two.history[0].loss == pytest.approx(one.history[0].loss, rel=1e-4)
    for name, value in whole.state_dict().items():
        assert torch.allclose(halves.state_dict()[name], value, atol=1e-4), name


def test_accumulation_takes_as_many_batches_as_it_needs() -> None:
    batches = itertools.islice(itertools.cycle(_batches()), 16)
    _finetune(_prepared(), batches, steps=5, accumulate=3)
    assert len(list(batches)) == 1


# --- mixed precision ---


@pytest.mark.parametrize("autocast", ["bfloat16", "float16"])
def test_mixed_precision_computes_narrow_and_keeps_float32(autocast: Any) -> None:
    qmodel, seen = _prepared(), set[torch.dtype]()

    def loss(output: Tensor, wanted: Tensor) -> Tensor:
        seen.update((output.dtype, wanted.dtype))
        return gdnsq_fx.distillation_loss(output, wanted)

    before = _state(qmodel)
    result = _finetune(qmodel, distillation_loss=loss, autocast=autocast)
    assert seen == {getattr(torch, autocast)}
    assert {p.dtype for p in qmodel.parameters()} == {torch.float32}
    assert not _equal(before, _state(qmodel))
    assert all(record.loss == record.loss for record in result.history)


def test_mixed_precision_ends_near_full_precision() -> None:
    plain = _finetune(_prepared(), steps=60)
    narrow = _finetune(_prepared(), steps=60, autocast="bfloat16")
    assert narrow.history[0].loss == pytest.approx(plain.history[0].loss, rel=0.2)
    assert narrow.history[-1].loss < 3 * plain.history[-1].loss


def test_scaled_gradients_are_those_of_the_loss() -> None:
    """2^16 times the loss in, the gradient of the loss out; an overflow halves it."""
    layer = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    precision = MixedPrecision(layer, "float16")
    assert precision.may_overflow
    before = float(precision.state()["scaler"][0])
    precision.backward((3.0 * layer.weight).sum())
    assert layer.weight.grad is not None
    assert float(layer.weight.grad) == 3.0 * before
    precision.unscale(optimizer)
    assert float(layer.weight.grad) == 3.0
    precision.update(optimizer, usable=True)
    optimizer.zero_grad()
    precision.backward((torch.tensor(torch.inf) * layer.weight).sum())
    precision.unscale(optimizer)
    precision.update(optimizer, usable=False)
    assert float(precision.state()["scaler"][0]) == before / 2


def test_autocast_of_narrow_weights_is_an_error() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 3)).bfloat16(), torch.randn(2, 4).bfloat16()
    qmodel = gdnsq_fx.prepare(model, x, gdnsq_fx.QuantConfig(2, 2), [x])
    with pytest.raises(ConfigError, match="float32"):
        _finetune(qmodel, [x], autocast="bfloat16")


# --- average ---


def test_average_by_hand() -> None:
    """Of the last steps, from the end of the descent on."""
    seen: list[Tensor] = []
    plain, averaged = _prepared(), _prepared()

    def weight(model: nn.Module) -> float:
        seen.append(model.get_parameter("4.weight").detach().clone())
        return 0.0

    _finetune(plain, validate=weight, validate_every=1)
    _finetune(averaged, ema=0.9)
    after = seen[STEPS // 2 - 1 : STEPS]  # the descent takes half of the steps
    wanted = after[0]
    for value in after[1:]:
        wanted = 0.9 * wanted + 0.1 * value
    found = averaged.get_parameter("4.weight").detach()
    assert torch.allclose(found, wanted, atol=1e-6)
    assert not torch.equal(found, after[-1])


def test_validation_sees_the_average_and_training_does_not() -> None:
    seen: list[Tensor] = []

    def weight(model: nn.Module) -> float:
        seen.append(model.get_parameter("4.weight").detach().clone())
        return 0.0

    plain, looked_at, qmodel = _prepared(), _prepared(), _prepared()
    _finetune(plain, ema=0.5)
    _finetune(looked_at, ema=0.5, validate=weight, validate_every=1)
    assert _equal(_state(plain), _state(looked_at))
    assert torch.equal(seen[-1], seen[-2])
    _finetune(qmodel)
    assert not torch.equal(qmodel.get_parameter("4.weight"), seen[-1])


# --- statistics of BatchNorm ---


def test_statistics_are_plain_averages_over_the_batches() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), nn.BatchNorm1d(3))
    model.eval()
    kept = model[2].running_mean.clone()  # type: ignore[union-attr]
    inputs = list(torch.randn(4, 8, 3) + 5.0)
    batches = [Batch((x,), {}, None) for x in inputs]
    reestimate_batch_norm(model, batches, held=[model[2]])
    mean = torch.stack([x.mean(0) for x in inputs]).mean(0)
    variance = torch.stack([x.var(0) for x in inputs]).mean(0)
    norm = model[0]
    assert isinstance(norm, nn.BatchNorm1d)
    assert norm.running_mean is not None and norm.running_var is not None
    assert torch.allclose(norm.running_mean, mean)
    assert torch.allclose(norm.running_var, variance)
    assert norm.momentum == 0.1
    assert torch.equal(model[2].running_mean, kept)  # type: ignore[arg-type]
    assert not any(module.training for module in model.modules())


def test_without_batches_statistics_stay_those_of_training() -> None:
    norm = nn.BatchNorm1d(3)
    norm(torch.randn(8, 3) + 5.0)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    reestimate_batch_norm(norm, [])
    assert _equal(norm.state_dict(), before)
    qmodel = _prepared()
    _finetune(qmodel)
    mean = qmodel.get_buffer("1.running_mean")
    assert not torch.equal(mean, torch.zeros_like(mean))


def test_finetune_measures_them_at_the_final_weights() -> None:
    plain, measured = _prepared(), _prepared()
    _finetune(plain)
    _finetune(measured, batch_norm_batches=6)
    differing = {
        name
        for name, value in plain.state_dict().items()
        if not torch.equal(value, measured.state_dict()[name])
    }
    statistics = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    # Beta is aligned to the accumulators that these statistics give.
    assert differing - {"1.bias"} == statistics
    again = _state(measured)
    inputs = [Batch((x,), {}, None) for x in _batches()]
    reestimate_batch_norm(measured, inputs)
    now = _state(measured)
    assert all(torch.allclose(now[name].float(), again[name].float()) for name in now)


# --- best state, early stop ---


def _metrics(qmodel: GraphModule, values: dict[int, float]) -> Any:
    """Gives step -> metric, and notes the weights it was called with."""
    calls, seen = itertools.count(), list[Tensor]()

    def validate(model: nn.Module) -> float:
        seen.append(model.get_parameter("4.weight").detach().clone())
        return values.get(next(calls), 0.0)

    return validate, seen


@pytest.mark.parametrize(("best", "sign"), [("max", 1.0), ("min", -1.0)])
def test_the_best_state_within_the_budget_is_kept(best: Any, sign: float) -> None:
    """Step 2 has the best metric, with bits above their targets."""
    qmodel = _prepared()
    metrics = {2: 9.0 * sign, 14: 5.0 * sign, 17: 3.0 * sign}
    validate, seen = _metrics(qmodel, metrics)
    result = _finetune(
        qmodel,
        validate=validate,
        validate_every=1,
        best=best,
        schedule=Schedule(STEPS),  # bits come down from 8
    )
    assert result.best_step == 14
    assert result.steps == STEPS
    assert torch.equal(qmodel.get_parameter("4.weight"), seen[14])
    assert not torch.equal(seen[14], seen[STEPS - 1])


def test_the_last_state_may_be_the_best() -> None:
    qmodel = _prepared()
    validate, seen = _metrics(qmodel, {2: 1.0})  # called after steps 6, 13, the last
    result = _finetune(qmodel, validate=validate, validate_every=7, best="max")
    assert result.best_step == STEPS - 1
    assert torch.equal(qmodel.get_parameter("4.weight"), seen[2])


def test_patience_ends_the_run() -> None:
    """Nothing gets better after step 10; three looks later it is over."""
    qmodel = _prepared()
    validate, seen = _metrics(qmodel, {10: 1.0})
    result = _finetune(
        qmodel,
        validate=validate,
        validate_every=1,
        best="max",
        patience=3,
        schedule=Schedule(STEPS),
    )
    assert (result.steps, result.best_step) == (14, 10)
    assert torch.equal(qmodel.get_parameter("4.weight"), seen[10])


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate": 0},
        {"autocast": "int8"},
        {"ema": 1.0},
        {"ema": -0.1},
        {"batch_norm_batches": -1},
        {"best": "most", "validate": lambda m: 0.0},
        {"best": "max"},
        {"patience": 0, "best": "max", "validate": lambda m: 0.0, "validate_every": 1},
        {"patience": 3, "validate": lambda m: 0.0, "validate_every": 1},
        {"patience": 3, "best": "max", "validate": lambda m: 0.0},
    ],
)
def test_settings_that_make_no_sense_are_errors(options: dict[str, Any]) -> None:
    qmodel = _prepared()
    before = _state(qmodel)
    with pytest.raises(ConfigError):
        _finetune(qmodel, **options)
    assert _equal(before, _state(qmodel))


# --- all of it, interrupted ---


class Interrupted(Exception):
    """Ends a run early."""


@pytest.mark.parametrize("autocast", [None, "float16"])
def test_all_of_it_resumes_bit_for_bit(tmp_path: Path, autocast: Any) -> None:
    def metric(model: nn.Module) -> float:
        return float(model(_batches()[0]).square().sum())

    options: dict[str, Any] = {
        "accumulate": 2,
        "autocast": autocast,
        "ema": 0.7,
        "batch_norm_batches": 4,
        "best": "min",
        "validate_every": 2,
    }

    def run(folder: Path | None, stop: int | None) -> tuple[Any, dict[str, Tensor]]:
        calls, qmodel = itertools.count(), _prepared()

        def validate(model: nn.Module) -> float:
            if next(calls) == stop:
                raise Interrupted
            return metric(model)

        saving = {"checkpoint": folder, "checkpoint_every": 3}
        result = _finetune(qmodel, validate=validate, **saving, **options)
        return result, _state(qmodel)

    wanted, state = run(None, None)
    with pytest.raises(Interrupted):
        run(tmp_path, 8)  # in step 18; the newest checkpoint is of step 15
    resumed, found = run(tmp_path, None)
    assert _equal(state, found)
    assert (resumed.history, resumed.best_step) == (wanted.history, wanted.best_step)
    assert resumed.metric == wanted.metric
