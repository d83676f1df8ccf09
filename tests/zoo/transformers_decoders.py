"""Language models of transformers that continue a text."""

from __future__ import annotations

from functools import partial
from typing import Any

from transformers_recipe import TEXT, Recipe, ids, recipe, tokens

from gdnsq_fx.inputs import ExampleInput

# Architectures that need nothing but the common settings.
_PLAIN = """
    GPT2LMHeadModel GPTNeoXForCausalLM BloomForCausalLM PhiForCausalLM Phi3ForCausalLM
    FalconForCausalLM GPTBigCodeForCausalLM OlmoForCausalLM Olmo2ForCausalLM
    CohereForCausalLM GraniteForCausalLM PersimmonForCausalLM BioGptForCausalLM
    OpenAIGPTLMHeadModel
"""
# ... and fewer heads for keys and values than for queries.
_GROUPED_QUERIES = """
    LlamaForCausalLM MistralForCausalLM Qwen2ForCausalLM StableLmForCausalLM
    Starcoder2ForCausalLM NemotronForCausalLM SmolLM3ForCausalLM BitNetForCausalLM
"""
# ... and heads whose width is a setting.
_WIDE_HEADS = "Qwen3ForCausalLM GemmaForCausalLM GlmForCausalLM"

_GROUPED: dict[str, Any] = {**TEXT, "num_key_value_heads": 2}
_HEAD_8: dict[str, Any] = {**_GROUPED, "head_dim": 8}
_WINDOW = {
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 8,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}


def _with_labels(batch: int) -> ExampleInput:
    return {**tokens(batch), "labels": ids(batch)}


_plain = partial(recipe, example=tokens, base=TEXT)
_grouped = partial(recipe, example=tokens, base=_GROUPED)
_wide = partial(recipe, example=tokens, base=_HEAD_8)

RECIPES: tuple[Recipe, ...] = (
    *(_plain(name) for name in _PLAIN.split()),
    *(_grouped(name) for name in _GROUPED_QUERIES.split()),
    *(_wide(name) for name in _WIDE_HEADS.split()),
    _plain("GPT2LMHeadModel", variant="no-cache", use_cache=False),
    _grouped("LlamaForCausalLM", variant="no-cache", use_cache=False),
    _grouped("LlamaForCausalLM", variant="labels", example=_with_labels),
    _grouped("MistralForCausalLM", variant="window", sliding_window=8),
    _plain("FalconForCausalLM", variant="alibi", alibi=True),
    _plain(
        "GPTNeoForCausalLM", attention_types=[[["global", "local"], 1]], window_size=4
    ),
    _plain("GPTJForCausalLM", rotary_dim=4),
    _plain("CodeGenForCausalLM", rotary_dim=4),
    _plain("CTRLLMHeadModel", dff=64),
    _plain("OPTForCausalLM", ffn_dim=64, word_embed_proj_dim=32),
    _plain("MptForCausalLM", max_seq_len=64),
    _plain("XGLMForCausalLM", ffn_dim=64),
    _wide("Gemma2ForCausalLM", sliding_window=8),
    _wide("Gemma3ForCausalLM", **_WINDOW),
    # Mixtures of experts: all experts in one grouped product, or one after the other.
    _grouped("MixtralForCausalLM", num_local_experts=4),
    _grouped(
        "MixtralForCausalLM",
        variant="expert-loop",
        num_local_experts=4,
        experts_implementation="eager",
    ),
    _grouped("Qwen2MoeForCausalLM", **_EXPERTS, shared_expert_intermediate_size=32),
    _wide("Qwen3MoeForCausalLM", **_EXPERTS),
    _plain("OlmoeForCausalLM", **_EXPERTS),
    _plain("JetMoeForCausalLM", num_local_experts=4, kv_channels=8),
    _wide("GptOssForCausalLM", **_WINDOW, num_local_experts=4),
    _wide("Llama4ForCausalLM", num_local_experts=4, intermediate_size_mlp=64),
    _plain("DeepseekV2ForCausalLM", **_LATENT),
    _plain("DeepseekV3ForCausalLM", **_LATENT),
    # State spaces and other recurrences, alone and mixed with attention.
    _plain("MambaForCausalLM", state_size=4),
    _plain("FalconMambaForCausalLM", state_size=4),
    _plain(
        "Mamba2ForCausalLM",
        state_size=4,
        head_dim=16,
        num_heads=4,
        n_groups=2,
        chunk_size=4,
    ),
    _plain("RwkvForCausalLM", attention_hidden_size=32),
    _plain("RecurrentGemmaForCausalLM", num_hidden_layers=3, lru_width=32),
    _grouped(
        "JambaForCausalLM",
        num_experts=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_dt_rank=4,
        mamba_d_state=4,
    ),
    _grouped(
        "BambaForCausalLM",
        attn_layer_indices=[1],
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_d_state=8,
        mamba_chunk_size=4,
    ),
    _grouped("Lfm2ForCausalLM", layer_types=["conv", "full_attention"]),
    _wide(
        "Qwen3NextForCausalLM",
        **_EXPERTS,
        shared_expert_intermediate_size=32,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        layer_types=["linear_attention", "full_attention"],
    ),
)
