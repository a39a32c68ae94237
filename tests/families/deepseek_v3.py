from families import BASE, GROUPED, Case, Preset

LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 30,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 13,
}
"""Widths of a latent attention: no two products of them are the same, and keys are wider than values."""

YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 30,
    "mscale": 1.0,
    "mscale_all_dim": 0.8,
}
"""With one of four pairs of features between those that turn as before and those that turn slower."""

KIMI = {
    "vocab_size": 163840,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "n_routed_experts": 384,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.827,
}

CASE = Case(
    {
        **{name: value for name, value in BASE.items() if name != "head_dim"},
        **LATENT,
        **GROUPED,
        "first_k_dense_replace": 1,
        "rope_parameters": YARN,
    },
    "DeepseekV3ForCausalLM",
    scales={"e_score_correction_bias": 0.6},  # some of those kept are below 0
    variants=(
        {
            "q_lora_rank": None,
            "attention_bias": True,
            "rope_interleave": False,
            "norm_topk_prob": False,
            "tie_word_embeddings": True,
            "first_k_dense_replace": 0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        {
            "attention_bias": True,
            "qk_nope_head_dim": 16,
            "v_head_dim": 24,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 1,
            "rope_parameters": {**YARN, "mscale_all_dim": 1.0},
        },
    ),
    presets={
        "DeepSeek-V3": Preset({}, 671_026_404_352),
        "Kimi-K2": Preset(KIMI, 1_026_408_209_408),
    },
)
