"""MiniMax-Text-01 (arXiv 2501.08313): lightning attention in most layers, residuals that go on from the norm."""

from collections.abc import Mapping
from typing import Any

from jaxmoe.errors import UserError
from jaxmoe.interop.config_json import ConfigReader
from jaxmoe.interop.families import common, layouts
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.families.layouts import LAYER
from jaxmoe.interop.families.mistakes import Mistake
from jaxmoe.interop.families.rotation import rope_spec
from jaxmoe.interop.rules import Rule
from jaxmoe.model.mixers.lightning import LightningSpec
from jaxmoe.model.mixers.rope import RopeSpec
from jaxmoe.model.norms import NormSpec
from jaxmoe.model.spec import ModelSpec

# Published configs say these of the original code; transformers' model has no other way.
_UNREAD = {"postnorm": True, "shared_intermediate_size": 0, "shared_moe_mode": "sigmoid"}


def _spec(config: ConfigReader) -> ModelSpec:
    common.check_constants(config, _UNREAD)
    config.take("block_size")  # tokens that transformers computes at once
    attention = common.attention(config, _rope(config), window=config.take("sliding_window", None))
    mixers = {
        "full_attention": attention,
        "linear_attention": LightningSpec(
            num_heads=attention.num_heads,
            head_dim=attention.head_dim,
            norm=NormSpec(1e-6),  # whatever rms_norm_eps says
            depth=common.depth(config),
        ),
    }
    router = common.router(
        config,
        num_experts=config.size("num_local_experts"),
        renormalize=True,
        weight_dtype="float32",
        jitter=config.number("router_jitter_noise", 0.0, zero=True),
    )

    def scales(part: str) -> tuple[float, float]:
        return config.number(f"{part}_alpha_factor"), config.number(f"{part}_beta_factor")

    around = {"full_attention": scales("full_attn"), "linear_attention": scales("linear_attn")}
    layer = {"placement": "normed", "ffn_scales": scales("mlp")}
    types = common.kinds(config, "layer_types", tuple(mixers))
    return common.model_spec(
        config,
        [mixers[kind] for kind in types],
        common.moe(config, router, "intermediate_size"),
        common.rms_norm(config),
        layer=[layer | {"mixer_scales": around[kind]} for kind in types],
    )


def _rope(config: ConfigReader) -> RopeSpec:
    """Of whole heads, unless published configs have a ``rotary_dim``, of which transformers' model does not know."""
    width = common.head_dim(config)
    if config.take("rotary_dim", None) in (None, width):
        return rope_spec(config)
    rotary = config.size("rotary_dim")
    if rotary > width:
        raise UserError(f"{config.file}: rotary_dim = {rotary}: expected at most head_dim, which is {width}")
    given = {**config.take("rope_parameters"), "partial_rotary_factor": rotary / width}
    return rope_spec(config, given, partial=True)


def _rules(spec: ModelSpec) -> tuple[Rule, ...]:
    own, module = "layers.{L}.lightning.", LAYER + "self_attn."
    return layouts.decoder_rules(
        spec,
        *layouts.expert_rules("block_sparse_moe", ("w1", "w3", "w2")),
        Rule(own + "qkv_proj", module + "qkv_proj.weight", "Q D"),
        Rule(own + "gate_proj", module + "output_gate.weight", "P D"),
        Rule(own + "norm", module + "norm.weight", "P"),
        Rule(own + "out_proj", module + "out_proj.weight", "D P"),
    )


def _whole_heads(config: Mapping[str, Any]) -> str | None:
    """Of modeling_minimax.py, which does not read ``rotary_dim``."""
    rotary = config.get("rotary_dim")
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    if rotary in (None, width):
        return None
    return (
        f"rotates all {width} features of a head whatever rotary_dim says; read with rotary_dim = {rotary}, as the "
        f"original code does. If it was trained with that version, set rotary_dim to {width}"
    )


FAMILY = Family(
    "minimax",
    _spec,
    _rules,
    # Powers of the decay, which follow from config.json. New folders lack them, and transformers computes them then.
    ignored=(r"\.self_attn\.(slope_rate|query_decay|key_decay|diagonal_decay)$",),
    mistakes=(Mistake((4, 53), (5, 25), _whole_heads),),
)
