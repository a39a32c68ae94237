"""Qwen3.5 with experts (Qwen, 2026): Qwen3-Next's layers, with Gated DeltaNet's input projections apart."""

from jaxmoe.interop.config_json import ConfigReader
from jaxmoe.interop.families import common, layouts, qwen3_next
from jaxmoe.interop.families.family import Family, Prefix
from jaxmoe.interop.rules import Rule
from jaxmoe.model.spec import ModelSpec

# Published configs say what transformers' model always does, or has no code for. At any other value the model would
# not be the one that its config describes.
_UNREAD = {
    "attn_output_gate": True,
    "mamba_ssm_dtype": "float32",
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}


def _spec(config: ConfigReader) -> ModelSpec:
    common.check_constants(config, _UNREAD)
    config.take("full_attention_interval", None)  # layer_types say what follows from it
    norm = common.rms_norm(config, "rms_centred")
    sparse = common.moe(config, common.router(config, renormalize=True), shared=qwen3_next.shared(config))
    mixers = qwen3_next.mixers(config, norm, by_key_head=False, sections=True)
    return common.model_spec(config, mixers, sparse, norm)


def _rules(spec: ModelSpec) -> tuple[Rule, ...]:
    projections = {"in_proj_qkv": "X D", "in_proj_z": "P D", "in_proj_b": "N D", "in_proj_a": "N D"}
    return layouts.decoder_rules(
        spec,
        *layouts.expert_rules(),
        *qwen3_next.shared_rules(),
        *qwen3_next.delta_rules(*projections.items()),
    )


FAMILY = Family(
    "qwen3_5_moe_text",
    _spec,
    _rules,
    ignored=(r"^mtp\.", r"^model\.visual\."),
    unused_fields=frozenset({"mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"}),
    # Those of folders with a vision tower, which transformers' text model reads too, and writes again.
    prefixes=(Prefix("model.language_model."), Prefix()),
)
