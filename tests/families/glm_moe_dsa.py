from families import Case, Preset, deepseek_v3

INDEXER = {"index_topk": 11, "index_n_heads": 16, "index_head_dim": 18}
"""Keys that queries choose from number 7 times as many. Scores of zero for several keys come of few heads, and then
libraries choose differently."""

CASE = Case(
    {
        **deepseek_v3.CASE.config,
        **INDEXER,
        "index_topk_freq": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "GlmMoeDsaForCausalLM",
    scales=deepseek_v3.CASE.scales,
    variants=(
        {
            "attention_bias": True,
            "norm_topk_prob": False,
            "tie_word_embeddings": True,
            "mlp_layer_types": ["dense", "sparse", "dense", "sparse"],
            "n_group": 1,
            "topk_group": 1,
            "indexer_types": ["full", "shared", "shared", "full"],
            "rope_parameters": deepseek_v3.YARN,
        },
        # Repeated are a layer that shares and one after it, so that a selection goes from repeat to repeat.
        {"num_hidden_layers": 5, "indexer_types": ["full", "shared", "full", "shared", "full"]},
    ),
    presets={"GLM-5": Preset({}, 743_911_199_232)},
)
