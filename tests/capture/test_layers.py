"""Embeddings, computed weights, and modules that come late."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from gdnsq_fx.capture.capture import capture

_X, _LARGE = torch.randn(3, 4), torch.randn(5, 4)


# --- embeddings -------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer",
    [
        nn.Embedding(9, 4),
        nn.Embedding(9, 4, padding_idx=0, max_norm=1.0),
        nn.Embedding(9, 4, scale_grad_by_freq=True),
        nn.EmbeddingBag(9, 4),
        nn.EmbeddingBag(9, 4, mode="max"),
    ],
    ids=str,
)
def test_embeddings(layer: nn.Module, same: Any) -> None:
    others = ((torch.randint(0, 9, (4, 6)),),)
    same(
        nn.Sequential(layer, nn.Linear(4, 2)),
        torch.randint(0, 9, (2, 3)),
        others=others,
    )


def test_embedding_bags_with_offsets(same: Any) -> None:
    ids, offsets = torch.randint(0, 9, (7,)), torch.tensor([0, 2, 5])
    others = ((torch.randint(0, 9, (4,)), torch.tensor([0, 1])),)
    same(nn.EmbeddingBag(9, 4, mode="sum"), ids, offsets, others=others)


# --- weights that are computed ----------------------------------------------------


class _Symmetric(nn.Module):
    """A parametrization: a symmetric matrix from its upper triangle."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).transpose(-1, -2)


def _old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(nn.Linear(4, 4))


_COMPUTED: dict[str, Callable[[], nn.Module]] = {
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(4, 4)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(4, 4)),
    "own": lambda: _parametrized(nn.Linear(4, 4), _Symmetric()),
    "two": lambda: _parametrized(nn.Linear(4, 4), _Symmetric(), nn.Tanh()),
    "old weight norm": _old_weight_norm,
    "old spectral norm": lambda: nn.utils.spectral_norm(nn.Linear(4, 4)),
    "pruned": lambda: prune.l1_unstructured(nn.Linear(4, 4), "weight", amount=0.5),
}


def _parametrized(layer: nn.Module, *parametrizations: nn.Module) -> nn.Module:
    for one in parametrizations:
        parametrize.register_parametrization(layer, "weight", one)
    return layer


@pytest.mark.parametrize("case", _COMPUTED)
def test_computed_weights(case: str, same: Any) -> None:
    model = nn.Sequential(_COMPUTED[case](), nn.ReLU(), nn.Linear(4, 2))
    same(model, _X, others=((_LARGE,),), modes=(True, False, True))


def test_a_computed_weight_read_in_forward(same: Any) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = parametrizations.weight_norm(nn.Linear(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            with parametrize.cached():
                return F.linear(self.fc(x), self.fc.weight.t())

    same(Tied(), _X, others=((_LARGE,),))


# --- modules that come late -------------------------------------------------------


def test_lazy_modules() -> None:
    model = nn.Sequential(
        nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(2)
    )
    captured = capture(model, (torch.randn(2, 3, 6, 6),), {})
    assert captured(torch.randn(3, 3, 6, 6)).shape == (3, 2)
    assert captured.get_parameter("0.weight").shape == (4, 3, 3, 3)
    assert all(isinstance(p, nn.UninitializedParameter) for p in model.parameters())


def test_modules_built_in_forward(same: Any) -> None:
    class Builds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
            y = nn.LayerNorm(x.shape[-1:], elementwise_affine=False)(self.fc(x))
            y = nn.Dropout(0.5).train(self.training)(nn.Softmax(dim=-1)(y))
            shared = nn.Linear(4, 4, bias=False)
            shared.weight = self.fc.weight
            return shared(y), nn.CrossEntropyLoss()(y, target)

    others = ((_LARGE, torch.tensor([0, 1, 2, 3, 0])),)
    same(Builds(), _X, torch.tensor([0, 3, 1]), others=others)


def test_modules_built_on_the_first_call(same: Any) -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc: nn.Module | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.fc is None:
                self.fc = nn.Linear(x.shape[-1], 2)
            return self.fc(x)

    model = Late()
    captured = capture(model, (_X,), {})
    assert model.fc is None
    assert captured.get_parameter("fc.weight").shape == (2, 4)
    assert torch.equal(captured(_LARGE), captured.get_submodule("fc")(_LARGE))


def test_modules_outside_the_tree(same: Any) -> None:
    class Hides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = [nn.Linear(4, 4), {"act": nn.Tanh()}]

        def forward(self, x: Tensor) -> Tensor:
            return self.hidden[1]["act"](self.hidden[0](x))

    same(Hides(), _X, others=((_LARGE,),))


def test_a_module_under_two_names_is_one(same: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh())
    model.append(model[0])
    model.append(model[1])
    captured = same(model, _X, others=((_LARGE,),))
    assert captured.get_submodule("3") is captured.get_submodule("0")
