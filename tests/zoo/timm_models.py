"""The smallest model of each module of timm, and more where one module holds several.

Inputs are 64 x 64, which leaves most models two by two pixels at the end, or the least
that a model takes. Giants lose depth; what they share with their siblings stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import timm
from cases import Case, image
from timm.layers import set_fused_attn, use_fused_attn
from torch import nn

Settings = dict[str, Any]

PLAIN = """
    eca_botnext26ts_256 lambda_resnet26t lambda_resnet26rpt_256
    test_byobnet mobileone_s1 repvgg_a0 gernet_s resnext26ts gcresnext26ts
    eca_resnext26ts
    cait_xxs24_224 coat_tiny coat_lite_tiny convit_tiny convmixer_768_32
    test_convnext test_convnext2 test_convnext3 convnextv2_atto convnext_atto_ols
    convnext_atto_rms cpubone_nano cpubone_b1_dwnorm csatv2
    cs3darknet_focus_s cs3darknet_s cspresnet50 cspdarknet53 darknetaa53 cspnext_tiny
    davit_tiny deit_tiny_patch16_224 deit_tiny_distilled_patch16_224
    deit3_small_patch16_224 densenet121 densenetblur121d
    dla46x_c dla34 dla60_res2net dpn48b dpn68b edgenext_xx_small edgenext_small_rw
    efficientformerv2_s0
    test_efficientnet test_efficientnet_gn test_efficientnet_ln test_efficientnet_evos
    mixnet_s tf_efficientnet_b0 efficientnet_cc_b0_4e tinynet_e fbnetc_100 spnasnet_100
    mnasnet_small mobilenet_edgetpu_v2_xs
    efficientvit_b0 efficientvit_l1 vit_tiny_patch16_dinov3_qkvb eva02_tiny_patch14_224
    vit_small_patch16_rope_224 vit_small_patch16_rope_mixed_224
    fasternet_t0 fastvit_t8 fastvit_sa12 focalnet_tiny_srf gcvit_xxtiny
    ghostnet_050 ghostnetv2_100 ghostnetv3_050 hardcorenas_a hgnetv2_b0 hgnet_tiny
    hiera_tiny_224 sam2_hiera_tiny hrnet_w18_small iformer_t
    inception_next_atto inception_next_tiny lcnetv2_small lowformer_b0 test_mambaout
    test_coatnet test_maxvit maxxvit_rmlp_nano_rw_256 coatnext_nano_rw_224
    coatnet_rmlp_nano_rw_224
    poolformer_s12 poolformerv2_s12 convformer_s18 caformer_s18
    gmlp_ti16_224 gmixer_12_224 mixer_s32_224 resmlp_12_224
    mobilenetv3_small_050 lcnet_035 fbnetv3_b mobilenetv4_conv_small_050
    mobilenetv4_hybrid_medium mobilenetv5_base mobilevit_xxs mobilevitv2_050 mvitv2_tiny
    nasnetalarge nest_tiny nest_tiny_jx nextvit_small
    test_nfnet nf_regnet_b0 nf_resnet26 dm_nfnet_f0
    pit_ti_224 pit_ti_distilled_224 pnasnet5large pvt_v2_b0 pvt_v2_b2_li rdnet_tiny
    regnetx_002 regnety_002 regnetz_005 regnetv_040 repghostnet_050 repvit_m0_9
    res2next50 res2net50_14w_8s resnest14d
    test_resnet resnet10t ecaresnet26t resnetblur50 seresnext26d_32x4d resnetaa50
    resnetrs50 resnetv2_18 resnetv2_50x1_bit resnetv2_50d_evos rexnet_100 rexnetr_100
    selecsls42 legacy_seresnet18 legacy_seresnext26_32x4d sequencer2d_s shvit_s1
    skresnet18 skresnext50_32x4d starnet_s050 swiftformer_xs
    swin_tiny_patch4_window7_224 swin_s3_tiny_224 swinv2_tiny_window8_256
    swinv2_cr_tiny_224 swinv2_cr_tiny_ns_224
    tiny_vit_5m_224 tnt_s_legacy_patch16_224 tnt_s_patch16_224 tresnet_m
    twins_svt_small twins_pcpvt_small vgg11_bn visformer_tiny
    test_vit test_vit2 test_vit3 test_vit4 vit_tiny_patch16_224 flexivit_small
    vit_little_patch16_reg4_gap_256 vit_pwee_patch16_reg1_gap_256
    vit_tiny_r_s16_p8_224
    test_vit_relpos vit_relpos_small_patch16_rpn_224 vit_srelpos_small_patch16_224
    vit_relpos_medium_patch16_cls_224 vitamin_small_224 volo_d1_224
    ese_vovnet19b_slim_dw eca_vovnet39b vovnet39a legacy_xception xception41 xception41p
    xcit_nano_12_p16_224
