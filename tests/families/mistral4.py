from families import BASE, GROUPED, Case, Preset, deepseek_v3

YARN = {
    **deepseek_v3.YARN,
    "original_max_position_embeddings": 16,
    "llama_4_scaling_beta": 0.3,
    "partial_rotary_factor": 0.4,
}
"""Rotates 8 of 20 features. Queries grow four times in 75 tokens."""

CONFIG = {
    **{name: value for name, value in BASE.items() if name not in ("head_dim", "tie_word_embeddings")},
    **deepseek_v3.LATENT,
    **GROUPED,
    "first_k_dense_replace": 1,
    "rope_parameters": YARN,
}

VARIANT = {
    "q_lora_rank": None,
    "attention_bias": True,
    "rope_interleave": False,
    "norm_topk_prob": False,
    "first_k_dense_replace": 0,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "rope_parameters": {**YARN, "mscale_all_dim": 1.0},
}

SMALL = Preset({}, 118_972_826_624)

CASE = Case(
    {**CONFIG, "tie_word_embeddings": False},
    "Mistral4ForCausalLM",
    variants=({**VARIANT, "tie_word_embeddings": True},),
    presets={"Mistral-Small-4-119B": SMALL},
)
