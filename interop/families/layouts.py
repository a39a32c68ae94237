"""Conversion rules that several families share: parameters by the names of their tensors."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from jaxmoe.interop.rules import Rule
from jaxmoe.model.spec import ModelSpec

LAYER = "model.layers.{L}."
GATED = ("gate_proj", "up_proj", "down_proj")


def trunk_rules(tied: bool) -> tuple[Rule, ...]:
    """Embedding, final norm and output head, with whichever biases the spec has."""
    embed = Rule("embed", "model.embed_tokens.weight", "V D", copies=("lm_head.weight",) if tied else ())
    norm = (Rule("norm", "model.norm.weight", "D"), Rule("norm_bias", "model.norm.bias", "D"))
    head = (Rule("lm_head", "lm_head.weight", "V D"), Rule("lm_head_bias", "lm_head.bias", "V"))
    return (embed, *norm, *(head[1:] if tied else head))


PRE_NORMS: Mapping[str, str] = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def norm_rules(modules: Mapping[str, str] = PRE_NORMS) -> tuple[Rule, ...]:
    """The norms of a layer, with their biases where the spec has any.

    Args:
        modules: the module of each norm; by default those of most pre-norm layers.
    """
    return tuple(
        Rule("layers.{L}." + name + ours, LAYER + module + theirs, "D")
        for name, module in modules.items()
        for ours, theirs in (("", ".weight"), ("_bias", ".bias"))
    )


def attention_rules(
    query_norm: str = "H", key_norm: str = "H", gate: str = "gate_proj", gate_axes: str = "P D"
) -> tuple[Rule, ...]:
    """Grouped-query attention, with whichever biases, norms, sinks and gate the spec has.

    Args:
        query_norm, key_norm: axes of the norms' scales.
        gate: module of the gate.
        gate_axes: of its matrix; "N D" of one that is a number per head.
    """

    def rule(target: str, source: str, axes: str) -> Rule:
        return Rule("layers.{L}.attention." + target, LAYER + "self_attn." + source, axes)

    projections = {"q": "Q D", "k": "U D", "v": "W D", "o": "D P"}
    return (
        *(rule(f"{name}_proj", f"{name}_proj.weight", axes) for name, axes in projections.items()),
        *(rule(f"{name}_bias", f"{name}_proj.bias", axes.split()[0]) for name, axes in projections.items()),
        rule("gate_proj", f"{gate}.weight", gate_axes),
        rule("q_norm", "q_norm.weight", query_norm),
        rule("k_norm", "k_norm.weight", key_norm),
        rule("sinks", "sinks", "N"),
    )


def mamba2_rules(block: str) -> tuple[Rule, ...]:
    """Mamba 2 in module `block`."""
    own, module = "layers.{L}.mamba.", f"{LAYER}{block}."
    return (
        Rule(own + "step_bias", module + "dt_bias", "N"),
        Rule(own + "decay", module + "A_log", "N"),
        Rule(own + "skip", module + "D", "N"),
        Rule(own + "convolution", module + "conv1d.weight", "X J c"),
        Rule(own + "convolution_bias", module + "conv1d.bias", "X"),
        Rule(own + "in_proj", module + "in_proj.weight", "X D"),
        Rule(own + "norm", module + "norm.weight", "P"),
        Rule(own + "out_proj", module + "out_proj.weight", "D P"),
    )


def expert_rules(
    block: str = "mlp", words: tuple[str, str, str] = GATED, routers: Sequence[str] = ("gate",)
) -> tuple[Rule, ...]:
    """Router and experts: one by one under `block`, or fused under ``mlp`` as transformers holds them in memory.

    Args:
        block: module that holds them.
        words: names of gate, up and down.
        routers: module of the router's matrix; the second one, if any, as transformers names it in memory.
    """
    gate, up, down = words
    gate_up = f"{block}.experts.{{E}}.{{G:{gate}|{up}}}.weight"
    sources = dict.fromkeys(f"{module}.{router}.weight" for module in (block, "mlp") for router in routers)
    return (
        *(Rule("layers.{L}.router.weight", LAYER + source, "E D") for source in sources),
        Rule("layers.{L}.experts.gate_up", LAYER + gate_up, "F D"),
        Rule("layers.{L}.experts.gate_up", LAYER + "mlp.experts.gate_up_proj", "E (G F) D"),
        Rule("layers.{L}.experts.down", LAYER + f"{block}.experts.{{E}}.{down}.weight", "D F"),
        Rule("layers.{L}.experts.down", LAYER + "mlp.experts.down_proj", "E D F"),
    )


def shared_rules(block: str) -> tuple[Rule, ...]:
    """The gated feed-forward in module `block` that every token of a MoE layer goes through."""
    return (
        Rule("layers.{L}.shared.gate_up", LAYER + block + ".{G:gate_proj|up_proj}.weight", "I D"),
        Rule("layers.{L}.shared.down", LAYER + block + ".down_proj.weight", "D I"),
        Rule("layers.{L}.shared.gate_up_bias", LAYER + block + ".{G:gate_proj|up_proj}.bias", "I"),
        Rule("layers.{L}.shared.down_bias", LAYER + block + ".down_proj.bias", "D"),
    )


def correction_rules(*sources: str, axes: str = "E") -> tuple[Rule, ...]:
    """The constant per expert that is added to the scores for the choice alone, by its name in each layout."""
    return tuple(Rule("layers.{L}.router.correction", LAYER + source, axes) for source in sources)


def mlp_rules(block: str = "mlp") -> tuple[Rule, ...]:
    """Dense gated feed-forward in module `block`, with biases where the spec has them."""
    return (
        Rule("layers.{L}.mlp.gate_up", LAYER + block + ".{G:gate_proj|up_proj}.weight", "I D"),
        Rule("layers.{L}.mlp.down", LAYER + block + ".down_proj.weight", "D I"),
        Rule("layers.{L}.mlp.gate_up_bias", LAYER + block + ".{G:gate_proj|up_proj}.bias", "I"),
        Rule("layers.{L}.mlp.down_bias", LAYER + block + ".down_proj.bias", "D"),
    )


def decoder_rules(
    spec: ModelSpec,
    *feed_forward: Rule,
    norms: Mapping[str, str] = PRE_NORMS,
    attention: tuple[Rule, ...] | None = None,
) -> tuple[Rule, ...]:
    """A whole model: trunk, norms, attention, and the rules of its feed-forwards.

    Args:
        spec: the model.
        feed_forward: of dense layers, routers, experts and shared experts.
        norms: the module of each norm.
        attention: by default `attention_rules()`.
    """
    return (
        *trunk_rules(spec.tie_embeddings),
        *norm_rules(norms),
        *(attention_rules() if attention is None else attention),
        *feed_forward,
    )


def renamed(rules: Iterable[Rule], words: Mapping[str, str]) -> tuple[Rule, ...]:
    """Rules with these parts of their tensors' names replaced."""

    def other(name: str) -> str:
        for theirs, new in words.items():
            name = name.replace(theirs, new)
        return name

    return tuple(
        dataclasses.replace(rule, source=other(rule.source), copies=tuple(map(other, rule.copies)))
        for rule in rules
    )
