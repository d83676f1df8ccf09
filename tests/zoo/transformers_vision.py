"""Backbones and classifiers of images and videos of transformers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from transformers_recipe import INITIAL, STAGES, SWIN, VISION, Recipe, pixels, recipe

from gdnsq_fx.inputs import ExampleInput

# Vision transformers that need nothing but the common settings.
_PLAIN = """
    ViTForImageClassification DeiTForImageClassification BeitForImageClassification
    Dinov2ForImageClassification DINOv3ViTModel ViTMSNForImageClassification
    IJepaForImageClassification Data2VecVisionForImageClassification
"""
_FOUR_STAGES = """
    ConvNextForImageClassification ConvNextV2ForImageClassification
    PoolFormerForImageClassification
"""
_SHIFTED_WINDOWS = """
    SwinForImageClassification Swinv2ForImageClassification
    DonutSwinForImageClassification
"""


def _video(name: str = "pixel_values") -> Callable[[int], ExampleInput]:
    return lambda batch: {name: torch.randn(batch, 4, 3, 32, 32)}


def _with_noise(batch: int) -> ExampleInput:
    """With what says which patches are masked: else the model draws it."""
    images = torch.randn(batch, 3, 32, 32)
    return {"pixel_values": images, "noise": torch.rand(batch, 16)}


_plain = partial(recipe, example=pixels(32), base=VISION)
_clip = partial(recipe, example=_video(), base=VISION)
_staged = partial(recipe, example=pixels(64), base=STAGES)
_other = partial(recipe, example=pixels(64), base=INITIAL)

RECIPES: tuple[Recipe, ...] = (
    *(_plain(name) for name in _PLAIN.split()),
    _plain(
        "ViTMAEForPreTraining",
        example=_with_noise,
        decoder_hidden_size=32,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=64,
    ),
    _clip("VideoMAEForVideoClassification", num_frames=4),
    _clip("TimesformerForVideoClassification", num_frames=4),
    _clip("VivitForVideoClassification", num_frames=4, tubelet_size=[2, 8, 8]),
    _clip(
        "VJEPA2ForVideoClassification",
        example=_video("pixel_values_videos"),
        crop_size=32,
        frames_per_clip=4,
        pred_hidden_size=24,
        pred_num_attention_heads=2,
        pred_num_hidden_layers=1,
        num_pooler_layers=1,
    ),
    *(_staged(name) for name in _FOUR_STAGES.split()),
    _staged("ResNetForImageClassification", embedding_size=8),
    _staged("RegNetForImageClassification", embedding_size=8, groups_width=8),
    _staged("BitForImageClassification", embedding_size=8, num_groups=4),
    _staged("PvtForImageClassification", num_attention_heads=[1, 2, 2, 4]),
    _staged("PvtV2ForImageClassification", num_attention_heads=[1, 2, 2, 4]),
    _staged("FocalNetForImageClassification", embed_dim=8),
    _staged(
        "HieraForImageClassification",
        image_size=[64, 64],
        embed_dim=8,
        num_heads=[1, 2, 2, 4],
    ),
    _staged("SwiftFormerForImageClassification", embed_dims=[8, 16, 24, 32]),
    *(recipe(name, example=pixels(64), base=SWIN) for name in _SHIFTED_WINDOWS.split()),
    _other(
        "LevitForImageClassification",
        example=pixels(128),
        image_size=128,
        hidden_sizes=[16, 32, 48],
        num_attention_heads=[2, 2, 4],
        depths=[1, 1, 1],
        key_dim=[8, 8, 8],
    ),
    _other(
        "CvtForImageClassification",
        embed_dim=[8, 16, 32],
        num_heads=[1, 2, 4],
        depth=[1, 2, 3],
    ),
    _other(
        "MobileViTForImageClassification",
        example=pixels(96),
        image_size=96,
        hidden_sizes=[16, 24, 32],
        neck_hidden_sizes=[8, 8, 16, 16, 24, 24, 32],
    ),
    _other("MobileViTV2ForImageClassification", width_multiplier=0.5),
    _other("MobileNetV1ForImageClassification", depth_multiplier=0.25),
    _other("MobileNetV2ForImageClassification", depth_multiplier=0.35),
    _other(
        "EfficientNetForImageClassification",
        width_coefficient=0.25,
        depth_coefficient=0.2,
        hidden_dim=320,
    ),
)
