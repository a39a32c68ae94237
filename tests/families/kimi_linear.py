from families import BASE, Case, Preset, deepseek_v3

LINEAR = {"head_dim": 22, "num_heads": 3, "short_conv_kernel_size": 4}

CASE = Case(
    {
        **{name: value for name, value in BASE.items() if name not in ("head_dim", "rope_parameters")},
        **deepseek_v3.LATENT,
        "q_lora_rank": None,
        "rms_norm_eps": 1e-2,
        "num_hidden_layers": 5,
        "intermediate_size": 56,
        "moe_intermediate_size": 24,
        "num_experts": 8,
        "num_shared_experts": 2,
        "num_experts_per_token": 3,
        "num_expert_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 1.7,
        "linear_attn_config": LINEAR,
    },
    "KimiLinearForCausalLM",
    variants=(
        # Counted from 1, as in published configs.
        {"linear_attn_config": {**LINEAR, "full_attn_layers": [3], "kda_layers": [1, 2, 4, 5]}},
        {
            "q_lora_rank": 30,
            "attention_bias": True,
            "moe_renormalize": False,
            "num_expert_group": 1,
            "topk_group": 1,
            "linear_attn_config": {"head_dim": 26, "num_heads": 2, "short_conv_kernel_size": 3},
            "layer_types": ["full_attention", "linear_attention"] * 2 + ["linear_attention"],
            "mlp_layer_types": ["sparse", "dense", "sparse", "sparse", "dense"],
        },
    ),
    scales={"e_score_correction_bias": 0.6},  # some of those kept are below 0
    packs=False,
    presets={
        "Kimi-Linear-48B-A3B": Preset(
            {
                "linear_attn_config": {
                    "full_attn_layers": [4, 8, 12, 16, 20, 24, 27],
                    "kda_layers": [layer for layer in range(1, 27) if layer % 4],
                    "head_dim": 128,
                    "num_heads": 32,
                    "short_conv_kernel_size": 4,
                },
            },
            49_122_675_072,
        ),
    },
)
