"""How one architecture of transformers is built, and the inputs that many share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from cases import Case
from torch import Tensor, nn

from gdnsq_fx.inputs import ExampleInput

VOCABULARY = 99
LENGTH = 12
# Weights of 0.02, the usual start, would leave attention with next to no influence on
# the outputs of so narrow a model; at 0.2 layers keep the size of what they read.
INITIAL = {"initializer_range": 0.2, "init_std": 0.2}
LAYERS: dict[str, Any] = {
    **INITIAL,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
TEXT: dict[str, Any] = {
    **LAYERS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Two layers of a decoder and, in most models, of an encoder, in the words of BART.
SEQ2SEQ: dict[str, Any] = {
    **TEXT,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "decoder_start_token_id": 1,
}
VISION: dict[str, Any] = {**LAYERS, "image_size": 32, "patch_size": 8}
STAGES: dict[str, Any] = {
    **INITIAL,
    "image_size": 64,
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 1, 2, 1],
}
SWIN: dict[str, Any] = {
    **INITIAL,
    "image_size": 64,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}


@dataclass(frozen=True)
class Recipe:
    """One architecture: a model class, settings of its config, inputs.

    Attributes:
        architecture: name of the class in `transformers`.
        example: inputs for a batch of so many samples.
        settings: arguments of the config; None leaves one out that its group has.
        variant: tells recipes of one architecture apart.
    """

    architecture: str
    example: Callable[[int], ExampleInput]
    settings: Mapping[str, Any]
    variant: str = ""

    def cases(self) -> list[Case]:
        """One case, or two where the model has more than one kind of attention."""
        model_class = getattr(transformers, self.architecture)
        family = model_class.config_class.model_type
        name = "-".join(filter(None, (f"transformers/{family}", self.variant)))
        has_both = model_class._supports_sdpa
        return [
            Case(
                name=f"{name}-{attention}" if has_both else name,
                family=family,
                library="transformers",
                build=partial(self.build, attention),
                example=self.example,
                note=self._note(),
            )
            for attention in (("eager", "sdpa") if has_both else ("eager",))
        ]

    def build(self, attention: str) -> nn.Module:
        """The model with one kind of attention."""
        model_class = getattr(transformers, self.architecture)
        kinds = {"": attention}
        if "backbone_config" in self.settings:  # those have none but their own
            kinds["backbone_config"] = "eager"
        return model_class(self._config(attn_implementation=kinds))

    def _config(self, **extra: Any) -> Any:
        config_class = getattr(transformers, self.architecture).config_class
        kept = {k: v for k, v in self.settings.items() if v is not None}
        return config_class(**kept, **extra)

    def _note(self) -> str:
        config = self._config()
        notes = {
            "use_cache": "returns its cache, as by default",
            "layerdrop": "drops whole layers at random in training",
            "encoder_layerdrop": "drops whole layers at random in training",
            "mask_time_prob": "masks its input through NumPy in training",
        }
        return "; ".join(text for k, text in notes.items() if getattr(config, k, None))


def recipe(
    architecture: str,
    *,
    example: Callable[[int], ExampleInput],
    base: Mapping[str, Any],
    variant: str = "",
    **settings: Any,
) -> Recipe:
    """A recipe whose settings start from those of a group."""
    return Recipe(architecture, example, {**base, **settings}, variant)


def ids(batch: int, length: int = LENGTH) -> Tensor:
    """Token ids without special ones."""
    return torch.randint(3, VOCABULARY, (batch, length))


def tokens(batch: int, length: int = LENGTH) -> dict[str, Any]:
    """Ids and a mask; the last sample is padded."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, -3:] = 0
    return {"input_ids": ids(batch, length), "attention_mask": mask}


def tokens_in_boxes(batch: int) -> dict[str, Any]:
    """Tokens of a page, each with the box that it fills."""
    corners = torch.randint(0, 50, (batch, LENGTH, 2))
    return {**tokens(batch), "bbox": torch.cat([corners, corners + 10], -1)}


def tokens_and_targets(batch: int) -> dict[str, Any]:
    """Inputs of an encoder and of a decoder."""
    return {**tokens(batch), "decoder_input_ids": ids(batch, 7)}


def pixels(size: int = 32) -> Callable[[int], ExampleInput]:
    """Square images."""
    return lambda batch: {"pixel_values": torch.randn(batch, 3, size, size)}
