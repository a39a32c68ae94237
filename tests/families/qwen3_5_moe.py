from families import Case, qwen3_5_moe_text

VISION = {
    "depth": 1,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_heads": 2,
    "out_hidden_size": 40,
    "patch_size": 2,
    "num_position_embeddings": 16,
}


def published(tensors):
    """Experts of a layer in one tensor, as transformers has them in memory, and a layer that predicts further ahead."""
    import torch

    experts = [name for name in tensors if ".experts." in name]
    kept = {name: tensor for name, tensor in tensors.items() if name not in experts}
    for block in sorted({name.partition(".experts.")[0] for name in experts}):

        def stacked(word, block=block):
            count = sum(name.startswith(f"{block}.experts.") for name in experts) // 3
            return torch.stack([tensors[f"{block}.experts.{index}.{word}.weight"] for index in range(count)])

        gate_up = torch.cat([stacked("gate_proj"), stacked("up_proj")], dim=1)
        kept |= {f"{block}.experts.gate_up_proj": gate_up, f"{block}.experts.down_proj": stacked("down_proj")}
    return kept | {"mtp.norm.weight": tensors["model.language_model.norm.weight"].clone()}


CASE = Case(
    {"tie_word_embeddings": False, "text_config": qwen3_5_moe_text.CONFIG, "vision_config": VISION},
    "Qwen3_5MoeForConditionalGeneration",
    variants=({"text_config": qwen3_5_moe_text.VARIANT, "tie_word_embeddings": True},),
    balance=True,
    packs=False,
    presets=qwen3_5_moe_text.PRESETS,
    published=published,
)
