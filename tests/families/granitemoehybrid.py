from families import BASE, Case, Preset

MAMBA = {
    "mamba_n_heads": 4,
    "mamba_n_groups": 2,
    "mamba_d_head": 30,
    "mamba_d_state": 26,
    "mamba_d_conv": 4,
    "mamba_expand": 3,
}

PUBLISHED = {
    "vocab_size": 100352,
    "num_hidden_layers": 40,
    "layer_types": ["full_attention" if layer % 10 == 5 else "linear_attention" for layer in range(40)],
    "embedding_multiplier": 12,
    "residual_multiplier": 0.22,
    "rms_norm_eps": 1e-5,
    "mamba_d_state": 128,
    "position_embedding_type": "nope",
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}

CASE = Case(
    {
        **{name: value for name, value in BASE.items() if name != "head_dim"},
        **MAMBA,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "num_hidden_layers": 3,
        "intermediate_size": 24,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.11,
        "residual_multiplier": 0.22,
        "logits_scaling": 1.5,
        "shared_intermediate_size": 32,
        "position_embedding_type": "rope",
        "attention_bias": True,
        "time_step_limit": [0.4, 1.1],
    },
    "GraniteMoeHybridForCausalLM",
    variants=(
        {
            "attention_bias": False,  # without a rotation, keys' cannot change a softmax
            "tie_word_embeddings": True,
            "position_embedding_type": "nope",
            "mamba_conv_bias": False,
            "mamba_d_conv": 3,
            "mamba_n_groups": 1,
            "time_step_limit": [0.0, float("inf")],
        },
    ),
    balance=True,
    packs=False,
    presets={
        # Fields of the published models (transformers' count of their sizes).
        "granite-4.0-h-tiny": Preset(
            {
                **PUBLISHED,
                "hidden_size": 1536,
                "num_attention_heads": 12,
                "num_key_value_heads": 4,
                "intermediate_size": 512,
                "shared_intermediate_size": 1024,
                "num_local_experts": 64,
                "num_experts_per_tok": 6,
                "mamba_n_heads": 48,
                "attention_multiplier": 0.0078125,
                "logits_scaling": 6,
            },
            6_939_037_248,
        ),
        "granite-4.0-h-small": Preset(
            {
                **PUBLISHED,
                "hidden_size": 4096,
                "num_key_value_heads": 8,
                "intermediate_size": 768,
                "shared_intermediate_size": 1536,
                "num_local_experts": 72,
                "num_experts_per_tok": 10,
                "mamba_n_heads": 128,
                "attention_multiplier": 0.0078125,
                "logits_scaling": 16,
            },
            32_207_337_984,
        ),
    },
)
