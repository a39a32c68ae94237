from families import BASE, Case, published

CASE = Case(
    {
        **BASE,
        "num_hidden_layers": 5,
        "num_experts_per_tok": 3,
        "intermediate_size": 28,
        "num_local_experts": 12,
        "sliding_window": 9,
    },
    "MixtralForCausalLM",
    variants=({"sliding_window": None, "tie_word_embeddings": True},),
    balance=True,
    presets={name: published(name) for name in ("Mixtral-8x7B", "Mixtral-8x22B")},
)
