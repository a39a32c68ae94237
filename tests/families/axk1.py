from families import Case, Preset, deepseek_v3

CASE = Case(
    {name: value for name, value in deepseek_v3.CASE.config.items() if name != "first_k_dense_replace"},
    "AXK1ForCausalLM",
    scales=deepseek_v3.CASE.scales,
    variants=(
        {
            "attention_bias": True,
            "rope_interleave": False,
            "norm_topk_prob": False,
            "tie_word_embeddings": True,
            "mlp_layer_types": ["dense", "sparse", "dense", "sparse"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        {
            "qk_nope_head_dim": 16,
            "v_head_dim": 24,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 1,
            "first_k_dense_replace": 2,
        },
    ),
    presets={"A.X-K1": Preset({}, 518_983_052_288)},
)
