"""Every field of config.json that changes our model changes transformers', and the other way round.

One field after the other gets another value in the tiny config of each family. Either we refuse it, or our spec and
what transformers computes from the same weights change together.
"""

import copy
import dataclasses
import functools
from typing import Any
from unittest import mock

import families
import numpy as np
import pytest

from jaxmoe import UserError
from jaxmoe.interop import config_json
from jaxmoe.interop.config_json import ConfigReader
from jaxmoe.interop.families import FAMILIES

pytestmark = [pytest.mark.torch, pytest.mark.once]

# Those of several modalities read the same text config.
ALONE = [
    name for name in FAMILIES if name not in ("aria", "gemma4", "mistral3", "qwen3_5_moe", "qwen3_omni_moe")
]

# Without these another field of the same family would change nothing.
SHOWING = {"qwen3_moe": {"sliding_window": 9}}

# Logits in evaluation from given weights do not show these.
ELSEWHERE = {
    "block_size": "of how much is computed at once",
    "initializer_range": "of random weights",
    "input_jitter_noise": "of training",
    "router_jitter_noise": "of training",
    "tie_word_embeddings": "the weights are the same here; a variant of each family",
    "rope_parameters": "tests/interop/test_rotations.py",
}

# Of every family, and of no model.
BOOKKEEPING = {
    "attn_implementation",
    "_attn_implementation",
    "auto_map",
    "model_type",
    "torch_dtype",
    "use_return_dict",
}

LENGTH = 30


def text_of(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config.json that has the text model."""
    return functools.reduce(lambda whole, part: whole[part], FAMILIES[name].text, config)


def another(value: Any) -> Any:
    """A value of the same type, or one for null; None where there is none."""
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case float():
            return 1.5 * value + 0.1
        case None:
            return 1
        case [first, *_] if not isinstance(first, dict):
            return list(reversed(value))
        case _:
            return None


@functools.cache
def taken_by(name: str) -> frozenset[str]:
    """The fields that a family reads."""
    names = set()
    take = ConfigReader.take

    def noted(self: ConfigReader, field: str, *default: Any) -> Any:
        names.add(field)
        return take(self, field, *default)

    with mock.patch.object(ConfigReader, "take", noted):
        FAMILIES[name].spec(families.config_json(name), "config.json")
    return frozenset(names)


def fields_of(name: str) -> set[str]:
    """Those of the family's class, those that we read or pass over though the class may not know them."""
    from transformers import PreTrainedConfig

    own = {field.name for field in dataclasses.fields(text_config(families.config_json(name)))}
    passed_over = config_json._INERT | FAMILIES[name].unused_fields
    everyones = {field.name for field in dataclasses.fields(PreTrainedConfig)} | BOOKKEEPING
    return (own | taken_by(name) | passed_over) - everyones - ELSEWHERE.keys()


def text_config(config: dict[str, Any]) -> Any:
    """transformers' object for the text model."""
    import transformers

    return transformers.AutoConfig.for_model(**copy.deepcopy(config)).get_text_config()


def model_of(name: str, config: dict[str, Any]) -> Any:
    import torch
    import transformers

    model_config = transformers.AutoConfig.for_model(**copy.deepcopy(config))
    families._eager(model_config)
    with mock.patch.object(torch.nn.init, "normal_", lambda tensor, *_, **__: tensor):  # overwritten anyway
        return getattr(transformers, families.case_of(name).architecture)(model_config).eval()


def logits(name: str, model: Any) -> np.ndarray:
    import torch

    case = families.case_of(name)
    tokens = torch.from_numpy(np.random.default_rng(7).integers(3, 104, (1, LENGTH)))
    arguments = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "position_ids": torch.arange(LENGTH)[None],
        "use_cache": False,
    }
    with torch.no_grad():
        return case.text(model)(**case.inputs(arguments)).logits.numpy()


@pytest.mark.parametrize("name", ALONE)
def test_ours_and_theirs_change_together(name):
    base = families.config_json(name)
    text_of(name, base).update(SHOWING.get(name, {}))
    spec = FAMILIES[name].spec(copy.deepcopy(base), "config.json")
    weights = families.torch_model(name, SHOWING.get(name)).state_dict()
    shapes = {tensor: value.shape for tensor, value in weights.items()}
    model = model_of(name, base)
    model.load_state_dict(weights)
    before, given = logits(name, model), text_config(base)
    compared = []
    for field in sorted(fields_of(name)):
        try:
            value = another(text_of(name, base).get(field, getattr(given, field, None)))
        except RuntimeError:  # so transformers says that layers differ
            continue
        if value is None:
            continue
        config = copy.deepcopy(base)
        text_of(name, config)[field] = value
        try:
            ours = FAMILIES[name].spec(copy.deepcopy(config), "config.json") != spec
        except UserError:
            continue
        changed = model_of(name, config)
        theirs = {tensor: value.shape for tensor, value in changed.state_dict().items()} != shapes
        if not theirs:
            changed.load_state_dict(weights)
            theirs = np.abs(logits(name, changed) - before).max() > 1e-6 * np.abs(before).max()
        assert ours == theirs, f"{field} = {value!r} changes {'our' if ours else 'their'} model alone"
        compared.append(field)
    assert {"hidden_size", "vocab_size", "num_hidden_layers"} & set(compared), compared
