"""What families with multi-head latent attention share: reading it from a config.json, and its conversion rules."""

from typing import Any

from jaxmoe.errors import UserError
from jaxmoe.interop.config_json import ConfigReader
from jaxmoe.interop.families import layouts
from jaxmoe.interop.families.layouts import LAYER
from jaxmoe.interop.families.rotation import yarn_magnitude
from jaxmoe.interop.rules import Rule
from jaxmoe.model.mixers.latent import LatentAttentionSpec
from jaxmoe.model.mixers.rope import RopeSpec
from jaxmoe.model.norms import NormSpec
from jaxmoe.model.spec import ModelSpec

# Whatever rms_norm_eps says.
_NORM = NormSpec(1e-6)


def latent_attention(config: ConfigReader, rope: RopeSpec | None, **options: Any) -> LatentAttentionSpec:
    """Latent attention with the widths that the config has.

    Args:
        config: of the model.
        rope: rotation of the key that heads share; None where there is none.
        options: further fields of the spec.
    """
    heads = config.size("num_attention_heads")
    config.expect("num_key_value_heads", heads)
    config.take("qk_head_dim", None)  # the config class makes it of the two that follow
    key_dim, shared = config.size("qk_nope_head_dim"), config.size("qk_rope_head_dim")
    narrow_queries = config.take("q_lora_rank", None) is not None
    return LatentAttentionSpec(
        num_heads=heads,
        key_dim=key_dim,
        shared_dim=shared,
        value_dim=config.size("v_head_dim"),
        latent=config.size("kv_lora_rank"),
        query_latent=config.size("q_lora_rank") if narrow_queries else None,
        rope=rope,
        norm=_NORM,
        bias=config.take("attention_bias"),
        scale=None if rope is None else _score_scale(config, key_dim + shared),
        **options,
    )


def _score_scale(config: ConfigReader, width: int) -> float | None:
    """1/sqrt(width) times the square of YaRN's magnitude by mscale_all_dim; None where there is no such factor."""
    rope = config.take("rope_parameters")
    multiplier = rope.get("mscale_all_dim")
    if rope.get("rope_type", "default") == "default" or not multiplier:
        return None
    if rope.get("factor") is None:
        raise UserError(
            f"{config.file}: rope_parameters have mscale_all_dim = {multiplier!r} and no factor: expected both or "
            "neither"
        )
    return width**-0.5 * yarn_magnitude(rope["factor"], multiplier) ** 2


def attention_rules(module: str = "self_attn", output: str = "o_proj") -> tuple[Rule, ...]:
    """Latent attention, with or without a latent of queries, biases and a gate of heads.

    Args:
        module: that holds it.
        output: name of the output projection.
    """

    def rule(target: str, source: str, axes: str) -> Rule:
        return Rule("layers.{L}.attention." + target, f"{LAYER}{module}.{source}", axes)

    return (
        rule("q_proj", "q_proj.weight", "Q D"),
        rule("q_a_proj", "q_a_proj.weight", "A D"),
        rule("q_a_bias", "q_a_proj.bias", "A"),
        rule("q_a_norm", "q_a_layernorm.weight", "A"),
        rule("q_b_proj", "q_b_proj.weight", "Q A"),
        rule("kv_a_proj", "kv_a_proj_with_mqa.weight", "C D"),
        rule("kv_a_bias", "kv_a_proj_with_mqa.bias", "C"),
        rule("kv_a_norm", "kv_a_layernorm.weight", "C"),
        rule("kv_b_proj", "kv_b_proj.weight", "U C"),
        rule("o_proj", f"{output}.weight", "D P"),
        rule("o_bias", f"{output}.bias", "D"),
        rule("gate_proj", "g_proj.weight", "N D"),
    )


def decoder_rules(
    spec: ModelSpec, *further: Rule, experts: tuple[Rule, ...] | None = None
) -> tuple[Rule, ...]:
    """A whole model: latent attention, dense layers, experts and those that every token has.

    Args:
        spec: the model.
        further: rules of the family's own.
        experts: and routers, by default `layouts.expert_rules()`.
    """
    return layouts.decoder_rules(
        spec,
        *layouts.mlp_rules(),
        *(layouts.expert_rules() if experts is None else experts),
        *layouts.shared_rules("mlp.shared_experts"),
        *further,
        attention=attention_rules(),
    )
