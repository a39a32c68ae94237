from families import BASE, GROUPED, Case, Preset

CASE = Case(
    {
        **BASE,
        **GROUPED,
        "norm_topk_prob": True,
        "first_k_dense_replace": 1,
        "sliding_window": 9,
        "max_window_layers": 2,
    },
    "Dots1ForCausalLM",
    scales={"e_score_correction_bias": 0.6},  # some of those kept are below 0
    variants=(
        {
            "norm_topk_prob": False,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "first_k_dense_replace": 0,
            "n_group": 1,
            "topk_group": 1,
            "sliding_window": None,
        },
    ),
    presets={
        # As transformers' model on the meta device counts.
        "dots.llm1": Preset(
            {
                "hidden_size": 4096,
                "n_routed_experts": 128,
                "n_shared_experts": 2,
                "num_experts_per_tok": 6,
                "first_k_dense_replace": 1,
                "norm_topk_prob": True,
                "routed_scaling_factor": 2.5,
            },
            142_774_373_888,
        ),
    },
)
