from families import BASE, Case, published

CONFIG = {
    **BASE,
    "intermediate_size": 56,
    "moe_intermediate_size": 24,
    "enable_moe_block": True,
    "num_experts": 6,
    "top_k_experts": 2,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "global_head_dim": 16,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
    "sliding_window": 9,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "final_logit_softcapping": 3.0,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {
            "rope_type": "proportional",
            "partial_rotary_factor": 0.5,
            "rope_theta": 1000000.0,
        },
    },
}

VARIANT = {
    "attention_k_eq_v": False,
    "attention_bias": True,
    "final_logit_softcapping": None,
    "use_bidirectional_attention": "vision",
}

CASE = Case(
    CONFIG,
    "Gemma4ForCausalLM",
    variants=({**VARIANT, "tie_word_embeddings": False},),
    presets={"Gemma-4-26B-A4B, text alone": published("Gemma-4-26B-A4B")},
)
