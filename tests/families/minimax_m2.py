from families import BASE, Case, Preset

CASE = Case(
    {
        **BASE,
        "num_hidden_layers": 3,
        "intermediate_size": 24,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "rotary_dim": 8,
    },
    "MiniMaxM2ForCausalLM",
    variants=(
        {
            "tie_word_embeddings": True,
            "rotary_dim": 16,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    balance=True,
    presets={"MiniMax-M2": Preset({"rotary_dim": 64}, 228_689_748_992)},
)
