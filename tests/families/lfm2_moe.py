from families import BASE, Case, Preset

CASE = Case(
    {
        **{name: value for name, value in BASE.items() if name not in ("head_dim", "rms_norm_eps")},
        "norm_eps": 1e-5,
        "layer_types": ["conv", "full_attention", "conv", "conv"],
        "intermediate_size": 56,
        "moe_intermediate_size": 24,
        "num_dense_layers": 1,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "routed_scaling_factor": 1.7,
        "conv_L_cache": 4,
    },
    "Lfm2MoeForCausalLM",
    variants=(
        {
            "norm_topk_prob": False,
            "use_expert_bias": False,
            "tie_word_embeddings": True,
            "conv_L_cache": 3,
            "num_dense_layers": 0,
        },
    ),
    packs=False,
    presets={
        # Fields of the published model (transformers' count of its sizes).
        "LFM2-8B-A1B": Preset(
            {
                "num_hidden_layers": 24,
                "layer_types": [
                    "full_attention" if layer in (2, 6, 10, 14, 18, 21) else "conv" for layer in range(24)
                ],
            },
            8_339_929_856,
        ),
    },
)
