"""The table of supported models in the README: from the specs of published models, and what the tests prove of them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
from transformers import AutoConfig

from jaxmoe.interop import families as package
from jaxmoe.interop.families import FAMILIES
from jaxmoe.interop.source import config_source
from jaxmoe.model.feed_forward.moe import DenseMoESpec, MoESpec
from jaxmoe.model.feed_forward.router import RouterSpec
from jaxmoe.model.mixers.grouped_query import AttentionSpec
from jaxmoe.model.mixers.rope import RopeSpec
from jaxmoe.model.spec import ModelSpec
from jaxmoe.params import count

FOLDER = Path(package.__file__).parent


def preset_config(model_type: str, preset: families.Preset) -> Any:
    """transformers' config of a published model: the defaults of its class with the fields that differ.

    What a config has beside that of the text model is as in the tiny one.
    """
    path = FAMILIES[model_type].text
    if not path:
        return AutoConfig.for_model(model_type, **preset.fields)
    config = owner = AutoConfig.for_model(**families.config_json(model_type))
    for part in path[:-1]:
        owner = getattr(owner, part)
    setattr(owner, path[-1], type(getattr(owner, path[-1]))(**preset.fields))
    return config


def lines_of(model_type: str) -> int:
    """Lines of a family's module."""
    return len((FOLDER / f"{model_type}.py").read_text(encoding="utf-8").splitlines())


def table() -> str:
    """Markdown."""
    head = ("model_type", "published sizes checked", "attention", "experts", "layers", "compared", "lines")
    rows = [head, ("---",) * len(head), *(_row(name) for name in FAMILIES)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _row(model_type: str) -> tuple[str, ...]:
    case = families.case_of(model_type)
    specs, sizes = [], []
    for name, preset in case.presets.items():
        spec = config_source(preset_config(model_type, preset).to_dict()).spec
        specs.append(spec)
        sizes.append(f"{name} ({count(spec.declared) / 1e9:.1f}B)")
    configs = 1 + len(case.variants)
    balance = ", balance loss" if case.balance else ""
    return (
        f"`{model_type}`",
        ", ".join(sizes),
        _joined(text for spec in specs for text in _attention_of(spec)),
        _joined(text for spec in specs for text in _experts_of(spec)),
        _joined(text for spec in specs for text in _layers_of(spec)),
        f"{configs} configs{balance}" if configs > 1 else f"1 config{balance}",
        str(lines_of(model_type)),
    )


def _joined(texts: Iterator[str]) -> str:
    """In order, without repeats."""
    return ", ".join(dict.fromkeys(texts)) or "plain"


def _attention_of(spec: ModelSpec) -> Iterator[str]:
    for layer in spec.layers:
        yield from _attention(layer.mixer)


def _attention(mixer: AttentionSpec) -> Iterator[str]:
    if mixer.qk_norm is not None:
        where = " after rope" if mixer.qk_norm.after_rope else ""
        yield f"q/k norm per head{where}" if mixer.qk_norm.over == "head" else f"q/k norm in full{where}"
        if mixer.qk_norm.values:
            yield "value norm"
    told = {
        "biases": mixer.bias or mixer.output_bias,
        "windows": mixer.window is not None,
        "clipped": mixer.clip_qkv is not None,
        "sinks": mixer.sinks,
        "gate": mixer.gated,
        "values from keys": mixer.values_from_keys,
        "narrower values": mixer.width_of_value != mixer.head_dim,
        "scaled values": mixer.value_scale != 1.0,
        "own score scale": mixer.scale is not None,
        "no rope in some layers": mixer.rope is None,
    }
    yield from (text for text, holds in told.items() if holds)
    if mixer.rope is not None:
        yield from _rope(mixer.rope, mixer.head_dim)


def _rope(rope: RopeSpec, width: int) -> Iterator[str]:
    if rope.rotary_dim != width:
        yield "partial rope"
    if rope.interleaved:
        yield "interleaved rope"
    if rope.scaling is not None:
        yield f"{type(rope.scaling).__name__.lower()} rope"


def _experts_of(spec: ModelSpec) -> Iterator[str]:
    for layer in spec.layers:
        if layer.moe is not None:
            yield from _experts(layer.moe)


def _experts(moe: MoESpec) -> Iterator[str]:
    yield f"top {moe.router.top_k} of {moe.router.num_experts}"
    yield from _router(moe.router)
    if moe.activation.name != "silu":
        yield moe.activation.name
    if moe.bias:
        yield "biases"
    if moe.shared is not None:
        yield "gated shared expert" if moe.shared.gated else "shared expert"


def _router(router: RouterSpec) -> Iterator[str]:
    yield "softmax of the chosen" if router.score == "logits" else router.score
    told = {
        "renormalised": router.renormalize,
        "bias": router.bias,
        "correction bias": router.correction != "none",
        "groups": router.groups is not None and router.groups.count > 1,
        "scaled weights": router.scale != 1.0,
        "scale per expert": router.expert_scale,
        "normed input": router.input_scale is not None,
    }
    yield from (text for text, holds in told.items() if holds)


def _layers_of(spec: ModelSpec) -> Iterator[str]:
    for layer in spec.layers:
        told = {
            "dense layers": layer.moe is None,
            "dense beside experts": isinstance(layer.ffn, DenseMoESpec),
            "norms after": layer.placement == "post",
            "norms before and after": layer.placement == "sandwich",
            "attention beside feed-forward": layer.placement == "parallel",
            "scaled residuals": layer.residual_scale != 1.0,
            "layer scale": layer.output_scale,
            "LayerNorm": layer.norm.kind == "layer",
        }
        yield from (text for text, holds in told.items() if holds)
    told = {
        "tied": spec.tie_embeddings,
        "scaled embedding": spec.embedding_scale != 1.0,
        "scaled logits": spec.logit_scale != 1.0,
        "logit softcap": spec.logit_softcap is not None,
        "head bias": spec.head_bias,
    }
    yield from (text for text, holds in told.items() if holds)
