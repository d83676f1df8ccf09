"""Language models of transformers that read all tokens at once, or read and answer."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers_recipe import (
    LENGTH,
    SEQ2SEQ,
    TEXT,
    Recipe,
    ids,
    recipe,
    tokens,
    tokens_and_targets,
    tokens_in_boxes,
)

from gdnsq_fx.inputs import ExampleInput

# Architectures that need nothing but the common settings.
_ENCODERS = """
    BertForMaskedLM RobertaForSequenceClassification MPNetForMaskedLM IBertForMaskedLM
    MegatronBertForMaskedLM ModernBertForMaskedLM XLMRobertaForMaskedLM YosoForMaskedLM
    EuroBertForMaskedLM NomicBertForMaskedLM TapasForSequenceClassification
"""
_SEQ2SEQ = """
    BartForConditionalGeneration MBartForConditionalGeneration MarianMTModel
    PegasusForConditionalGeneration M2M100ForConditionalGeneration
    BlenderbotForConditionalGeneration PLBartForConditionalGeneration
"""
_DISENTANGLED = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
_RANDOM_BLOCKS = {"block_size": 4, "num_random_blocks": 1}
_T5 = {"d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}


def _bare(batch: int) -> ExampleInput:
    return {"input_ids": ids(batch)}


def _with_global_tokens(batch: int) -> dict[str, Any]:
    mask = torch.zeros(batch, LENGTH, dtype=torch.long)
    mask[:, 0] = 1
    return {**tokens(batch), "global_attention_mask": mask}


def _with_global_tokens_and_targets(batch: int) -> ExampleInput:
    return {**_with_global_tokens(batch), "decoder_input_ids": ids(batch, 7)}


def _64_and_targets(batch: int) -> ExampleInput:
    return {**tokens(batch, 64), "decoder_input_ids": ids(batch, 7)}


_16, _64 = partial(tokens, length=16), partial(tokens, length=64)
_encoder = partial(recipe, example=tokens, base=TEXT)
_seq2seq = partial(recipe, example=tokens_and_targets, base=SEQ2SEQ)

RECIPES: tuple[Recipe, ...] = (
    *(_encoder(name) for name in _ENCODERS.split()),
    _encoder("DistilBertForMaskedLM", dim=32, hidden_dim=64),
    _encoder("AlbertForMaskedLM", embedding_size=16),
    _encoder("ElectraForTokenClassification", embedding_size=16),
    _encoder("DebertaForMaskedLM", **_DISENTANGLED),
    _encoder("DebertaV2ForMaskedLM", **_DISENTANGLED),
    _encoder("ConvBertForMaskedLM", embedding_size=32),
    _encoder("MobileBertForMaskedLM", intra_bottleneck_size=32, embedding_size=16),
    _encoder("SqueezeBertForMaskedLM", embedding_size=32),
    _encoder("FNetForMaskedLM", example=_bare),
    _encoder(
        "NystromformerForMaskedLM",
        example=_16,
        num_landmarks=16,  # fewer do not go together with a mask
        segment_means_seq_len=16,
    ),
    _encoder("RoFormerForMaskedLM", embedding_size=32),
    _encoder("LongformerForMaskedLM", example=_with_global_tokens, attention_window=4),
    _encoder("BigBirdForMaskedLM", example=_64, **_RANDOM_BLOCKS),
    _encoder(
        "ReformerForMaskedLM",
        example=_16,
        attn_layers=["lsh", "local"],
        is_decoder=False,
        attention_head_size=8,
        axial_pos_shape=[4, 4],
        axial_pos_embds_dim=[16, 16],
        feed_forward_size=64,
        lsh_attn_chunk_length=4,
        local_attn_chunk_length=4,
        num_buckets=4,
    ),
    _encoder(
        "FunnelForMaskedLM",
        num_hidden_layers=None,
        block_sizes=[1, 1, 1],
        d_model=32,
        n_head=4,
        d_head=8,
        d_inner=64,
    ),
    _encoder("XLNetLMHeadModel", max_position_embeddings=None, d_inner=64, d_head=8),
    _encoder("XLMWithLMHeadModel", emb_dim=32, n_layers=2, n_heads=4),
    _encoder("CanineForSequenceClassification", local_transformer_stride=4),
    _encoder("LayoutLMForTokenClassification", example=tokens_in_boxes),
    _encoder("RemBertForMaskedLM", input_embedding_size=32, output_embedding_size=32),
    _encoder("EsmForMaskedLM", mask_token_id=3),
    *(_seq2seq(name) for name in _SEQ2SEQ.split()),
    _seq2seq("T5ForConditionalGeneration", **_T5),
    _seq2seq("T5ForConditionalGeneration", variant="no-cache", **_T5, use_cache=False),
    _seq2seq("UMT5ForConditionalGeneration", **_T5),
    _seq2seq("LongT5ForConditionalGeneration", **_T5, local_radius=4),
    _seq2seq(
        "SwitchTransformersForConditionalGeneration",
        **_T5,
        encoder_layers=None,
        decoder_layers=None,
        num_experts=4,
    ),
    _seq2seq("NllbMoeForConditionalGeneration", num_experts=4, encoder_sparse_step=1),
    _seq2seq("FSMTForConditionalGeneration", src_vocab_size=99, tgt_vocab_size=99),
    _seq2seq(
        "LEDForConditionalGeneration",
        example=_with_global_tokens_and_targets,
        attention_window=4,
    ),
    _seq2seq(
        "BigBirdPegasusForConditionalGeneration",
        example=_64_and_targets,
        **_RANDOM_BLOCKS,
    ),
    _seq2seq(
        "ProphetNetForConditionalGeneration",
        num_hidden_layers=None,
        encoder_layers=None,
        decoder_layers=None,
        num_encoder_layers=2,
        num_decoder_layers=2,
        num_encoder_attention_heads=4,
        num_decoder_attention_heads=4,
    ),
)
