from families import BASE, Case, Preset

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
    presets={
        "Mixtral-8x7B": Preset({}, 46_702_792_704),
        "Mixtral-8x22B": Preset(
            {
                "hidden_size": 6144,
                "intermediate_size": 16384,
                "num_hidden_layers": 56,
                "num_attention_heads": 48,
                "vocab_size": 32768,
            },
            140_630_071_296,
        ),
    },
)
