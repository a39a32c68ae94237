from families import BASE, Case, Preset

_UNKNOWN = ("head_dim", "rope_parameters")

CASE = Case(
    {
        **{name: value for name, value in BASE.items() if name not in _UNKNOWN},
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 0,
        "intermediate_size": 56,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "mamba_d_state": 11,
        "mamba_d_conv": 4,
        "mamba_expand": 3,
        "mamba_dt_rank": 8,
    },
    "JambaForCausalLM",
    variants=(
        {
            "tie_word_embeddings": True,
            "attn_layer_offset": 0,
            "expert_layer_offset": 1,
            "mamba_conv_bias": False,
            "mamba_d_conv": 3,
        },
    ),
    balance=True,
    packs=False,
    presets={
        "Jamba-v0.1": Preset({}, 51_570_323_328),
        "Jamba-1.5-Large": Preset(
            {
                "hidden_size": 8192,
                "intermediate_size": 24576,
                "num_hidden_layers": 72,
                "num_attention_heads": 64,
            },
            398_555_145_696,
        ),
    },
)
