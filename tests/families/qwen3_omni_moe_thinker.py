from families import Case, Preset, qwen3_vl_moe

CONFIG = {
    "tie_word_embeddings": False,
    "text_config": qwen3_vl_moe.TEXT,
    "vision_config": qwen3_vl_moe.VISION,
    "audio_config": {
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 20,
        "d_model": 12,
        "num_mel_bins": 16,
        "output_dim": 40,
        "downsample_hidden_size": 4,
        "max_source_positions": 20,
    },
}

VARIANT = {
    "text_config": {
        "norm_topk_prob": False,
        "attention_bias": True,
        "mlp_only_layers": [1],
        "decoder_sparse_step": 1,
    },
    "tie_word_embeddings": True,
}

OMNI = Preset(
    {
        "vocab_size": 152064,
        "num_hidden_layers": 48,
        "head_dim": 128,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    30_221_219_840 + 152_064 * 2_048,
)

CASE = Case(
    CONFIG,
    "Qwen3OmniMoeThinkerForConditionalGeneration",
    variants=(VARIANT,),
    balance=True,
    presets={"Qwen3-Omni-30B-A3B, thinker alone": OMNI},
)
