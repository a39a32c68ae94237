from families import BASE, Case, Preset

_SLIDING, _FULL = "sliding_attention", "full_attention"


def _published(depth, heads, yarn, **fields):
    """A model as poolside publishes it: every fourth layer sees all, the first is dense."""
    return {
        "num_hidden_layers": depth,
        "layer_types": [_SLIDING if layer % 4 else _FULL for layer in range(depth)],
        "num_attention_heads_per_layer": [heads if layer % 4 else 48 for layer in range(depth)],
        "gating": "per-head",
        "moe_routed_scaling_factor": 2.5,
        "rope_parameters": {
            _FULL: {"rope_type": "yarn", "rope_theta": 500000.0, "partial_rotary_factor": 0.5, **yarn},
            _SLIDING: {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        },
        **fields,
    }


CASE = Case(
    {
        **BASE,
        "intermediate_size": 56,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 28,
        "num_experts": 10,
        "num_experts_per_tok": 3,
        "moe_routed_scaling_factor": 1.7,
        "moe_router_logit_softcapping": 1.5,
        "sliding_window": 11,
        "layer_types": [_FULL, _SLIDING, _SLIDING, _FULL],
        "num_attention_heads_per_layer": [4, 6, 6, 8],
        "rope_parameters": {
            "original_max_position_embeddings": 16,
            _FULL: {
                "rope_type": "yarn",
                "rope_theta": 500000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "partial_rotary_factor": 0.5,
            },
            _SLIDING: {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        },
    },
    "LagunaForCausalLM",
    variants=(
        {
            "gating": "per-element",
            "attention_bias": True,
            "tie_word_embeddings": True,
            "moe_router_logit_softcapping": 0.0,
            "layer_types": [_SLIDING, _FULL] * 2,
            "mlp_layer_types": ["sparse", "dense", "sparse", "sparse"],
        },
        {
            "gating": "per-head",
            "layer_types": None,
            "num_attention_heads_per_layer": None,
            "rope_parameters": None,
        },
    ),
    balance=True,
    # Its dot stands for any letter: transformers renames "mlp.shared_expert." to "mlp.shared_experts.", and with it
    # "mlp.shared_experts", the name in memory, which PEFT writes.
    lost="mlp.shared_experts.",
    presets={
        # Fields of poolside's config.json as other implementations quote them, counted by transformers.
        "Laguna-XS-2.1": Preset(
            _published(
                40,
                64,
                {"factor": 32.0, "original_max_position_embeddings": 8192, "beta_fast": 64.0},
                max_position_embeddings=262144,
            ),
            33_442_617_088,
        ),
        "Laguna-S-2.1": Preset(
            _published(
                48,
                72,
                {"factor": 128.0, "original_max_position_embeddings": 8192},
                hidden_size=3072,
                intermediate_size=12288,
                moe_intermediate_size=1024,
                shared_expert_intermediate_size=1024,
                num_experts_per_tok=10,
                max_position_embeddings=1048576,
            ),
            117_561_977_600,
        ),
    },
)
