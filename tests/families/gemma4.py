from families import Case, gemma4_text, published

CASE = Case(
    {
        "tie_word_embeddings": True,
        "text_config": {**gemma4_text.CONFIG, "pad_token_id": 0},
        "vision_config": {
            "hidden_size": 12,
            "intermediate_size": 20,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "position_embedding_size": 16,
            "patch_size": 2,
        },
    },
    "Gemma4ForConditionalGeneration",
    variants=({"text_config": gemma4_text.VARIANT, "tie_word_embeddings": False},),
    presets={"Gemma-4-26B-A4B": published("Gemma-4-26B-A4B")},
)
