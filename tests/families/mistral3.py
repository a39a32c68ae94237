from families import Case, mistral4

TEXT = {"model_type": "mistral4"}

CASE = Case(
    {
        "tie_word_embeddings": False,
        "image_token_index": 0,  # not among the tokens of the tests
        "text_config": {**mistral4.CONFIG, **TEXT},
        "vision_config": {
            "model_type": "pixtral",
            "hidden_size": 12,
            "intermediate_size": 20,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "head_dim": 6,
            "image_size": 8,
            "patch_size": 2,
        },
    },
    "Mistral3ForConditionalGeneration",
    variants=({"text_config": mistral4.VARIANT, "tie_word_embeddings": True},),
    presets={"Mistral-Small-4-119B": mistral4.SMALL},
)
