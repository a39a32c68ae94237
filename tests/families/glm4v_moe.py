from families import BASE, GROUPED, Case, Preset

TEXT = {name: value for name, value in BASE.items() if name != "tie_word_embeddings"} | {
    **GROUPED,
    "first_k_dense_replace": 1,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [2, 1, 1],
    },
}


def with_rows(arguments):
    """Documents of a row are told apart by a first of four rows of positions."""
    return arguments | {"position_ids": arguments["position_ids"].expand(4, -1, -1)}


CASE = Case(
    {
        "tie_word_embeddings": False,
        "text_config": TEXT,
        "vision_config": {
            "depth": 1,
            "hidden_size": 12,
            "intermediate_size": 20,
            "num_heads": 2,
            "out_hidden_size": 40,
            "image_size": 8,
            "patch_size": 2,
        },
    },
    "Glm4vMoeForConditionalGeneration",
    variants=(
        {
            "text_config": {"norm_topk_prob": False, "attention_bias": False},
            "tie_word_embeddings": True,
        },
    ),
    balance=True,
    presets={
        "GLM-4.5V": Preset({"head_dim": 128, "vocab_size": 151552}, 106_231_488_512 + 151_552 * 4_096),
    },
    inputs=with_rows,
    scales={"e_score_correction_bias": 0.6},  # some of those kept are below 0
)
