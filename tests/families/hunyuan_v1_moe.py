from families import BASE, Case, Preset

CASE = Case(
    {
        **BASE,
        "num_hidden_layers": 3,
        "intermediate_size": 24,
        "num_experts": 6,
        "moe_topk": 2,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 50.0, "factor": 1.0},
    },
    "HunYuanMoEV1ForCausalLM",
    variants=(
        {
            "moe_topk": [3, 4, 2],
            "attention_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    presets={
        "Hunyuan-A13B": Preset(
            {
                "vocab_size": 128167,
                "intermediate_size": 3072,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "num_experts": 64,
                "moe_topk": 8,
                "tie_word_embeddings": True,
            },
            80_393_183_232,
        )
    },
)
