from families import BASE, Case, Preset, qwen3_next

CONFIG = {
    **BASE,
    **qwen3_next.DELTA,
    "rms_norm_eps": 1e-2,
    "num_hidden_layers": 5,
    "head_dim": 24,
    "moe_intermediate_size": 28,
    "shared_expert_intermediate_size": 32,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [1, 1, 1],
        "mrope_interleaved": True,
    },
}

VARIANT = {
    "attention_bias": True,
    "linear_conv_kernel_dim": 3,
    "linear_num_key_heads": 4,
    "layer_types": ["full_attention", "linear_attention"] * 2 + ["linear_attention"],
}

PRESETS = {
    "Qwen3.5-35B-A3B": Preset({}, 34_660_610_688),
    "Qwen3.5-397B-A17B": Preset(
        {
            "hidden_size": 4096,
            "num_hidden_layers": 60,
            "num_attention_heads": 32,
            "num_key_value_heads": 2,
            "moe_intermediate_size": 1024,
            "shared_expert_intermediate_size": 1024,
            "num_experts": 512,
            "num_experts_per_tok": 10,
            "linear_num_value_heads": 64,
        },
        396_346_350_336,
    ),
}

CASE = Case(
    CONFIG,
    "Qwen3_5MoeForCausalLM",
    variants=({**VARIANT, "tie_word_embeddings": True},),
    balance=True,
    packs=False,
    presets={f"{name}, text alone": preset for name, preset in PRESETS.items()},
)
