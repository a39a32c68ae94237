from helpers import tiny

from families import Case, Preset

CASE = Case(
    tiny.CONFIGS["olmoe"],
    "OlmoeForCausalLM",
    variants=(
        {"norm_topk_prob": True, "clip_qkv": None, "attention_bias": True, "tie_word_embeddings": True},
    ),
    balance=True,
    presets={"OLMoE-1B-7B": Preset({"intermediate_size": 1024}, 6_919_161_856)},
)
