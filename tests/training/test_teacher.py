"""Teachers that are fast, and data that carries what they answer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import gdnsq_fx
from gdnsq_fx.errors import BatchStructureError, ConfigError

STEPS = 6


def _batches() -> list[Tensor]:
    return list(torch.randn(3, 8, 6, generator=torch.Generator().manual_seed(0)))


class _Asked(nn.Sequential):
    """Counts calls, and notes how it was called."""

    calls = 0
    inference = False

    def forward(self, x: Tensor) -> Tensor:
        """Class logits ``[B, 3]``."""
        self.calls += 1
        self.inference = torch.is_inference_mode_enabled()
        return super().forward(x)


def _models() -> tuple[_Asked, GraphModule]:
    torch.manual_seed(0)
    model = _Asked(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    config = gdnsq_fx.QuantConfig(2, 2, first_last=None)
    qmodel = gdnsq_fx.prepare(model, _batches()[0], config, _batches())
    model.calls = 0
    return model, qmodel


def _tuned(qmodel: GraphModule, **options: object) -> dict[str, Tensor]:
    qmodel = copy.deepcopy(qmodel)
    gdnsq_fx.finetune(qmodel, steps=STEPS, progress=False, **options)  # type: ignore[arg-type]
    return dict(qmodel.state_dict())


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in other)


def test_a_fast_teacher_teaches_the_same_and_is_asked_once_a_batch() -> None:
    model, qmodel = _models()
    plain = _tuned(qmodel, train_batches=_batches(), teacher=model)
    assert not model.inference  # what a model of a user keeps must stay trainable
    model.calls = 0
    teacher = gdnsq_fx.Teacher(model)
    fast = _tuned(qmodel, train_batches=_batches(), teacher=teacher)
    assert (model.calls, model.inference) == (STEPS, True)
    assert _equal(fast, plain)


def test_its_outputs_are_ordinary_tensors() -> None:
    model, _ = _models()
    output = gdnsq_fx.Teacher(model)(_batches()[0])
    assert not output.is_inference()
    (output * torch.ones(3, requires_grad=True)).sum().backward()


def test_a_narrow_teacher_answers_in_float32() -> None:
    model, _ = _models()
    x = _batches()[0]
    output = gdnsq_fx.Teacher(model, autocast="bfloat16")(x)
    assert output.dtype is torch.float32
    assert torch.equal(output, output.bfloat16().float())
    assert torch.allclose(output, model(x), atol=0.05)


def test_a_compiled_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[object] = []

    def compile_(function: object) -> object:
        compiled.append(function)
        return function

    monkeypatch.setattr(torch, "compile", compile_)
    model, _ = _models()
    teacher = gdnsq_fx.Teacher(model, compile=True)
    x = _batches()[0]
    assert len(compiled) == 1
    assert torch.equal(teacher(x), model(x))
    assert teacher.state_dict().keys() == {f"model.{k}" for k in model.state_dict()}


def test_fixed_data_need_the_teacher_but_once() -> None:
    model, qmodel = _models()
    wanted = _tuned(qmodel, train_batches=_batches(), teacher=model)
    model.calls = 0
    pairs = gdnsq_fx.with_teacher_outputs(model, _batches())
    assert model.calls == len(pairs) == len(_batches())
    found = _tuned(
        qmodel,
        train_batches=pairs,
        task_loss=gdnsq_fx.distillation_loss,
        distillation=0.0,
    )
    assert model.calls == len(pairs)
    assert _equal(found, wanted)


def test_its_mode_is_given_back() -> None:
    model, _ = _models()
    model.train()
    gdnsq_fx.with_teacher_outputs(model, _batches())
    assert model.training


def test_no_batches_and_wrong_batches() -> None:
    model, _ = _models()
    with pytest.raises(ConfigError, match="at least one batch"):
        gdnsq_fx.with_teacher_outputs(model, [])
    with pytest.raises(BatchStructureError):
        gdnsq_fx.with_teacher_outputs(model, [3])
