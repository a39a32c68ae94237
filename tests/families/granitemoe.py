from families import BASE, Case, Preset

PUBLISHED = {
    "vocab_size": 49155,
    "intermediate_size": 512,
    "num_key_value_heads": 8,
    "num_experts_per_tok": 8,
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.015625,
    "residual_multiplier": 0.22,
    "logits_scaling": 6.0,
    "max_position_embeddings": 4096,
    "attention_dropout": 0.1,
    "tie_word_embeddings": True,
}

CASE = Case(
    {
        **{name: value for name, value in BASE.items() if name != "head_dim"},
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.11,
        "residual_multiplier": 0.22,
        "logits_scaling": 1.5,
    },
    "GraniteMoeForCausalLM",
    variants=({"attention_bias": True, "tie_word_embeddings": True},),
    balance=True,
    presets={
        # Fields of the published models (transformers' count of their sizes).
        "granite-3.0-1b-a400m": Preset(
            {
                **PUBLISHED,
                "hidden_size": 1024,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "num_local_experts": 32,
            },
            1_334_628_352,
        ),
        "granite-3.0-3b-a800m": Preset(
            {**PUBLISHED, "hidden_size": 1536, "num_attention_heads": 24, "num_local_experts": 40},
            3_298_793_472,
        ),
    },
)
