"""gpt-oss (arXiv 2508.10925): windows on every other layer, a sink per head, biases everywhere, clamped experts."""

from jaxmoe.interop.config_json import ConfigReader
from jaxmoe.interop.families import common
from jaxmoe.interop.families.common import LAYER
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.families.rotation import rope_spec
from jaxmoe.interop.rules import Rule
from jaxmoe.kernels.expert_mlp import Activation
from jaxmoe.model.feed_forward.moe import MoESpec
from jaxmoe.model.feed_forward.router import RouterSpec
from jaxmoe.model.mixers.grouped_query import AttentionSpec
from jaxmoe.model.norms import NormSpec
from jaxmoe.model.spec import LayerSpec, ModelSpec


def _spec(config: ConfigReader) -> ModelSpec:
    config.expect("hidden_act", "silu")
    config.expect("swiglu_alpha", 1.702)
    top_k = config.size("num_experts_per_tok")
    config.expect("experts_per_token", top_k, None)  # published configs say it twice
    norm = NormSpec(config.number("rms_norm_eps"), "rms_float32")
    head_dim, bias = common.head_dim(config), config.take("attention_bias")
    rope = rope_spec(config, head_dim, whole=True)
    sparse = MoESpec(
        router=RouterSpec(
            num_experts=config.size("num_local_experts"),
            top_k=top_k,
            renormalize=False,
            weight_dtype="model",
            score="logits",
            softmax_dtype="model",
            bias=True,
        ),
        hidden=config.size("intermediate_size"),
        activation=Activation("swiglu_clamped", config.number("swiglu_limit")),
        bias=True,
    )
    layers = [
        LayerSpec(
            AttentionSpec(
                num_heads=config.size("num_attention_heads"),
                num_kv_heads=config.size("num_key_value_heads"),
                head_dim=head_dim,
                rope=rope,
                bias=bias,
                output_bias=bias,
                window=window,
                sinks=True,
            ),
            sparse,
            norm,
        )
        for window in common.windows(config)
    ]
    return common.model_spec(config, layers, norm)


def _rules(spec: ModelSpec) -> tuple[Rule, ...]:
    moe = LAYER + "mlp."
    return (
        *common.trunk_rules(spec.tie_embeddings),
        *common.norm_rules(),
        *common.attention_rules(),
        Rule("layers.{L}.router.weight", moe + "router.weight", "E D"),
        Rule("layers.{L}.router.bias", moe + "router.bias", "E"),
        Rule("layers.{L}.experts.gate_up", moe + "experts.gate_up_proj", "E D (F G)"),
        Rule("layers.{L}.experts.gate_up_bias", moe + "experts.gate_up_proj_bias", "E (F G)"),
        Rule("layers.{L}.experts.down", moe + "experts.down_proj", "E F D"),
        Rule("layers.{L}.experts.down_bias", moe + "experts.down_proj_bias", "E D"),
    )


FAMILY = Family("gpt_oss", _spec, _rules, unused_fields=frozenset({"initial_context_length"}))
