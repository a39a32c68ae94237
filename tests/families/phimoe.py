from families import BASE, Case, Preset

CASE = Case(
    {
        **{name: value for name, value in BASE.items() if name != "head_dim"},
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "router_jitter_noise": 0.2,
        "attention_bias": True,
        "lm_head_bias": True,
        "sliding_window": 9,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 80,
            "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0],
            "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0],
            "short_mscale": 1.243,
            "long_mscale": 1.243,
        },
    },
    "PhimoeForCausalLM",
    variants=(
        {
            "attention_bias": False,
            "lm_head_bias": False,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "router_jitter_noise": 0.01,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    balance=True,
    # The defaults of its class but for biases, as transformers counts them.
    presets={"Phi-3.5-MoE": Preset({"attention_bias": True, "lm_head_bias": True}, 41_873_153_344)},
)
