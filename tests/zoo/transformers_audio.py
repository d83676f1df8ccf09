"""Models of transformers of sound and of series over time."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers_recipe import INITIAL, LAYERS, SEQ2SEQ, TEXT, Recipe, ids, recipe

from gdnsq_fx.inputs import ExampleInput

_WAVES = """
    Wav2Vec2ForCTC HubertForCTC WavLMForCTC UniSpeechForCTC UniSpeechSatForCTC SEWForCTC
    SEWDForCTC Data2VecAudioForCTC Wav2Vec2ConformerForCTC
"""
_SPEECH: dict[str, Any] = {
    **LAYERS,
    "vocab_size": 30,
    "conv_dim": [16, 16, 16],
    "conv_kernel": [10, 3, 3],
    "conv_stride": [5, 2, 2],
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
}
_PATCHES: dict[str, Any] = {
    **INITIAL,
    "num_input_channels": 2,
    "context_length": 32,
    "prediction_length": 8,
    "patch_length": 8,
    "patch_stride": 8,
    "d_model": 32,
}


def _wave(batch: int) -> dict[str, Any]:
    return {"input_values": torch.randn(batch, 2000)}


def _short_wave(batch: int) -> ExampleInput:
    return {"input_values": torch.randn(batch, 1, 640)}


def _wave_and_targets(batch: int) -> ExampleInput:
    return {**_wave(batch), "decoder_input_ids": ids(batch, 7)}


def _spectrum(batch: int) -> ExampleInput:
    return {"input_values": torch.randn(batch, 64, 16)}


def _features(batch: int) -> ExampleInput:
    return {"input_features": torch.randn(batch, 20, 16)}


def _features_and_targets(batch: int, *shape: int) -> ExampleInput:
    features = torch.randn(batch, *shape)
    return {"input_features": features, "decoder_input_ids": ids(batch, 7)}


def _whisper(batch: int) -> ExampleInput:
    return _features_and_targets(batch, 16, 40)


def _speech_to_text(batch: int) -> ExampleInput:
    return _features_and_targets(batch, 40, 16)


def _codes(batch: int) -> ExampleInput:
    return {"input_ids": ids(4 * batch)}  # four codebooks, one after the other


def _series(batch: int) -> ExampleInput:
    return {"past_values": torch.randn(batch, 32, 2)}


def _series_with_time(batch: int) -> ExampleInput:
    return {
        "past_values": torch.randn(batch, 23),
        "past_time_features": torch.randn(batch, 23, 2),
        "past_observed_mask": torch.ones(batch, 23),
        "future_values": torch.randn(batch, 8),
        "future_time_features": torch.randn(batch, 8, 2),
    }


def _trajectory(batch: int) -> ExampleInput:
    return {
        "states": torch.randn(batch, 6, 5),
        "actions": torch.randn(batch, 6, 2),
        "rewards": torch.randn(batch, 6, 1),
        "returns_to_go": torch.randn(batch, 6, 1),
        "timesteps": torch.arange(6).repeat(batch, 1),
        "attention_mask": torch.ones(batch, 6),
    }


_speech = partial(recipe, example=_wave, base=_SPEECH)
_encoder = partial(recipe, base=LAYERS)
_seq2seq = partial(recipe, base=SEQ2SEQ)

RECIPES: tuple[Recipe, ...] = (
    *(_speech(name) for name in _WAVES.split()),
    # Without the two things that draw lots outside of dropout.
    _speech("Wav2Vec2ForCTC", variant="calm", layerdrop=0.0, mask_time_prob=0.0),
    _encoder(
        "Wav2Vec2BertForCTC",
        example=_features,
        feature_projection_input_dim=16,
        vocab_size=30,
    ),
    _encoder(
        "ASTForAudioClassification",
        example=_spectrum,
        max_length=64,
        num_mel_bins=16,
        patch_size=8,
        frequency_stride=8,
        time_stride=8,
    ),
    _seq2seq(
        "WhisperForConditionalGeneration",
        example=_whisper,
        num_mel_bins=16,
        max_source_positions=20,
        max_target_positions=20,
    ),
    _seq2seq(
        "Speech2TextForConditionalGeneration",
        example=_speech_to_text,
        input_feat_per_channel=16,
        conv_channels=32,
    ),
    _seq2seq(
        "SpeechT5ForSpeechToText",
        example=_wave_and_targets,
        **{**_SPEECH, "vocab_size": 99},
    ),
    recipe("MusicgenForCausalLM", example=_codes, base=TEXT, ffn_dim=64),
    recipe(
        "EncodecModel",
        example=_short_wave,
        base=INITIAL,
        num_filters=4,
        hidden_size=16,
        codebook_size=16,
        codebook_dim=16,
    ),
    recipe("PatchTSTForPrediction", example=_series, base={**LAYERS, **_PATCHES}),
    recipe("PatchTSMixerForPrediction", example=_series, base=_PATCHES, num_layers=2),
    _seq2seq(
        "TimeSeriesTransformerModel",
        example=_series_with_time,
        prediction_length=8,
        context_length=16,
        num_time_features=2,
    ),
    _encoder(
        "DecisionTransformerModel",
        example=_trajectory,
        state_dim=5,
        act_dim=2,
        max_ep_len=20,
    ),
)
