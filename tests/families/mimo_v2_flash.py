from families import BASE, Case, Preset

CASE = Case(
    {
        **BASE,
        "intermediate_size": 56,
        "moe_intermediate_size": 24,
        "v_head_dim": 12,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 1.7,
        "sliding_window": 9,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.75},
        },
    },
    "MiMoV2FlashForCausalLM",
    variants=(
        {
            "norm_topk_prob": False,
            "attention_bias": True,
            "attention_value_scale": None,
            "tie_word_embeddings": True,
            "mlp_layer_types": ["sparse", "dense", "sparse", "dense"],
        },
    ),
    # The defaults of its class, as transformers counts them.
    presets={"MiMo-V2-Flash": Preset({}, 308_778_768_832)},
    scales={"sinks": 1.0},
)
