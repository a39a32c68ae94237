from families import BASE, Case, Preset

CASE = Case(
    {
        **BASE,
        "intermediate_size": 56,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 32,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "sliding_window": 9,
        "mlp_only_layers": [0],
        "layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"],
    },
    "FlintForCausalLM",
    variants=(
        {
            "norm_topk_prob": False,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "mlp_only_layers": None,
            "decoder_sparse_step": 2,
        },
    ),
    balance=True,
    # The defaults of its class, as transformers counts them.
    presets={"flint": Preset({}, 39_785_287_456)},
    scales={"sinks": 1.0},
)
