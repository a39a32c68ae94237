from families import BASE, Case, Preset

CASE = Case(
    {
        **BASE,
        "intermediate_size": 56,
        "moe_intermediate_size": 24,
        "num_dense_layers": 1,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "num_shared_experts": 2,
        "route_scale": 1.7,
        "sliding_window": 9,
        "global_attn_every_n_layers": 2,
        "mup_enabled": True,
    },
    "AfmoeForCausalLM",
    variants=({"mup_enabled": False, "attention_bias": True, "tie_word_embeddings": True},),
    presets={
        # No published size in the facts: the defaults of the class and Trinity-Mini's fields, counted by transformers.
        "AfmoeConfig's defaults": Preset({}, 19_232_600_000),
        "Trinity-Mini": Preset(
            {
                "moe_intermediate_size": 1024,
                "num_attention_heads": 32,
                "num_key_value_heads": 4,
                "num_dense_layers": 2,
                "num_experts": 128,
                "num_experts_per_tok": 8,
                "num_shared_experts": 1,
                "sliding_window": 2048,
                "route_scale": 2.826,
                "mup_enabled": True,
                "max_position_embeddings": 131072,
            },
            26_123_974_400,
        ),
    },
    packs=False,
)
