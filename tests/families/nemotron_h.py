from families import BASE, Case, Preset

MAMBA = {
    "mamba_num_heads": 6,
    "mamba_head_dim": 22,
    "ssm_state_size": 26,
    "n_groups": 3,
    "conv_kernel": 4,
}

KINDS = {"M": "linear_attention", "*": "full_attention", "E": "moe", "-": "mlp"}


def of_pattern(pattern):
    return [KINDS[letter] for letter in pattern]


_UNKNOWN = ("num_hidden_layers", "rms_norm_eps", "rope_parameters")

CASE = Case(
    {
        **{name: value for name, value in BASE.items() if name not in _UNKNOWN},
        **MAMBA,
        "layers_block_type": of_pattern("ME*M-E"),
        "layer_norm_epsilon": 1e-2,
        "time_step_min": 0.7,
        "intermediate_size": 56,
        "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 32,
        "moe_latent_size": 28,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 1.7,
    },
    "NemotronHForCausalLM",
    variants=(
        {
            "layers_block_type": of_pattern("EMEM*"),
            "use_conv_bias": False,
            "conv_kernel": 3,
            "moe_latent_size": None,
            "norm_topk_prob": False,
            "n_groups": 2,
        },
    ),
    packs=False,
    presets={
        "Nemotron-3-Nano-30B-A3B": Preset(
            {
                "layers_block_type": of_pattern("MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"),
                "hidden_size": 2688,
                "intermediate_size": 1856,
                "num_key_value_heads": 2,
                "mamba_num_heads": 64,
                "n_routed_experts": 128,
                "num_experts_per_tok": 6,
                "moe_intermediate_size": 1856,
                "moe_shared_expert_intermediate_size": 3712,
                "routed_scaling_factor": 2.5,
            },
            31_577_937_344,
        ),
    },
)
