from families import BASE, Case, Preset

CONFIG = {
    **BASE,
    "num_hidden_layers": 3,
    "intermediate_size": 24,
    "moe_num_experts": 6,
    "moe_topk": 2,
    "moe_num_shared_experts": 2,
}

VARIANT = {"attention_bias": True, "mlp_bias": True, "moe_num_shared_experts": 3}

# The number of parameters is that of transformers' model on the meta device.
ARIA = Preset(
    {
        "hidden_size": 2560,
        "intermediate_size": 1664,
        "num_hidden_layers": 28,
        "num_attention_heads": 20,
        "vocab_size": 100352,
        "moe_num_experts": 64,
        "moe_topk": 6,
        "max_position_embeddings": 65536,
    },
    24_869_091_840,
)

CASE = Case(
    CONFIG,
    "AriaTextForCausalLM",
    variants=({**VARIANT, "tie_word_embeddings": True},),
    presets={"Aria, text alone": ARIA},
)
