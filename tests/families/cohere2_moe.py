from families import BASE, Case, Preset

CASE = Case(
    {
        **{name: value for name, value in BASE.items() if name != "rms_norm_eps"},
        "intermediate_size": 24,
        "prefix_dense_intermediate_size": 56,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "num_shared_experts": 2,
        "logit_scale": 0.3,
        "sliding_window": 9,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"],
    },
    "Cohere2MoeForCausalLM",
    variants=(
        {
            "expert_selection_fn": "sigmoid",
            "shared_expert_combination_strategy": "sum",
            "prefix_dense_sliding_window_pattern": 4,
            "prefix_dense_intermediate_size": None,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-5,
        },
        {"expert_selection_fn": "sigmoid", "norm_topk_prob": False, "num_shared_experts": 0},
    ),
    weightless={
        # Without rotation it adds the same to all scores of a query.
        "groups.0.0.attention.k_bias": "the first layer is not rotated",
        "groups.2.0.attention.k_bias": "layers without a window are not rotated",
    },
    # The defaults of its class, as transformers counts them.
    presets={"defaults of its class": Preset({}, 190_004_928_512)},
)
