from families import Case, Preset, deepseek_v3, glm_moe_dsa

CASE = Case(
    {
        **{name: value for name, value in deepseek_v3.CASE.config.items() if name != "first_k_dense_replace"},
        **glm_moe_dsa.INDEXER,
        "gated_norm_rank": 6,
        "rope_parameters": deepseek_v3.YARN,
    },
    "AXK2ForCausalLM",
    # All of those kept are above 0: others, which become 0, are chosen only where libraries choose differently.
    scales={"e_score_correction_bias": 0.1},
    variants=(
        {
            "attention_bias": True,
            "norm_topk_prob": False,
            "tie_word_embeddings": True,
            "mlp_layer_types": ["dense", "sparse", "dense", "sparse"],
            "n_group": None,
            "topk_group": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        {"index_topk": 80, "n_shared_experts": 1},
    ),
    presets={"A.X-K2-Light": Preset({}, 20_314_494_976)},
)
