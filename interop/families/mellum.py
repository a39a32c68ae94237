"""Mellum 2 (JetBrains, 2026): a rotation per kind of layer, full or windowed; dense layers by config."""

from typing import Any

from jaxmoe.errors import UserError
from jaxmoe.interop.config_json import ConfigReader
from jaxmoe.interop.families import common
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.families.rotation import rope_spec
from jaxmoe.interop.rules import Rule
from jaxmoe.model.feed_forward.mlp import MLPSpec
from jaxmoe.model.feed_forward.moe import MoESpec
from jaxmoe.model.feed_forward.router import RouterSpec
from jaxmoe.model.mixers.grouped_query import AttentionSpec, QKNorm
from jaxmoe.model.mixers.rope import RopeSpec
from jaxmoe.model.norms import NormSpec
from jaxmoe.model.spec import LayerSpec, ModelSpec


def _spec(config: ConfigReader) -> ModelSpec:
    config.expect("hidden_act", "silu")
    norm = NormSpec(config.number("rms_norm_eps"))
    head_dim, bias = common.head_dim(config), config.take("attention_bias")
    sparse = MoESpec(
        router=RouterSpec(
            num_experts=config.size("num_experts"),
            top_k=config.size("num_experts_per_tok"),
            renormalize=config.take("norm_topk_prob"),
            weight_dtype="model",
        ),
        hidden=config.size("moe_intermediate_size"),
    )
    ffns: dict[str, MLPSpec | MoESpec] = {
        "dense": MLPSpec(config.size("intermediate_size")),
        "sparse": sparse,
    }
    layers = [
        LayerSpec(
            AttentionSpec(
                num_heads=config.size("num_attention_heads"),
                num_kv_heads=config.size("num_key_value_heads"),
                head_dim=head_dim,
                rope=_rope(config, head_dim, "full_attention" if window is None else "sliding_attention"),
                qk_norm=QKNorm(norm, "head"),
                bias=bias,
                output_bias=bias,
                window=window,
            ),
            ffns[kind],
            norm,
        )
        for window, kind in zip(
            common.windows(config),
            common.kinds(config, "mlp_layer_types", ("dense", "sparse")),
            strict=True,
        )
    ]
    return common.model_spec(config, layers, norm)


def _rope(config: ConfigReader, width: int, kind: str) -> RopeSpec:
    given: dict[str, Any] = config.take("rope_parameters")
    if not isinstance(given.get(kind), dict):
        raise UserError(f"{config.file}: rope_parameters lack an object {kind!r}")
    return rope_spec(config, width, given[kind], whole=True)


def _rules(spec: ModelSpec) -> tuple[Rule, ...]:
    return (
        *common.trunk_rules(spec.tie_embeddings),
        *common.norm_rules(),
        *common.attention_rules(),
        *common.mlp_rules(),
        *common.expert_rules("mlp", ("gate_proj", "up_proj", "down_proj")),
    )


FAMILY = Family(
    "mellum",
    _spec,
    _rules,
    ignored=(r"^mtp\.",),  # predict the token after the next
    unused_fields=frozenset(
        {"mtp_layer_types", "mtp_mlp_layer_types", "num_mtp_layers", "num_nextn_predict_layers"}
    ),
)
