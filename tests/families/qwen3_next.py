from families import BASE, Case, Preset

DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 22,
    "linear_value_head_dim": 26,
    "linear_conv_kernel_dim": 4,
}
"""Rows of 75 tokens are longer than a chunk of 64, and no multiple of it.

Narrow heads read little of a state, which their norm then makes large with all its rounding: of heads of 6 and an eps
of 1e-5, one rounding of every weight moves transformers' logits by up to 8e-4 of their largest; of these by 3e-5.
"""

CASE = Case(
    {
        **BASE,
        **DELTA,
        "rms_norm_eps": 1e-2,
        "num_hidden_layers": 5,
        "intermediate_size": 56,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 32,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "mlp_only_layers": [2],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
        },
    },
    "Qwen3NextForCausalLM",
    variants=(
        {
            "norm_topk_prob": False,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "decoder_sparse_step": 2,
            "linear_conv_kernel_dim": 3,
            "linear_num_key_heads": 4,
            "layer_types": ["full_attention", "linear_attention"] * 2 + ["linear_attention"],
        },
    ),
    balance=True,
    packs=False,
    presets={"Qwen3-Next-80B-A3B": Preset({}, 79_674_391_296)},
)
