"""A captured model lives on: copies, files, hooks, other dtypes and devices."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdnsq_fx.capture.capture import capture

_X = torch.randint(0, 9, (3, 6))


class _Net(nn.Module):
    """Factories, tied weights, a module under two names, a head in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 4)
        self.norm = nn.LayerNorm(4)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Dropout(0.2))
        self.again = self.body
        self.decoder = nn.Linear(4, 9, bias=False)
        self.decoder.weight = self.words.weight
        self.aux = nn.Linear(4, 2)
        self.register_buffer("scale", torch.rand(4), persistent=False)

    def forward(self, ids: Tensor) -> Any:
        x = self.words(ids)
        batch, length, width = x.shape
        x = x + torch.arange(length, device=x.device)[:, None]
        x = torch.cat([x.new_zeros(batch, 1, width), x], dim=1)
        mask = torch.ones(length + 1, length + 1, device=ids.device).tril().bool()
        x = F.scaled_dot_product_attention(x, x, x, attn_mask=mask)
        x = self.again(self.body(self.norm(x))) * self.scale
        logits = self.decoder(x)
        return (logits, self.aux(x)) if self.training else logits


@pytest.mark.parametrize("times", [1, 2])
def test_a_deep_copy(times: int, agree: Any) -> None:
    model = _Net()
    captured = capture(model, (_X,), {})
    for _ in range(times):
        captured = copy.deepcopy(captured)
    assert captured.decoder.weight is captured.words.weight
    assert captured.again is captured.body
    for training in (False, True):
        agree(model, captured, (_X,), {}, training)


def test_a_copy_shares_nothing() -> None:
    captured = capture(_Net().eval(), (_X,), {})
    wanted, twin = captured(_X), copy.deepcopy(captured)
    with torch.no_grad():
        for tensor in (*twin.parameters(), *twin.buffers()):
            tensor.zero_()
    assert torch.equal(captured(_X), wanted) and not twin(_X).any()


def test_state_through_a_file(agree: Any) -> None:
    other, captured = _Net(), capture(_Net(), (_X,), {})
    file = io.BytesIO()
    torch.save(captured.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    other.scale = captured.scale.clone()
    agree(other, captured, (_X,), {}, False)
    captured.load_state_dict(_Net().state_dict())
    assert not torch.equal(captured.eval()(_X), other(_X))


def test_pickling_the_captured_model(agree: Any) -> None:
    model = _Net()
    again = pickle.loads(pickle.dumps(capture(model, (_X,), {})))
    for training in (False, True):
        agree(model, again, (_X,), {}, training)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_another_dtype(dtype: torch.dtype, agree: Any) -> None:
    model = _Net()
    captured = capture(model, (_X,), {}).to(dtype=dtype)
    agree(model.to(dtype), captured, (_X,), {}, False)
    agree(model, captured, (_X,), {}, True)


@pytest.mark.parametrize("training", [False, True])
def test_another_device(training: bool) -> None:
    captured = capture(_Net(), (_X,), {}).train(training).to("meta")
    found = captured(_X.to("meta"))
    assert all(t.is_meta for t in (found if training else [found]))


def test_a_model_captured_on_another_device() -> None:
    captured = capture(_Net().eval().to("meta"), (_X.to("meta"),), {})
    captured = captured.to_empty(device="cpu")
    captured.load_state_dict(_Net().state_dict())
    assert captured(_X).device.type == "cpu"


def test_other_sizes(agree: Any) -> None:
    model = _Net()
    captured = capture(model, (_X,), {})
    for shape in ((1, 6), (2, 3), (5, 8)):
        for training in (False, True):
            agree(model, captured, (torch.randint(0, 9, shape),), {}, training)


def test_parameters_are_trained_where_they_are(agree: Any) -> None:
    """One step of an optimizer on each leaves the same weights."""
    model = _Net().eval()
    captured = capture(model, (_X,), {})
    for module in (model, captured):
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        module(_X).square().mean().backward()
        optimizer.step()
    agree(model, captured, (_X,), {}, False)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(captured.get_parameter(name), parameter)


# --- hooks ------------------------------------------------------------------------


def test_hooks_on_leaves_still_fire(same: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    calls: list[str] = []
    model[0].register_forward_pre_hook(lambda m, args: (args[0] * 2.0,))
    model[0].register_forward_hook(lambda m, args, out: calls.append("hook") or out + 1)
    captured = same(model, torch.randn(2, 4))
    calls.clear()
    captured(torch.randn(2, 4))
    assert calls == ["hook"]


def test_hooks_on_modules_that_are_opened(same: Any) -> None:
    inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    inner.register_forward_hook(lambda m, args, out: out * 3.0)
    same(nn.Sequential(inner, nn.Linear(4, 2)), torch.randn(2, 4))


def test_hooks_on_the_model_itself(same: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model.register_forward_pre_hook(lambda m, args: (args[0] - 1.0,))
    model.register_forward_hook(lambda m, args, out: {"out": out})
    same(model, torch.randn(2, 4))


def test_hooks_added_later_fire() -> None:
    captured = capture(nn.Sequential(nn.Linear(4, 4)), (torch.randn(2, 4),), {})
    calls: list[int] = []
    captured.get_submodule("0").register_forward_hook(lambda *_: calls.append(1))
    captured(torch.randn(2, 4))
    assert calls == [1]
