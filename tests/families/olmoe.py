from families import BASE, Case, published

CASE = Case(
    {
        **{name: value for name, value in BASE.items() if name != "head_dim"},
        "num_hidden_layers": 5,
        "num_experts_per_tok": 3,
        "intermediate_size": 28,
        "num_experts": 12,
        "clip_qkv": 1.0,
    },
    "OlmoeForCausalLM",
    variants=(
        {"norm_topk_prob": True, "clip_qkv": None, "attention_bias": True, "tie_word_embeddings": True},
    ),
    balance=True,
    presets={"OLMoE-1B-7B": published("OLMoE-1B-7B")},
)
