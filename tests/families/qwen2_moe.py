from families import BASE, Case, Preset

CASE = Case(
    {
        **{name: value for name, value in BASE.items() if name != "head_dim"},
        "intermediate_size": 56,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 32,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "mlp_only_layers": [1],
        "use_sliding_window": True,
        "sliding_window": 9,
        "max_window_layers": 3,
    },
    "Qwen2MoeForCausalLM",
    variants=(
        {
            "norm_topk_prob": True,
            "qkv_bias": False,
            "tie_word_embeddings": True,
            "mlp_only_layers": [],
            "decoder_sparse_step": 2,
            "use_sliding_window": False,
        },
    ),
    balance=True,
    presets={
        "Qwen1.5-MoE-A2.7B": Preset({}, 14_315_784_192),
        "Qwen2-57B-A14B": Preset(
            {
                "hidden_size": 3584,
                "num_hidden_layers": 28,
                "num_attention_heads": 28,
                "num_key_value_heads": 4,
                "moe_intermediate_size": 2560,
                "shared_expert_intermediate_size": 20480,
                "num_experts": 64,
                "num_experts_per_tok": 8,
            },
            57_408_658_944,
        ),
    },
)
