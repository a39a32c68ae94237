from families import BASE, Case, Preset

CASE = Case(
    {
        **BASE,
        "tie_word_embeddings": True,
        "intermediate_size": 56,
        "moe_intermediate_size": 24,
        "moe_num_experts": 6,
        "moe_k": 2,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 2,
        "moe_norm_min": 0.6,  # about what two of six weights sum to
        "use_bias": True,
    },
    "Ernie4_5_MoeForCausalLM",
    variants=(
        {
            "tie_word_embeddings": False,
            "moe_num_shared_experts": 0,
            "moe_layer_end_index": -1,
            "moe_layer_interval": 2,
            "moe_norm_min": 1e-12,
            "use_bias": False,
        },
    ),
    balance=True,
    presets={
        "ERNIE-4.5-21B-A3B": Preset({}, 21_825_437_888),
        "ERNIE-4.5-300B-A47B": Preset(
            {
                "hidden_size": 8192,
                "num_hidden_layers": 54,
                "num_attention_heads": 64,
                "num_key_value_heads": 8,
                "intermediate_size": 28672,
                "moe_intermediate_size": 3584,
                "moe_k": 8,
                "moe_num_shared_experts": 0,
                "moe_layer_start_index": 3,
                "tie_word_embeddings": False,
            },
            299_484_163_264,
        ),
    },
)
