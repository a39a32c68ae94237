from families import BASE, Case, Preset

CASE = Case(
    {
        **BASE,
        "num_hidden_layers": 3,
        "intermediate_size": 56,
        "moe_intermediate_size": 24,
        "num_experts": 6,
        "num_shared_experts": 2,
        "num_experts_per_tok": 2,
        "router_scaling_factor": 1.7,
    },
    "HYV3ForCausalLM",
    variants=(
        {
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "enable_moe_fp32_combine": False,
            "mlp_layer_types": ["sparse", "dense", "sparse"],
        },
    ),
    presets={
        # As transformers' model on the meta device counts.
        "Hy3": Preset({}, 295_033_528_320)
    },
)
