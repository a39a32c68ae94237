from families import BASE, Case, Preset, deepseek_v3

CASE = Case(
    {
        **BASE,
        **deepseek_v3.LATENT,
        "head_dim": 22,
        "q_lora_rank": None,
        "rms_norm_eps": 1e-2,
        "num_hidden_layers": 5,
        "layer_group_size": 3,
        "first_k_dense_replace": 1,
        "intermediate_size": 56,
        "moe_intermediate_size": 24,
        "num_experts": 8,
        "num_shared_experts": 2,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 1.7,
        "kda_lower_bound": -3.0,
    },
    "BailingHybridForCausalLM",
    variants=(
        {
            "head_dim": 26,
            "q_lora_rank": 30,
            "attention_bias": True,
            "norm_topk_prob": False,
            "kda_safe_gate": False,
            "n_group": 1,
            "topk_group": 1,
            "short_conv_kernel_size": 3,
            "rope_parameters": deepseek_v3.YARN,
            "layer_types": ["full_attention", "linear_attention"] * 2 + ["linear_attention"],
            "mlp_layer_types": ["sparse", "dense", "sparse", "sparse", "dense"],
        },
    ),
    scales={"e_score_correction_bias": 0.6},  # some of those kept are below 0
    packs=False,
    presets={"Ling-3.0-Flash": Preset({}, 124_414_191_072)},
)
