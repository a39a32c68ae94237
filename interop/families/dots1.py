"""dots.llm1 (arXiv 2506.05767): DeepSeek-V3's router over attention with per-head norms and, by config, windows."""

from jaxmoe.interop.config_json import ConfigReader
from jaxmoe.interop.families import common
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.families.rotation import rope_spec
from jaxmoe.interop.rules import Rule
from jaxmoe.model.feed_forward.mlp import MLPSpec
from jaxmoe.model.feed_forward.moe import MoESpec, SharedSpec
from jaxmoe.model.mixers.grouped_query import AttentionSpec, QKNorm
from jaxmoe.model.norms import NormSpec
from jaxmoe.model.spec import LayerSpec, ModelSpec

# Published configs say these of the original code; transformers' model has no other way.
_UNREAD = {"moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc"}


def _spec(config: ConfigReader) -> ModelSpec:
    config.expect("hidden_act", "silu")
    for name, value in _UNREAD.items():
        config.expect(name, value, None)
    config.take("max_window_layers", None)  # layer_types already says what follows from it
    norm = NormSpec(config.number("rms_norm_eps"))
    head_dim, bias = common.head_dim(config), config.take("attention_bias")
    rope = rope_spec(config, head_dim, whole=True)
    hidden = config.size("moe_intermediate_size")
    sparse = MoESpec(
        router=common.grouped_sigmoid_router(config),
        hidden=hidden,
        shared=SharedSpec(MLPSpec(hidden * config.size("n_shared_experts"))),
    )
    dense, first = MLPSpec(config.size("intermediate_size")), config.take("first_k_dense_replace")
    layers = [
        LayerSpec(
            AttentionSpec(
                num_heads=config.size("num_attention_heads"),
                num_kv_heads=config.size("num_key_value_heads"),
                head_dim=head_dim,
                rope=rope,
                qk_norm=QKNorm(norm, "head"),
                bias=bias,
                output_bias=bias,
                window=window,
            ),
            dense if index < first else sparse,
            norm,
        )
        for index, window in enumerate(common.windows(config))
    ]
    return common.model_spec(config, layers, norm)


def _rules(spec: ModelSpec) -> tuple[Rule, ...]:
    return (
        *common.trunk_rules(spec.tie_embeddings),
        *common.norm_rules(),
        *common.attention_rules(),
        *common.mlp_rules(),
        *common.expert_rules("mlp", ("gate_proj", "up_proj", "down_proj")),
        common.correction_rule("mlp.gate.e_score_correction_bias"),
        *common.shared_rules("mlp.shared_experts"),
    )


FAMILY = Family(
    "dots1",
    _spec,
    _rules,
    unused_fields=frozenset({"aux_loss_alpha", "ep_size", "pretraining_tp", "seq_aux"}),
)
