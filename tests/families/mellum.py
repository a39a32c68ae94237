from families import BASE, Case, Preset

CASE = Case(
    {
        **BASE,
        "intermediate_size": 56,
        "moe_intermediate_size": 24,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "sliding_window": 9,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "rope_parameters": {
            "full_attention": {
                "rope_type": "yarn",
                "rope_theta": 500000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    "MellumForCausalLM",
    variants=(
        {
            "norm_topk_prob": False,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "layer_types": None,
            "mlp_layer_types": None,
            "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}},
        },
    ),
    balance=True,
    presets={
        # The defaults of transformers' config class, as its model on the meta device counts.
        "class defaults": Preset({}, 12_149_923_072)
    },
)
