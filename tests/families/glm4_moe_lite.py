from families import Case, Preset, deepseek_v3

CASE = Case(
    {name: value for name, value in deepseek_v3.CASE.config.items() if name != "first_k_dense_replace"},
    "Glm4MoeLiteForCausalLM",
    scales=deepseek_v3.CASE.scales,
    variants=(
        {
            "q_lora_rank": None,
            "attention_bias": True,
            "rope_interleave": False,
            "norm_topk_prob": False,
            "tie_word_embeddings": True,
            "mlp_layer_types": ["dense", "sparse", "dense", "sparse"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    presets={"GLM-4.7-Flash": Preset({}, 29_943_390_976)},
)
