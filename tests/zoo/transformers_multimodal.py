"""Models of transformers that read and see at once."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers_recipe import (
    INITIAL,
    LAYERS,
    TEXT,
    VISION,
    VOCABULARY,
    Recipe,
    ids,
    recipe,
    tokens,
    tokens_in_boxes,
)

from gdnsq_fx.inputs import ExampleInput

_TWO_TOWERS = "CLIPModel SiglipModel ChineseCLIPModel AltCLIPModel"
_PAIR: dict[str, Any] = {
    **INITIAL,
    "text_config": TEXT,
    "vision_config": VISION,
    "projection_dim": 16,
}
_IMAGE_TOKEN = VOCABULARY - 1


def _captioned(batch: int) -> dict[str, Any]:
    return {**tokens(batch), "pixel_values": torch.randn(batch, 3, 32, 32)}


def _captioned_64(batch: int) -> ExampleInput:
    return {**tokens(batch), "pixel_values": torch.randn(batch, 3, 64, 64)}


def _document(batch: int) -> ExampleInput:
    pixel_values = torch.randn(batch, 3, 32, 32)
    return {**tokens_in_boxes(batch), "pixel_values": pixel_values}


def _image_in_text(batch: int) -> ExampleInput:
    """Sixteen places for patches of the image, then text without such places."""
    image = torch.full((batch, 16), _IMAGE_TOKEN)
    text = ids(batch, 6).clamp(max=_IMAGE_TOKEN - 1)
    return {
        "input_ids": torch.cat([image, text], 1),
        "attention_mask": torch.ones(batch, 22, dtype=torch.long),
        "pixel_values": torch.randn(batch, 3, 32, 32),
    }


def _regions(batch: int) -> ExampleInput:
    return {
        **tokens(batch),
        "visual_feats": torch.randn(batch, 5, 16),
        "visual_pos": torch.rand(batch, 5, 4),
    }


def _visual_embeds(batch: int) -> ExampleInput:
    return {**tokens(batch), "visual_embeds": torch.randn(batch, 5, 16)}


def _inputs(batch: int) -> ExampleInput:
    return {"inputs": ids(batch)}


_pair = partial(recipe, example=_captioned, base=_PAIR)

RECIPES: tuple[Recipe, ...] = (
    *(_pair(name) for name in _TWO_TOWERS.split()),
    _pair("BlipForImageTextRetrieval", variant="retrieval"),
    _pair("BlipForConditionalGeneration", variant="caption"),
    _pair("OwlViTForObjectDetection", projection_dim=32),
    _pair(
        "CLIPSegForImageSegmentation",
        extract_layers=[0, 1],
        reduce_dim=16,
        decoder_intermediate_size=32,
    ),
    _pair(
        "AlignModel",
        example=_captioned_64,
        vision_config={
            "width_coefficient": 0.25,
            "depth_coefficient": 0.2,
            "hidden_dim": 320,
        },
        projection_dim=80,
    ),
    _pair(
        "GroupViTModel",
        vision_config={
            **VISION,
            "depths": [1, 1, 1],
            "num_hidden_layers": 3,
            "num_group_tokens": [4, 2, 0],
            "num_output_groups": [4, 2, 0],
        },
        projection_intermediate_dim=32,
    ),
    _pair(
        "FlavaModel",
        vision_config=None,
        image_config=VISION,
        multimodal_config=LAYERS,
        hidden_size=32,
    ),
    recipe("ViltForQuestionAnswering", example=_captioned, base={**TEXT, **VISION}),
    recipe("GitForCausalLM", example=_captioned, base=TEXT, vision_config=VISION),
    recipe(
        "LayoutLMv3ForTokenClassification",
        example=_document,
        base={**TEXT, **VISION},
        input_size=32,
        coordinate_size=6,
        shape_size=4,
    ),
    recipe(
        "LxmertModel",
        example=_regions,
        base=TEXT,
        num_hidden_layers=None,
        l_layers=1,
        x_layers=1,
        r_layers=1,
        visual_feat_dim=16,
    ),
    recipe(
        "VisualBertModel", example=_visual_embeds, base=TEXT, visual_embedding_dim=16
    ),
    recipe(
        "LlavaForConditionalGeneration",
        example=_image_in_text,
        base={},
        text_config={**TEXT, "model_type": "llama", "num_key_value_heads": 2},
        vision_config={**VISION, "model_type": "clip_vision_model"},
        image_token_index=_IMAGE_TOKEN,
        vision_feature_layer=-1,
    ),
    recipe(
        "PerceiverForSequenceClassification",
        example=_inputs,
        base=INITIAL,
        vocab_size=VOCABULARY,
        max_position_embeddings=12,
        d_model=32,
        d_latents=32,
        num_latents=8,
        num_self_attends_per_block=2,
        num_self_attention_heads=4,
        num_cross_attention_heads=4,
    ),
)
