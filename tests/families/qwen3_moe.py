from families import BASE, Case, Preset

CASE = Case(
    {
        **BASE,
        "num_hidden_layers": 5,
        "num_experts_per_tok": 3,
        "intermediate_size": 72,
        "moe_intermediate_size": 28,
        "num_experts": 12,
        "decoder_sparse_step": 2,
        "norm_topk_prob": True,
    },
    "Qwen3MoeForCausalLM",
    variants=(
        {"norm_topk_prob": False, "attention_bias": True, "mlp_only_layers": [1], "decoder_sparse_step": 1},
    ),
    balance=True,
    presets={
        "Qwen3-30B-A3B": Preset(
            {"num_hidden_layers": 48, "head_dim": 128, "norm_topk_prob": True}, 30_532_122_624
        ),
        "Qwen3-235B-A22B": Preset(
            {
                "num_hidden_layers": 94,
                "norm_topk_prob": True,
                "hidden_size": 4096,
                "num_attention_heads": 64,
                "head_dim": 128,
                "moe_intermediate_size": 1536,
                "intermediate_size": 12288,
            },
            235_093_634_560,
        ),
    },
)
