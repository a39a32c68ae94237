"""The table of supported models in the README: from the specs of published models, and what the tests prove of them."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
from transformers import AutoConfig

from jaxmoe.interop import families as package
from jaxmoe.interop.families import FAMILIES
from jaxmoe.interop.source import config_source
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
    head = (
        "model_type",
        "published sizes checked",
        "token mixer",
        "feed-forward",
        "layers",
        "compared",
        "lines",
    )
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
        _joined(text for spec in specs for text in _mixers(spec)),
        _joined(text for spec in specs for text in _feed_forwards(spec)),
        _joined(text for spec in specs for text in _layers(spec)),
        f"{configs} configs{balance}" if configs > 1 else f"1 config{balance}",
        str(lines_of(model_type)),
    )


def _joined(texts: Iterator[str]) -> str:
    """In order, without repeats."""
    return ", ".join(dict.fromkeys(texts)) or "plain"


def _mixers(spec: ModelSpec) -> Iterator[str]:
    return (trait for layer in spec.layers if layer.mixer is not None for trait in layer.mixer.traits())


def _feed_forwards(spec: ModelSpec) -> Iterator[str]:
    return (trait for layer in spec.layers if layer.ffn is not None for trait in layer.ffn.traits())


def _layers(spec: ModelSpec) -> Iterator[str]:
    return itertools.chain((trait for layer in spec.layers for trait in layer.traits()), spec.traits())
