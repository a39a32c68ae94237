from families import BASE, Case, published

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
    presets={name: published(name) for name in ("Qwen3-30B-A3B", "Qwen3-235B-A22B")},
)
