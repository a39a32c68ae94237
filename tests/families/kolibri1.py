from families import BASE, Case, Preset

CASE = Case(
    {
        **BASE,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 32,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "sliding_window": 9,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "Kolibri1ForCausalLM",
    variants=({"norm_topk_prob": True, "tie_word_embeddings": True, "layer_types": None},),
    # The defaults of its class, as transformers counts them.
    presets={"Kolibri-1": Preset({}, 78_103_055_360)},
    scales={"correction": 1.0},
)
