from families import Case, aria_text

CASE = Case(
    {
        "tie_word_embeddings": False,
        "image_token_index": 0,  # not among the tokens of the tests
        "text_config": aria_text.CONFIG,
        "vision_config": {
            "model_type": "idefics3_vision",
            "hidden_size": 12,
            "intermediate_size": 20,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 8,
            "patch_size": 2,
        },
        "projector_patch_to_query_dict": {"16": 4},
    },
    "AriaForConditionalGeneration",
    variants=({"text_config": aria_text.VARIANT, "tie_word_embeddings": True},),
    presets={"Aria": aria_text.ARIA},
)