"""


@dataclass(frozen=True)
class Recipe:
    """Side of the images and arguments of `timm.create_model`."""

    size: int = 64
    settings: Mapping[str, Any] = field(default_factory=Settings)
    note: str = ""


_SHALLOW = Recipe(settings={"depth": 4}, note="4 layers")
_BLOCKS_OF_8 = Recipe(256, note="attention in blocks of 8 pixels needs images of 256")
_KERNELS = Recipe(96, note="kernels of 3 without padding need images of 96")

SPECIAL: dict[str, Recipe] = {
    "aimv2_large_patch14_224": Recipe(56, {"depth": 4}, "4 layers"),
    "bat_resnext26ts": _BLOCKS_OF_8,
    "beit_base_patch16_224": _SHALLOW,
    "beitv2_base_patch16_224": _SHALLOW,
    "crossvit_9_dagger_240": Recipe(120, note="two patch sizes need images of 120"),
    "crossvit_tiny_240": Recipe(120, note="two patch sizes need images of 120"),
    "deepseek_vit_412m": Recipe(126, {"depth": 4}, "4 layers"),
    "eca_halonext26ts": _BLOCKS_OF_8,
    "efficientformer_l1": Recipe(224, note="attention biases fix images of 224"),
    "efficientvim_m1": Recipe(128),
    "efficientvit_m0": Recipe(128),
    "gemma4_vit_167m": Recipe(96, {"depth": 4}, "4 layers"),
    "halonet_h1": _BLOCKS_OF_8,
    "inception_resnet_v2": _KERNELS,
    "inception_v3": _KERNELS,
    "inception_v4": _KERNELS,
    "levit_128s": Recipe(128),
    "levit_conv_128s": Recipe(128),
    "naflexvit_base_patch16_gap": _SHALLOW,
    "naflexvit_base_patch16_map": _SHALLOW,
    "naflexvit_base_patch16_par_gap": _SHALLOW,
    "qwen3_vit_88m": _SHALLOW,
    "samvit_base_patch16": _SHALLOW,
    "samvit_base_patch16_224": _SHALLOW,
    "vit_base_mci_224": _SHALLOW,
    "vit_base_patch16_clip_224": _SHALLOW,
    "vit_base_patch16_siglip_224": _SHALLOW,
    "vit_medium_patch16_gap_240": _SHALLOW,
    "vit_small_patch16_18x2_224": _SHALLOW,
}
RECIPES: dict[str, Recipe] = {**dict.fromkeys(PLAIN.split(), Recipe()), **SPECIAL}
# Attention in one fused call is the default; these are built from single steps as well.
UNFUSED = """
    beit_base_patch16_224 eva02_tiny_patch14_224 vit_tiny_patch16_224
    naflexvit_base_patch16_gap swin_tiny_patch4_window7_224
"""


def cases() -> list[Case]:
    """Cases by name of the model; ``-unfused`` is attention in single steps."""
    found = [_case(name, fused=True) for name in RECIPES]
    found += [_case(name, fused=False) for name in UNFUSED.split()]
    return sorted(found, key=lambda case: case.name)


def _case(name: str, *, fused: bool) -> Case:
    recipe = RECIPES[name]
    module = timm.models.model_entrypoint(name).__module__
    return Case(
        name=f"timm/{name}" + ("" if fused else "-unfused"),
        family=module.removeprefix("timm.models."),
        library="timm",
        build=partial(_build, name, recipe, fused),
        example=image(recipe.size),
        note=recipe.note,
    )


def _build(name: str, recipe: Recipe, fused: bool) -> nn.Module:
    pretrained = timm.get_pretrained_cfg(name)
    size = {"img_size": recipe.size} if pretrained.fixed_input_size else {}
    before = use_fused_attn()
    set_fused_attn(fused)
    try:
        return timm.create_model(name, **size, **recipe.settings)
    finally:
        set_fused_attn(before)
