"""Mellum 2 (JetBrains, 2026): a rotation per kind of layer, full or windowed; dense layers by config."""

from jaxmoe.interop.config_json import ConfigReader
from jaxmoe.interop.families import common, layouts
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.families.rotation import rope_spec, rotation_of
from jaxmoe.interop.rules import Rule
from jaxmoe.model.mixers.grouped_query import AttentionSpec
from jaxmoe.model.spec import ModelSpec


def _spec(config: ConfigReader) -> ModelSpec:
    common.check_constants(config)
    norm = common.rms_norm(config)

    def attention(window: int | None) -> AttentionSpec:
        given = rotation_of(config, "full_attention" if window is None else "sliding_attention")
        rope = rope_spec(config, given)
        return common.attention(config, rope, "attention_bias", head_norm=norm, window=window)

    return common.model_spec(
        config,
        [attention(window) for window in common.windows(config)],
        common.by_type(config, common.dense(config), common.moe(config, common.router(config))),
        norm,
    )


def _rules(spec: ModelSpec) -> tuple[Rule, ...]:
    return layouts.decoder_rules(spec, *layouts.mlp_rules(), *layouts.expert_rules())


FAMILY = Family(
    "mellum",
    _spec,
    _rules,
    ignored=(r"^mtp\.",),  # predict the token after the next
    unused_fields=frozenset(
        {"mtp_layer_types", "mtp_mlp_layer_types", "num_mtp_layers", "num_nextn_predict_layers"}
    ),
)
