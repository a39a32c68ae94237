from families import BASE, GROUPED, Case, Preset, deepseek_v3

LITE = {
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "q_lora_rank": None,
    "first_k_dense_replace": 1,
    "num_experts_per_tok": 6,
}

FULL = {
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 60,
    "num_attention_heads": 128,
    "n_routed_experts": 160,
    "first_k_dense_replace": 1,
    "num_experts_per_tok": 6,
    "topk_method": "group_limited_greedy",
    "n_group": 8,
    "topk_group": 3,
    "routed_scaling_factor": 16.0,
}

CASE = Case(
    {
        **{name: value for name, value in BASE.items() if name != "head_dim"},
        **deepseek_v3.LATENT,
        **GROUPED,
        "topk_method": "group_limited_greedy",
        "first_k_dense_replace": 1,
        "rope_parameters": deepseek_v3.YARN,
    },
    "DeepseekV2ForCausalLM",
    variants=(
        {
            "q_lora_rank": None,
            "attention_bias": True,
            "mlp_bias": True,
            "topk_method": "greedy",
            "tie_word_embeddings": True,
            "first_k_dense_replace": 0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        {
            "attention_bias": True,
            "mlp_bias": True,
            "first_k_dense_replace": 2,
            "qk_nope_head_dim": 16,
            "v_head_dim": 24,
            "n_group": 2,
            "topk_group": 1,
            "n_shared_experts": 1,
            "rope_parameters": {**deepseek_v3.YARN, "mscale_all_dim": 1.0},
        },
    ),
    presets={
        "DeepSeek-V2": Preset(FULL, 235_741_434_880),
        "DeepSeek-V2-Lite": Preset(LITE, 15_706_484_224),
    },
)
