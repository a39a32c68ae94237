from families import Case, Preset, deepseek_v3, glm_moe_dsa

CASE = Case(
    {**deepseek_v3.CASE.config, **glm_moe_dsa.INDEXER},
    "DeepseekV32ForCausalLM",
    scales=deepseek_v3.CASE.scales,
    variants=(
        {
            "attention_bias": True,
            "norm_topk_prob": False,
            "tie_word_embeddings": True,
            "mlp_layer_types": ["dense", "sparse", "dense", "sparse"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        {"index_topk": 80},
    ),
    presets={"DeepSeek-V3.2": Preset({}, 671_877_929_216)},
)
