from families import BASE, Case, Preset

CASE = Case(
    {
        **{name: value for name, value in BASE.items() if name != "head_dim"},
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_experts": 6,
        "num_experts_per_tok": 2,
    },
    "FlexOlmoForCausalLM",
    variants=({"norm_topk_prob": True, "attention_bias": True, "tie_word_embeddings": True},),
    balance=True,
    presets={
        "FlexOlmo-7x7B-1T": Preset({}, 33_270_665_216)
    },  # transformers' count of the class's defaults, which it is
)
