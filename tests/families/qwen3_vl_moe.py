from families import BASE, Case, Preset

TEXT = {name: value for name, value in BASE.items() if name != "tie_word_embeddings"} | {
    "intermediate_size": 56,
    "moe_intermediate_size": 24,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
}

VISION = {
    "depth": 1,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_heads": 2,
    "out_hidden_size": 40,
    "patch_size": 2,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}


def published(tensors):
    return {
        name: tensor.transpose(1, 2) if ".mlp.experts." in name else tensor
        for name, tensor in tensors.items()
    }


CASE = Case(
    {"tie_word_embeddings": False, "text_config": TEXT, "vision_config": VISION},
    "Qwen3VLMoeForConditionalGeneration",
    variants=(
        {
            "text_config": {"attention_bias": True, "mlp_only_layers": [1], "decoder_sparse_step": 1},
            "tie_word_embeddings": True,
        },
    ),
    balance=True,
    presets={
        "Qwen3-VL-30B-A3B": Preset(
            {
                "num_hidden_layers": 48,
                "head_dim": 128,
                "num_attention_heads": 32,
                "num_key_value_heads": 4,
                "moe_intermediate_size": 768,
                "num_experts": 128,
                "num_experts_per_tok": 8,
            },
            30_220_957_696 + 311_164_928,
        ),
    },
    published=published,
)
