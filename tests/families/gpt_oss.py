from families import BASE, Case, Preset, published

CASE = Case(
    {
        **BASE,
        "intermediate_size": 24,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "sliding_window": 9,
        "swiglu_limit": 1.0,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 16,
        },
    },
    "GptOssForCausalLM",
    variants=(
        {
            "attention_bias": False,
            "tie_word_embeddings": True,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    balance=True,
    presets={
        "gpt-oss-120b": Preset({}, 116_829_156_672),
        "gpt-oss-20b": published("gpt-oss-20b"),
    },
    scales={"sinks": 1.0},
    packs=False,
)
