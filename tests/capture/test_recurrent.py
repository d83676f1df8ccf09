"""Recurrent layers in every setting, packed sequences and cells equal eager."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
)

_LAYERS: dict[str, dict[str, Any]] = {
    "one layer": {},
    "batch first": {"batch_first": True},
    "two layers": {"num_layers": 2},
    "bidirectional": {"bidirectional": True},
    "dropout": {"num_layers": 2, "dropout": 0.5},
    "without bias": {"bias": False},
    "all": {
        "num_layers": 2,
        "bidirectional": True,
        "dropout": 0.3,
        "batch_first": True,
    },
}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [*product([nn.LSTM], _LAYERS), *product([nn.GRU, nn.RNN], ("one layer", "all"))],
)
def test_layers(kind: Any, settings: str, same: Any) -> None:
    model = kind(4, 3, **_LAYERS[settings])
    others = ((torch.randn(3, 6, 4),), (torch.randn(4, 2, 4),))
    same(model, torch.randn(3, 2, 4), others=others)


def test_projections_and_other_nonlinearities(same: Any) -> None:
    x = torch.randn(5, 2, 4)
    same(nn.LSTM(4, 3, proj_size=2), x)
    same(nn.RNN(4, 3, nonlinearity="relu"), x)
    same(nn.GRU(4, 3), x[:, 0])


class _Tagger(nn.Module):
    """The usual model: embedding, recurrent layer, a head on the last state."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 4)
        self.rnn = kind(4, 3, batch_first=True)
        self.head = nn.Linear(3, 2)

    def forward(self, ids: Tensor, state: Any = None) -> Any:
        y, state = self.rnn(self.words(ids), state)
        last = state[0] if isinstance(state, tuple) else state
        return self.head(y), self.head(last[-1]), state


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_states_are_taken_and_returned(kind: Any, same: Any) -> None:
    model = _Tagger(kind)
    ids = torch.randint(0, 9, (2, 5))
    same(model, ids, others=((torch.randint(0, 9, (3, 7)),),))
    state = torch.randn(1, 2, 3)
    given = (state, torch.randn(1, 2, 3)) if kind is nn.LSTM else state
    same(model, ids, given)


class _Packed(nn.Module):
    """Packs, runs, pads again."""

    def __init__(self, kind: Any, **settings: Any) -> None:
        super().__init__()
        self.rnn = kind(4, 3, batch_first=True, **settings)
        self.head = nn.Linear(3 * (1 + self.rnn.bidirectional), 2)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        packed = pack_padded_sequence(
            x, lengths, batch_first=True, enforce_sorted=False
        )
        packed, _ = self.rnn(packed)
        y, lengths = pad_packed_sequence(
            packed, batch_first=True, total_length=x.shape[1]
        )
        return self.head(y), lengths


@pytest.mark.parametrize("settings", [{}, {"bidirectional": True, "num_layers": 2}])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_packed_sequences(kind: Any, settings: dict[str, Any], same: Any) -> None:
    x = torch.randn(3, 6, 4)
    others = (
        (x, torch.tensor([1, 4, 6])),
        (torch.randn(2, 8, 4), torch.tensor([8, 2])),
    )
    same(_Packed(kind, **settings), x, torch.tensor([6, 2, 5]), others=others)


def test_a_packed_sequence_as_input_and_output(same: Any) -> None:
    class Runs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(4, 3)

        def forward(self, packed: PackedSequence) -> PackedSequence:
            return self.rnn(packed)[0]

    packed = pack_sequence([torch.randn(n, 4) for n in (5, 3, 2)])
    captured = same(Runs(), packed)
    assert isinstance(captured(packed), PackedSequence)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells(kind: Any, same: Any) -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = kind(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            state = None
            found = []
            for step in x.unbind(1):
                state = self.cell(step, state)
                found.append(state[0] if isinstance(state, tuple) else state)
            return torch.stack(found, dim=1)

    same(Steps(), torch.randn(2, 3, 4), others=((torch.randn(5, 3, 4),),))


def test_a_cell_with_a_state_made_in_forward(same: Any) -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.LSTMCell(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.zeros(x.size(0), self.cell.hidden_size, device=x.device)
            c = torch.zeros_like(h)
            for t in range(x.size(1)):
                h, c = self.cell(x[:, t], (h, c))
            return h

    same(Steps(), torch.randn(2, 3, 4), others=((torch.randn(5, 3, 4),),))
