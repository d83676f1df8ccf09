"""Attention and transformers of torch, in every setting, equal eager."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdnsq_fx.capture.capture import capture

_PADDED = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
_CAUSAL = torch.ones(5, 5).triu(1).bool()


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Torch warns of masks and settings that keep it off its fast path."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def _float(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(mask, float("-inf"))


class _Self(nn.Module):
    """Self-attention with fixed keyword arguments."""

    def __init__(self, settings: dict[str, Any], call: dict[str, Any]) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, **settings)
        self.call = call

    def forward(self, x: Tensor) -> Any:
        return self.attention(x, x, x, **self.call)


_SETTINGS: dict[str, dict[str, Any]] = {
    "sequence first": {},
    "batch first": {"batch_first": True},
    "without bias": {"bias": False},
    "bias of keys and values": {"add_bias_kv": True},
    "zero attention": {"add_zero_attn": True},
    "dropout": {"dropout": 0.5},
}
_CALLS: dict[str, dict[str, Any]] = {
    "weights": {},
    "no weights": {"need_weights": False},
    "weights of heads": {"average_attn_weights": False},
    "causal": {"attn_mask": _float(_CAUSAL), "is_causal": True, "need_weights": False},
}


@pytest.mark.parametrize(
    ("setting", "call"),
    [
        *product(_SETTINGS, ("weights", "no weights")),
        *product(["batch first"], ("weights of heads", "causal")),
    ],
)
def test_self_attention(setting: str, call: str, same: Any) -> None:
    model = _Self(_SETTINGS[setting], _CALLS[call])
    batch_first = _SETTINGS[setting].get("batch_first", False)
    shapes = ((2, 5, 8), (3, 5, 8)) if batch_first else ((5, 2, 8), (5, 3, 8))
    x, other = (torch.randn(shape) for shape in shapes)
    same(model, x, others=((other,),))


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("mask", [None, _CAUSAL, _float(_CAUSAL)])
@pytest.mark.parametrize("padding", [None, _PADDED])
def test_masks(
    mask: Tensor | None, padding: Tensor | None, need_weights: bool, same: Any
) -> None:
    if padding is not None and mask is not None and mask.is_floating_point():
        padding = _float(padding)
    call = {"attn_mask": mask, "key_padding_mask": padding}
    model = _Self({"batch_first": True}, {**call, "need_weights": need_weights})
    same(model, torch.randn(2, 5, 8))


def test_masks_as_inputs(same: Any) -> None:
    model = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 5, 8)
    causal = torch.ones(7, 7).triu(1).bool()
    longer = {name: torch.randn(3, 7, 8) for name in ("query", "key", "value")}
    same(
        model,
        query=x,
        key=x,
        value=x,
        attn_mask=_CAUSAL,
        key_padding_mask=_PADDED,
        others=(
            {**longer, "attn_mask": causal, "key_padding_mask": torch.eye(3, 7) > 0},
        ),
    )


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("settings", [{}, {"kdim": 6, "vdim": 4}])
def test_cross_attention(
    settings: dict[str, int], batch_first: bool, same: Any
) -> None:
    model = nn.MultiheadAttention(8, 2, batch_first=batch_first, **settings)

    def example(batch: int, queries: int, keys: int) -> tuple[Tensor, ...]:
        sizes = ((queries, 8), (keys, model.kdim), (keys, model.vdim))
        found = (torch.randn(batch, *size) for size in sizes)
        return tuple(x if batch_first else x.transpose(0, 1) for x in found)

    same(model, *example(2, 5, 3), others=(example(3, 5, 3), example(2, 4, 7)))


def test_attention_without_a_batch(same: Any) -> None:
    same(_Self({}, {}), torch.randn(5, 8), others=((torch.randn(7, 8),),))


def test_attention_is_opened(operations: Any) -> None:
    """Its projections and products are visible to passes."""
    captured = capture(_Self({"batch_first": True}, {}), (torch.randn(2, 5, 8),), {})
    called = operations(captured)
    assert "MultiheadAttention" not in called
    assert "linear" in {name.lower() for name in called}
    assert "attention.in_proj_weight" in captured.state_dict()


@pytest.mark.parametrize(
    "settings",
    [{}, {"is_causal": True}, {"scale": 0.1}, {"dropout_p": 0.5}, {"attn_mask": True}],
    ids=str,
)
def test_scaled_dot_product_attention(settings: dict[str, Any], same: Any) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x: Tensor) -> Tensor:
            b, t, c = x.shape
            q, k, v = self.qkv(x).reshape(b, t, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
            chosen = dict(settings)
            if "dropout_p" in chosen and not self.training:
                chosen["dropout_p"] = 0.0
            if "attn_mask" in chosen:
                chosen["attn_mask"] = torch.ones(t, t, dtype=torch.bool).tril()
            y = F.scaled_dot_product_attention(q, k, v, **chosen)
            return y.transpose(1, 2).reshape(b, t, c)

    others = ((torch.randn(3, 7, 8),),)
    same(Attention(), torch.randn(2, 5, 8), others=others)


# --- transformers -----------------------------------------------------------------

_SMALL: dict[str, Any] = {"d_model": 8, "nhead": 2, "dim_feedforward": 8}


def _encoder(**settings: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(**{**_SMALL, **settings})
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_first": True},
        {"batch_first": False},
        {"batch_first": True, "norm_first": True, "activation": "gelu"},
        {"batch_first": True, "bias": False, "activation": F.silu},
    ],
    ids=str,
)
def test_encoder(settings: dict[str, Any], same: Any) -> None:
    others = ((torch.randn(3, 5, 8),), (torch.randn(2, 7, 8),))
    same(_encoder(**settings), torch.randn(2, 5, 8), others=others)


def test_encoder_with_masks(same: Any) -> None:
    model = _encoder(batch_first=True)
    x = torch.randn(2, 5, 8)
    same(model, x, mask=_CAUSAL)
    same(model, x, mask=_float(_CAUSAL), is_causal=True)
    same(model, x, src_key_padding_mask=_PADDED)


@pytest.mark.parametrize("nested", [False, True])
def test_encoder_on_its_fast_path(nested: bool) -> None:
    """In evaluation without gradients torch fuses a layer, and may drop padding."""
    layer = nn.TransformerEncoderLayer(**_SMALL, batch_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=nested).eval()
    x = torch.randn(2, 5, 8)
    captured = capture(model, (x,), {"src_key_padding_mask": _PADDED}).eval()
    with torch.no_grad():
        wanted = model(x, src_key_padding_mask=_PADDED)
        got = captured(x, src_key_padding_mask=_PADDED)
    kept = ~_PADDED
    torch.testing.assert_close(got[kept], wanted[kept])


def test_decoder(same: Any) -> None:
    layer = nn.TransformerDecoderLayer(**_SMALL, batch_first=True)
    model = nn.TransformerDecoder(layer, 1, norm=nn.LayerNorm(8))
    target, memory = torch.randn(2, 5, 8), torch.randn(2, 3, 8)
    others = ((torch.randn(4, 5, 8), torch.randn(4, 6, 8)),)
    same(model, target, memory, tgt_mask=_float(_CAUSAL), others=others)
    same(model, target, memory, memory_key_padding_mask=torch.eye(2, 3).bool())


@pytest.mark.parametrize("batch_first", [False, True])
def test_whole_transformer(batch_first: bool, same: Any) -> None:
    model = nn.Transformer(
        num_encoder_layers=1, num_decoder_layers=1, batch_first=batch_first, **_SMALL
    )
    shapes = ((2, 3, 8), (2, 5, 8)) if batch_first else ((3, 2, 8), (5, 2, 8))
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    same(model, *map(torch.randn, shapes), tgt_mask=mask, tgt_is_causal=True)
