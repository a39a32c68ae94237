from families import BASE, Case, Preset

CASE = Case(
    {
        **BASE,
        "intermediate_size": 56,
        "moe_intermediate_size": 24,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "num_shared_experts": 2,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 1.7,
        "sliding_window": 9,
        "sliding_window_pattern": 2,
    },
    "ExaoneMoeForCausalLM",
    variants=(
        {"norm_topk_prob": False, "tie_word_embeddings": True, "n_group": 1, "topk_group": 1},
        {
            "mlp_layer_types": ["sparse", "dense"] * 2,
            "layer_types": ["full_attention", "sliding_attention"] * 2,
        },
    ),
    presets={
        # Fields of the published model, counted by transformers.
        "K-EXAONE-236B-A23B": Preset(
            {
                "vocab_size": 153600,
                "hidden_size": 6144,
                "intermediate_size": 18432,
                "moe_intermediate_size": 2048,
                "num_hidden_layers": 48,
                "num_attention_heads": 64,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "num_experts": 128,
                "sliding_window": 128,
            },
            236_571_150_336,
        ),
    },
)
