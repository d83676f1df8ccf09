"""An interrupted run goes on to the bit, whatever happens to its checkpoints."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.data import DataLoader, TensorDataset

import gdnsq_fx
from gdnsq_fx.errors import CheckpointError, CheckpointWarning, ConfigError

SCRIPT = Path(__file__).with_name("interrupted_run.py")
STEPS = 20


class Interrupted(Exception):
    """Stands for whatever ends a run early."""


def _batches() -> list[Tensor]:
    return list(torch.randn(5, 6, 4, generator=torch.Generator().manual_seed(0)))


def _prepared(weight_bits: int = 2) -> GraphModule:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)
    )
    config = gdnsq_fx.QuantConfig(weight_bits, 2, first_last=None, estimator="ste")
    qmodel = gdnsq_fx.prepare(model, _batches()[0], config, _batches())
    return qmodel.train()


def _finetune(
    qmodel: GraphModule, folder: Path | None, batches: Any = None, **options: Any
) -> gdnsq_fx.FinetuneResult:
    given = {"steps": STEPS, "checkpoint": folder, "checkpoint_every": 4, **options}
    batches = _batches() if batches is None else batches
    torch.manual_seed(1)  # dithering and dropout draw from it
    return gdnsq_fx.finetune(qmodel, batches, progress=False, **given)


class _Watched:
    """The batches, and something that happens before one of them is drawn."""

    def __init__(self, at: int, happens: Callable[[], object]) -> None:
        self._at, self._happens = at, happens
        self._drawn = itertools.count()

    def __iter__(self) -> Iterator[Tensor]:
        for batch in _batches():
            if next(self._drawn) == self._at:
                self._happens()
            yield batch


def _stop() -> None:
    raise Interrupted


def _interrupt(folder: Path, after: int, **options: Any) -> None:
    with pytest.raises(Interrupted):
        _finetune(_prepared(), folder, _Watched(after, _stop), **options)


def _files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def _assert_same(one: GraphModule, other: GraphModule) -> None:
    state = other.state_dict()
    assert all(torch.equal(t, state[name]) for name, t in one.state_dict().items())


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_twenty_kills_at_random_moments_change_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(tmp_path), "20"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[-1] for line in lines] == ["equal"] * 10, done.stdout
    # The kills did hit runs that were on their way.
    assert sum(0 < int(line[2]) < 40 for line in lines) >= 5, done.stdout


@pytest.mark.parametrize("after", [1, 5, 13, 19])
def test_resumed_run_ends_as_the_uninterrupted_one(tmp_path: Path, after: int) -> None:
    plain, resumed = _prepared(), _prepared()
    wanted = _finetune(plain, None)
    _interrupt(tmp_path, after)
    result = _finetune(resumed, tmp_path)
    _assert_same(plain, resumed)
    assert result.history == wanted.history
    assert result.bits == wanted.bits
    assert _files(tmp_path) == [f"step-{n:09d}.safetensors" for n in (16, 20)]


def test_weights_in_channels_last_go_on_as_well(tmp_path: Path) -> None:
    def prepared() -> GraphModule:
        torch.manual_seed(0)
        images = torch.randn(4, 3, 8, 8)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        config = gdnsq_fx.QuantConfig(4, 4, first_last=None)
        qmodel = gdnsq_fx.prepare(model, images, config, [images])
        return qmodel.to(memory_format=torch.channels_last)

    images = torch.randn(5, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    plain, resumed = prepared(), prepared()
    _finetune(plain, None, images.unbind())

    def until(count: int) -> Iterator[Tensor]:
        yield from images[:count]
        raise Interrupted

    class Stopping:
        passes = itertools.count()

        def __iter__(self) -> Iterator[Tensor]:
            return until(3) if next(self.passes) == 2 else iter(images.unbind())

    with pytest.raises(Interrupted):
        _finetune(prepared(), tmp_path, Stopping())
    _finetune(resumed, tmp_path, images.unbind())
    _assert_same(plain, resumed)


@pytest.mark.parametrize("after", [1, 9, 13, 19])
def test_learned_bits_go_on_as_well(tmp_path: Path, after: int) -> None:
    budget = gdnsq_fx.Budget(mean_weight_bits=2.5, mean_act_bits=3)
    plain, resumed = _prepared(), _prepared()
    wanted = _finetune(plain, None, budget=budget)
    _interrupt(tmp_path, after, budget=budget)
    result = _finetune(resumed, tmp_path, budget=budget)
    _assert_same(plain, resumed)
    assert result.bits == wanted.bits and result.target_bits == wanted.target_bits
    assert result.costs == wanted.costs


def test_another_budget_is_another_run(tmp_path: Path) -> None:
    _interrupt(tmp_path, 9, budget=gdnsq_fx.Budget(mean_weight_bits=2.5))
    with pytest.raises(CheckpointError, match="budget"):
        _finetune(_prepared(), tmp_path, budget=gdnsq_fx.Budget(mean_weight_bits=3))


def test_checkpoints_do_not_change_the_run(tmp_path: Path) -> None:
    plain, saved = _prepared(), _prepared()
    _finetune(plain, None)
    _finetune(saved, tmp_path)
    _assert_same(plain, saved)


def test_finished_run_is_only_read_again(tmp_path: Path) -> None:
    first, again = _prepared(), _prepared()
    wanted = _finetune(first, tmp_path)
    # It reads again the 5 batches of the pass it ended in, and takes no step.
    result = _finetune(again, tmp_path, _Watched(5, _stop))
    _assert_same(first, again)
    assert result.history == wanted.history
    assert result.seconds >= wanted.seconds * 0.5


@pytest.mark.parametrize("own", [True, False])
def test_shuffled_loader_gives_the_same_order(tmp_path: Path, own: bool) -> None:
    """From the global generator, and from one that every pass moves on."""
    data = TensorDataset(torch.cat(_batches()))

    def run(folder: Path | None, stop: int | None) -> GraphModule:
        qmodel, seen = _prepared(), itertools.count(1)
        generator = torch.Generator().manual_seed(3) if own else None
        loader = DataLoader(data, batch_size=7, shuffle=True, generator=generator)

        def validate(model: nn.Module) -> float:
            if next(seen) == stop:
                raise Interrupted
            return 0.0

        _finetune(qmodel, folder, loader, validate=validate, validate_every=1)
        return qmodel

    plain = run(None, None)
    with pytest.raises(Interrupted):
        run(tmp_path, 15)  # after 12 steps: two passes of 5, and 2 batches
    _assert_same(plain, run(tmp_path, None))


def test_tracker_goes_on(tmp_path: Path) -> None:
    trackers = [gdnsq_fx.CapacityTracker(10) for _ in range(3)]
    _finetune(_prepared(), None, tracker=trackers[0])
    _interrupt(tmp_path, 14, tracker=trackers[1])
    _finetune(_prepared(), tmp_path, tracker=trackers[2])
    assert trackers[2].to_dict() == trackers[0].to_dict()
    assert trackers[2].records[0].step == 0


# --- files ---


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def _flip_a_value(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)


def _empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("damage", [_truncate, _flip_a_value, _empty])
def test_damaged_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, damage: Any
) -> None:
    plain, resumed = _prepared(), _prepared()
    _finetune(plain, None)
    _interrupt(tmp_path, 14)
    assert _files(tmp_path) == [f"step-{n:09d}.safetensors" for n in (8, 12)]
    damage(tmp_path / "step-000000012.safetensors")
    with pytest.warns(CheckpointWarning, match="step-000000012"):
        _finetune(resumed, tmp_path)
    _assert_same(plain, resumed)


def test_without_a_whole_checkpoint_the_run_starts_over(tmp_path: Path) -> None:
    plain, resumed = _prepared(), _prepared()
    _finetune(plain, None)
    _interrupt(tmp_path, 14)
    for file in tmp_path.iterdir():
        _truncate(file)
    with pytest.warns(CheckpointWarning):
        _finetune(resumed, tmp_path)
    _assert_same(plain, resumed)


def test_other_files_stay_and_left_overs_go(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".gdnsq_fx-0123.tmp").write_text("half a checkpoint")
    _finetune(_prepared(), tmp_path)
    wanted = ["notes.txt", *(f"step-{n:09d}.safetensors" for n in (16, 20))]
    assert _files(tmp_path) == wanted


def test_a_converted_model_is_not_taken_for_a_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "step-000000012.safetensors"
    gdnsq_fx.save(gdnsq_fx.convert(_prepared()), file)
    with pytest.warns(CheckpointWarning, match="no fine-tuning checkpoint"):
        _finetune(_prepared(), tmp_path)


# --- other runs ---


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"steps": 30}, "steps was 20, is 30"),
        ({"lr": 2e-3}, "lr was 0.001, is 0.002"),
        ({"schedule": gdnsq_fx.Schedule(STEPS, descent=0.7)}, "descent was 0.5"),
        ({"distillation_loss": gdnsq_fx.squared_distillation_loss}, "squared"),
    ],
)
def test_another_run_is_refused(
    tmp_path: Path, options: dict[str, Any], cause: str
) -> None:
    _interrupt(tmp_path, 9)
    files, qmodel = _files(tmp_path), _prepared()
    before = {name: t.clone() for name, t in qmodel.state_dict().items()}
    with pytest.raises(CheckpointError, match=cause):
        _finetune(qmodel, tmp_path, **options)
    assert _files(tmp_path) == files
    assert all(torch.equal(t, before[n]) for n, t in qmodel.state_dict().items())


def test_another_model_is_refused(tmp_path: Path) -> None:
    _interrupt(tmp_path, 9)
    with pytest.raises(CheckpointError, match="edges was"):
        _finetune(_prepared(weight_bits=3), tmp_path)
    moved = _prepared()
    with torch.no_grad():
        moved.get_parameter("0.weight").add_(1e-3)
    with pytest.raises(CheckpointError, match=r"model was .* resume=False"):
        _finetune(moved, tmp_path)


def test_starting_over_replaces_the_other_run(tmp_path: Path) -> None:
    _interrupt(tmp_path, 19)
    plain, again = _prepared(), _prepared()
    _finetune(plain, None, steps=7)
    _finetune(again, tmp_path, steps=7, resume=False)
    _assert_same(plain, again)
    assert _files(tmp_path) == [f"step-{n:09d}.safetensors" for n in (4, 7)]


def test_fewer_batches_than_before_are_refused(tmp_path: Path) -> None:
    _interrupt(tmp_path, 14)  # the newest checkpoint stands at batch 2 of a pass
    with pytest.raises(CheckpointError, match=r"batch 2 .* ends after 1"):
        _finetune(_prepared(), tmp_path, _batches()[:1])


def test_checkpoint_every_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="checkpoint_every"):
        _finetune(_prepared(), tmp_path, checkpoint_every=0)


# --- SIGTERM ---


def _terminating(at: int) -> _Watched:
    return _Watched(at, lambda: signal.raise_signal(signal.SIGTERM))


@pytest.fixture
def terminated() -> Iterator[list[int]]:
    """Signals that the user's own handler has received."""
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda n, frame: received.append(n))
    yield received
    signal.signal(signal.SIGTERM, before)


