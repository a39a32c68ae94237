from families import Case, qwen3_omni_moe_thinker

_SMALL = {
    "vocab_size": 20,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}

_TALKER = {
    "spatial_merge_size": 2,
    "thinker_hidden_size": 40,
    "accept_hidden_layer": 1,
    "num_code_groups": 2,
    "text_config": {
        **_SMALL,
        "moe_intermediate_size": 6,
        "shared_expert_intermediate_size": 6,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "code_predictor_config": {**_SMALL, "head_dim": 4, "num_code_groups": 2},
}

_CODE2WAV = {
    "codebook_size": 8,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_quantizers": 2,
    "upsample_rates": [2],
    "upsampling_ratios": [2],
    "decoder_dim": 8,
}

CASE = Case(
    {
        "thinker_config": qwen3_omni_moe_thinker.CONFIG,
        "talker_config": _TALKER,
        "code2wav_config": _CODE2WAV,
    },
    "Qwen3OmniMoeForConditionalGeneration",
    variants=({"thinker_config": qwen3_omni_moe_thinker.VARIANT},),
    balance=True,
    presets={"Qwen3-Omni-30B-A3B": qwen3_omni_moe_thinker.OMNI},
    text=lambda model: model.thinker,
)
