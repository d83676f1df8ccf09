"""Detection, segmentation, depth and super-resolution of transformers."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers_recipe import (
    INITIAL,
    LAYERS,
    SEQ2SEQ,
    STAGES,
    SWIN,
    VISION,
    Recipe,
    pixels,
    recipe,
)

from gdnsq_fx.inputs import ExampleInput

_RESNET: dict[str, Any] = {
    **STAGES,
    "model_type": "resnet",
    "embedding_size": 8,
    "out_features": ["stage4"],
}
_THREE_STAGES = {**_RESNET, "out_features": ["stage2", "stage3", "stage4"]}
_ALL_STAGES = {**_RESNET, "out_features": ["stage1", "stage2", "stage3", "stage4"]}
_SWIN: dict[str, Any] = {
    **SWIN,
    "model_type": "swin",
    "depths": [1, 1, 2, 1],
    "num_heads": [1, 2, 4, 4],
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
_DINO: dict[str, Any] = {
    **VISION,
    "model_type": "dinov2",
    "image_size": 28,
    "patch_size": 14,
    "num_hidden_layers": 4,
    "out_indices": [1, 2, 3, 4],
    "reshape_hidden_states": False,
}
_HGNET: dict[str, Any] = {
    "model_type": "hgnet_v2",
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 24, 32],
    "stem_channels": [3, 8, 8],
    "stage_in_channels": [8, 8, 16, 24],
    "stage_mid_channels": [8, 8, 8, 8],
    "stage_out_channels": [8, 16, 24, 32],
    "stage_num_blocks": [1, 1, 1, 1],
    "stage_numb_of_layers": [2, 2, 2, 2],
    "out_features": ["stage2", "stage3", "stage4"],
}
_DETR: dict[str, Any] = {
    **SEQ2SEQ,
    "num_queries": 5,
    "num_labels": 4,
    "backbone_config": _RESNET,
}
_RT_DETR: dict[str, Any] = {
    **_DETR,
    "num_hidden_layers": None,
    "encoder_hidden_dim": 32,
    "encoder_in_channels": [16, 24, 32],
    "decoder_in_channels": [32, 32, 32],
    "encoder_layers": 1,
    "num_denoising": 0,
}
_SAM: dict[str, Any] = {
    "vision_config": {
        **LAYERS,
        "image_size": 64,
        "patch_size": 16,
        "output_channels": 16,
        "num_pos_feats": 8,
        "window_size": 2,
        "global_attn_indexes": [1],
    },
    "prompt_encoder_config": {
        "hidden_size": 16,
        "image_size": 64,
        "mask_input_channels": 4,
    },
    "mask_decoder_config": {
        "hidden_size": 16,
        "mlp_dim": 32,
        "num_attention_heads": 2,
        "iou_head_hidden_dim": 16,
    },
}


def _image_and_point(batch: int) -> ExampleInput:
    points = torch.rand(batch, 1, 1, 2) * 64
    return {"pixel_values": torch.randn(batch, 3, 64, 64), "input_points": points}


_plain = partial(recipe, example=pixels(32), base=VISION)
_staged = partial(
    recipe,
    example=pixels(64),
    base={**STAGES, "num_attention_heads": [1, 2, 2, 4], "decoder_hidden_size": 16},
)
_detr = partial(recipe, example=pixels(64), base=_DETR)
_rt_detr = partial(recipe, example=pixels(64), base=_RT_DETR)
_other = partial(recipe, example=pixels(64), base=INITIAL)

RECIPES: tuple[Recipe, ...] = (
    _plain("YolosForObjectDetection", num_detection_tokens=5, image_size=[32, 32]),
    _detr("DetrForObjectDetection"),
    _detr("ConditionalDetrForObjectDetection"),
    _detr(
        "DeformableDetrForObjectDetection",
        backbone_config=_THREE_STAGES,
        max_position_embeddings=None,
    ),
    _rt_detr(
        "RTDetrForObjectDetection",
        backbone_config={**_THREE_STAGES, "model_type": "rt_detr_resnet"},
    ),
    _rt_detr("DFineForObjectDetection", backbone_config=_HGNET),
    _plain(
        "DPTForSemanticSegmentation",
        num_hidden_layers=4,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[16, 16, 16, 16],
        fusion_hidden_size=16,
    ),
    _staged("SegformerForSemanticSegmentation"),
    _staged("GLPNForDepthEstimation"),
    _other(
        "DepthAnythingForDepthEstimation",
        example=pixels(28),
        backbone_config=_DINO,
        reassemble_hidden_size=32,
        neck_hidden_sizes=[8, 16, 24, 32],
        fusion_hidden_size=16,
        head_hidden_size=8,
    ),
    _other(
        "UperNetForSemanticSegmentation",
        backbone_config=_ALL_STAGES,
        hidden_size=16,
        auxiliary_in_channels=24,
        auxiliary_channels=8,
        num_labels=4,
    ),
    _other(
        "Mask2FormerForUniversalSegmentation",
        backbone_config=_SWIN,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=64,
        encoder_layers=2,
        decoder_layers=3,
        num_attention_heads=4,
        dim_feedforward=64,
        num_queries=5,
    ),
    _other(
        "MaskFormerForInstanceSegmentation",
        backbone_config=_SWIN,
        decoder_config={**_DETR, "model_type": "detr"},
        fpn_feature_size=32,
        mask_feature_size=32,
    ),
    Recipe("SamModel", _image_and_point, _SAM),
    Recipe("Swin2SRForImageSuperResolution", pixels(32), {**SWIN, "image_size": 32}),
)
