"""Qwen3-VL with experts (arXiv 2511.21631): its text model. The vision tower stays as it is.

Published folders have the matrices of experts the other way round than transformers writes them.
"""

from jaxmoe.interop.config_json import MAX_LAYERS, ConfigReader
from jaxmoe.interop.families import common
from jaxmoe.interop.families.common import LAYER
from jaxmoe.interop.families.family import Family, Prefix
from jaxmoe.interop.families.rotation import rope_spec
from jaxmoe.interop.rules import Rule
from jaxmoe.model.feed_forward.mlp import MLPSpec
from jaxmoe.model.feed_forward.moe import MoESpec
from jaxmoe.model.feed_forward.router import RouterSpec
from jaxmoe.model.mixers.grouped_query import AttentionSpec, QKNorm
from jaxmoe.model.norms import NormSpec
from jaxmoe.model.spec import LayerSpec, ModelSpec


def text_spec(config: ConfigReader, renormalize: bool) -> ModelSpec:
    """The text model of Qwen3's multimodal models.

    Args:
        config: of the text model.
        renormalize: the weights of the chosen experts sum to 1.
    """
    config.expect("hidden_act", "silu")
    config.expect("sliding_window", None)
    norm = NormSpec(config.number("rms_norm_eps"))
    head_dim, bias = common.head_dim(config), config.take("attention_bias")
    attention = AttentionSpec(
        num_heads=config.size("num_attention_heads"),
        num_kv_heads=config.size("num_key_value_heads"),
        head_dim=head_dim,
        rope=rope_spec(config, head_dim, sections=True, whole=True),
        qk_norm=QKNorm(norm, "head"),
        bias=bias,
        output_bias=bias,
    )
    sparse = MoESpec(
        router=RouterSpec(
            num_experts=config.size("num_experts"),
            top_k=config.size("num_experts_per_tok"),
            renormalize=renormalize,
            weight_dtype="model",
        ),
        hidden=config.size("moe_intermediate_size"),
    )
    dense = MLPSpec(config.size("intermediate_size"))
    dense_layers, step = config.take("mlp_only_layers", ()), config.size("decoder_sparse_step")
    layers = [
        LayerSpec(attention, dense if index in dense_layers or (index + 1) % step else sparse, norm)
        for index in range(config.size("num_hidden_layers", MAX_LAYERS))
    ]
    return common.model_spec(config, layers, norm)


def _spec(config: ConfigReader) -> ModelSpec:
    config.expect("norm_topk_prob", True, None)  # published configs say what transformers' model always does
    return text_spec(config, renormalize=True)


def _rules(spec: ModelSpec) -> tuple[Rule, ...]:
    gate_up, down = LAYER + "mlp.experts.gate_up_proj", LAYER + "mlp.experts.down_proj"
    return (
        *common.trunk_rules(spec.tie_embeddings),
        *common.norm_rules(),
        *common.attention_rules(),
        *common.mlp_rules(),
        Rule("layers.{L}.router.weight", LAYER + "mlp.gate.weight", "E D"),
        # Where either has the right shape, transformers takes the first.
        Rule("layers.{L}.experts.gate_up", gate_up, "E (G F) D"),
        Rule("layers.{L}.experts.gate_up", gate_up, "E D (G F)"),
        Rule("layers.{L}.experts.down", down, "E D F"),
        Rule("layers.{L}.experts.down", down, "E F D"),
    )


FAMILY = Family(
    "qwen3_vl_moe",
    _spec,
    _rules,
    ignored=(r"^model\.visual\.",),
    text=("text_config",),
    prefixes=(Prefix("model.language_model."),),
)
