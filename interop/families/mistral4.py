"""Mistral Small 4's text model: latent attention whose queries grow with position, softmax router with groups."""

from jaxmoe.errors import UserError, quote
from jaxmoe.interop.config_json import ConfigReader, is_positive
from jaxmoe.interop.families import common, latent
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.families.layouts import LAYER
from jaxmoe.interop.families.rotation import rope_spec
from jaxmoe.interop.rules import Rule
from jaxmoe.model.feed_forward.router import Groups
from jaxmoe.model.mixers.latent import LatentAttentionSpec, QueryGrowth
from jaxmoe.model.spec import ModelSpec


def _spec(config: ConfigReader) -> ModelSpec:
    common.check_constants(config)
    router = common.router(
        config,
        num_experts=config.size("n_routed_experts"),
        softmax_dtype="model",
        groups=Groups(config.size("n_group"), config.size("topk_group"), "top2", masked=0.0),
        sum_offset=1e-20,
        scale=config.number("routed_scaling_factor"),
    )
    sparse = common.moe(config, router, shared=common.shared_experts(config, "n_shared_experts"))
    first = config.take("first_k_dense_replace")
    ffns = common.by_index(config, lambda index: index < first, common.dense(config), sparse)
    return common.model_spec(config, _attention(config), ffns, common.rms_norm(config))


def _attention(config: ConfigReader) -> LatentAttentionSpec:
    given = dict(config.take("rope_parameters"))
    given.pop("max_position_embeddings", None)  # the class's default has it, and nothing reads it
    growth = ("llama_4_scaling_beta", "original_max_position_embeddings")
    for name in growth:
        if not is_positive(given.get(name)):
            raise UserError(
                f"{config.file}: {name} = {quote(given.get(name))} of rope_parameters: expected a positive number, by "
                "which queries grow with their positions"
            )
    beta, length = given.pop(growth[0]), given[growth[1]]
    if given.get("rope_type", "default") == "default":
        raise UserError(
            f"{config.file}: rope type 'default' is not supported; expected another such as 'yarn': transformers' "
            "model would rotate whole heads"
        )
    rope = rope_spec(config, given, partial=True, interleaved=config.take("rope_interleave"))
    shared = config.size("qk_rope_head_dim")
    if rope.rotary_dim != shared:
        raise UserError(
            f"{config.file}: partial_rotary_factor = {given.get('partial_rotary_factor')!r} rotates {rope.rotary_dim} "
            f"features: expected qk_rope_head_dim of them, {shared}"
        )
    return latent.latent_attention(config, rope, growth=QueryGrowth(beta, length))


def _rules(spec: ModelSpec) -> tuple[Rule, ...]:
    experts = (
        Rule("layers.{L}.router.weight", LAYER + "mlp.gate.weight", "E D"),
        Rule("layers.{L}.experts.gate_up", LAYER + "mlp.experts.gate_up_proj", "E (G F) D"),
        Rule("layers.{L}.experts.down", LAYER + "mlp.experts.down_proj", "E D F"),
    )
    return latent.decoder_rules(spec, experts=experts)


FAMILY = Family("mistral4", _spec, _rules, unused_fields=frozenset({"pretraining_tp"}))
