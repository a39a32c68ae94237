from families import BASE, Case, Preset

CASE = Case(
    {
        **BASE,
        "num_hidden_layers": 5,
        "intermediate_size": 24,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "block_size": 8,
        "layer_types": ["linear_attention", "linear_attention", "full_attention"] + ["linear_attention"] * 2,
        "full_attn_alpha_factor": 1.7,
        "full_attn_beta_factor": 0.9,
        "linear_attn_alpha_factor": 1.4,
        "linear_attn_beta_factor": 0.8,
        "mlp_alpha_factor": 1.3,
        "mlp_beta_factor": 1.1,
    },
    "MiniMaxForCausalLM",
    variants=(
        {
            "layer_types": ["full_attention", "linear_attention"] * 2 + ["full_attention"],
            "sliding_window": 9,
            "head_dim": None,
            "tie_word_embeddings": True,
        },
    ),
    balance=True,
    packs=False,
    derived=("slope_rate", "query_decay", "key_decay", "diagonal_decay"),
    presets={
        "MiniMax-Text-01": Preset(
            {
                "vocab_size": 200_064,
                "hidden_size": 6144,
                "intermediate_size": 9216,
                "num_hidden_layers": 80,
                "num_attention_heads": 64,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "num_local_experts": 32,
                "layer_types": (["linear_attention"] * 7 + ["full_attention"]) * 10,
                "rotary_dim": 64,
            },
            456_089_655_296,
        ),
    },
)
