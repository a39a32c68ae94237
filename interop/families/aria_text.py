"""Aria's text model (arXiv 2410.05993): weights are a softmax over the chosen, shared experts, matrices transposed."""

from jaxmoe.interop.config_json import MAX_LAYERS, ConfigReader
from jaxmoe.interop.families import common
from jaxmoe.interop.families.common import LAYER
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.families.rotation import rope_spec
from jaxmoe.interop.rules import Rule
from jaxmoe.model.feed_forward.mlp import MLPSpec
from jaxmoe.model.feed_forward.moe import MoESpec, SharedSpec
from jaxmoe.model.feed_forward.router import RouterSpec
from jaxmoe.model.mixers.grouped_query import AttentionSpec
from jaxmoe.model.norms import NormSpec
from jaxmoe.model.spec import LayerSpec, ModelSpec


def _spec(config: ConfigReader) -> ModelSpec:
    config.expect("hidden_act", "silu")
    norm = NormSpec(config.number("rms_norm_eps"))
    head_dim, bias = common.head_dim(config), config.take("attention_bias")
    hidden = config.size("intermediate_size")
    config.expect("moe_intermediate_size", hidden, None)  # older configs had this for experts
    layer = LayerSpec(
        mixer=AttentionSpec(
            num_heads=config.size("num_attention_heads"),
            num_kv_heads=config.size("num_key_value_heads"),
            head_dim=head_dim,
            rope=rope_spec(config, head_dim, whole=True),
            bias=bias,
            output_bias=bias,
        ),
        ffn=MoESpec(
            router=RouterSpec(
                num_experts=config.size("moe_num_experts"),
                top_k=config.size("moe_topk"),
                renormalize=False,
                weight_dtype="model",
                score="logits",
                softmax_dtype="model",
            ),
            hidden=hidden,
            shared=SharedSpec(
                MLPSpec(hidden * config.size("moe_num_shared_experts"), bias=config.take("mlp_bias"))
            ),
        ),
        norm=norm,
    )
    return common.model_spec(config, [layer] * config.size("num_hidden_layers", MAX_LAYERS), norm)


def _rules(spec: ModelSpec) -> tuple[Rule, ...]:
    return (
        *common.trunk_rules(spec.tie_embeddings),
        *common.norm_rules(),
        *common.attention_rules(),
        *common.shared_rules("mlp.shared_experts"),
        Rule("layers.{L}.router.weight", LAYER + "mlp.router.weight", "E D"),
        Rule("layers.{L}.experts.gate_up", LAYER + "mlp.experts.fc1.weight", "E D (G F)"),
        Rule("layers.{L}.experts.down", LAYER + "mlp.experts.fc2.weight", "E F D"),
    )


FAMILY = Family(
    "aria_text", _spec, _rules, unused_fields=frozenset({"num_experts_per_tok", "pretraining_tp"})
)