def test_sigterm_saves_the_step_and_then_acts(tmp_path: Path) -> None:
    def leave(number: int, frame: object) -> None:
        raise Interrupted

    plain, resumed = _prepared(), _prepared()
    _finetune(plain, None)
    before = signal.signal(signal.SIGTERM, leave)
    try:
        with pytest.raises(Interrupted):
            _finetune(_prepared(), tmp_path, _terminating(9))
        assert signal.getsignal(signal.SIGTERM) is leave
    finally:
        signal.signal(signal.SIGTERM, before)
    assert _files(tmp_path) == [f"step-{n:09d}.safetensors" for n in (8, 10)]
    _finetune(resumed, tmp_path)
    _assert_same(plain, resumed)


def test_a_handler_that_returns_lets_the_run_go_on(
    tmp_path: Path, terminated: list[int]
) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    assert _finetune(_prepared(), tmp_path, _terminating(9)).steps == STEPS
    assert terminated == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is handler


def test_without_a_checkpoint_the_handler_is_not_touched(
    terminated: list[int],
) -> None:
    seen: list[int] = []

    def happens() -> None:
        signal.raise_signal(signal.SIGTERM)
        seen.extend(terminated)

    _finetune(_prepared(), None, _Watched(3, happens))
    assert seen == [signal.SIGTERM]  # at once


def test_sigterm_after_an_error_is_not_lost(
    tmp_path: Path, terminated: list[int]
) -> None:
    def batches() -> Iterator[Tensor]:
        yield from _batches()
        signal.raise_signal(signal.SIGTERM)
        raise Interrupted

    with pytest.raises(Interrupted):
        _finetune(_prepared(), tmp_path, batches())
    assert terminated == [signal.SIGTERM]
