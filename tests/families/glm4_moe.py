from families import BASE, GROUPED, Case, Preset

CASE = Case(
    {
        **BASE,
        **GROUPED,
        "use_qk_norm": True,
        "attention_bias": True,
    },
    "Glm4MoeForCausalLM",
    scales={"e_score_correction_bias": 0.6},  # some of those kept are below 0
    variants=(
        {
            "norm_topk_prob": False,
            "use_qk_norm": False,
            "attention_bias": False,
            "tie_word_embeddings": True,
            "first_k_dense_replace": 2,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.25,
            },
        },
    ),
    presets={
        "GLM-4.5-Air": Preset({"attention_bias": True, "head_dim": 128}, 106_852_245_504),
        "GLM-4.5": Preset(
            {
                "hidden_size": 5120,
                "intermediate_size": 12288,
                "moe_intermediate_size": 1536,
                "num_hidden_layers": 92,
                "head_dim": 128,
                "n_routed_experts": 160,
                "first_k_dense_replace": 3,
                "attention_bias": True,
                "use_qk_norm": True,
                "routed_scaling_factor": 2.5,
            },
            352_797_814_784,
        ),
    },
)
