"""The networks that `qat_overhead.py` trains, each with inputs and targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.models import mobilenet_v3_large, resnet18
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 512
TOKENS = 128


@dataclass(frozen=True)
class Network:
    """A network and what it is trained on.

    Attributes:
        name: as printed.
        build: makes it, with random weights.
        batch: number of samples -> its input.
        samples: in a batch of the main table.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[int], Tensor]
    samples: int


class Logits(nn.Module):
    """A causal language model that returns its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[batch * tokens, vocabulary]`` of token numbers."""
        output: Any = self.model(input_ids=tokens, use_cache=False)
        return output.logits.flatten(0, 1)


def images(count: int, pixels: int = 112) -> Tensor:
    """Random images ``[count, 3, pixels, pixels]``."""
    return torch.randn(count, 3, pixels, pixels)


def tokens(count: int) -> Tensor:
    """Random token numbers ``[count, TOKENS]``."""
    return torch.randint(VOCABULARY, (count, TOKENS))


def vit_small() -> nn.Module:
    """ViT-S for images of 112 pixels: 22 million parameters, 49 patches."""
    return VisionTransformer(img_size=112, embed_dim=384, depth=12, num_heads=6)


def decoder(layers: int = 4) -> nn.Module:
    """A Llama of width 256."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=layers,
        num_attention_heads=4,
        attn_implementation="sdpa",
    )
    return Logits(LlamaForCausalLM(config))


NETWORKS = (
    Network("ResNet-18", resnet18, images, 16),
    Network("MobileNetV3-Large", mobilenet_v3_large, images, 16),
    Network("ViT-S", vit_small, images, 8),
    Network("decoder, 4 layers", decoder, tokens, 8),
)
