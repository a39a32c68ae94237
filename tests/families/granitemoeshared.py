from families import BASE, Case, Preset

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
        "shared_intermediate_size": 32,
    },
    "GraniteMoeSharedForCausalLM",
    variants=({"attention_bias": True, "tie_word_embeddings": True, "shared_intermediate_size": 0},),
    balance=True,
    presets={
        "defaults of its class": Preset({}, 37_039_116_288),  # as transformers counts them
    },
)
