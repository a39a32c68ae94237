"""Every entry of rope_parameters: the frequencies and the magnitude of transformers' model, or a refusal."""

import copy
import functools

import families
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe import UserError
from jaxmoe.interop.families import FAMILIES
from jaxmoe.model.mixers.rope import RopeSpec, rope_tables

pytestmark = pytest.mark.torch

SHORT, LONG = 10, 300  # positions, below the context of the tiny models and beyond it

TYPES = {
    "default": {},
    "linear": {"factor": 2.5},
    "dynamic": {"factor": 3.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "longrope": {"factor": 4.0, "original_max_position_embeddings": 16},
    "proportional": {},
}

# Of these every family gets each, with every type of rotation.
EXTRAS = {
    "nothing": {},
    "part": {"partial_rotary_factor": 0.5},
    "untruncated": {"truncate": False},
}
# And these the three ways in which families read a rotation.
MORE = {
    "whole": {"partial_rotary_factor": 1.0},
    "no factor": {"factor": None},
    "factor 1": {"factor": 1.0},
    "factor": {"factor": 2.0},
    "shrunk": {"factor": 0.5},
    "original": {"original_max_position_embeddings": 24},
    "no original": {"original_max_position_embeddings": None},
    "attention_factor": {"attention_factor": 1.5},
    "beta_fast": {"beta_fast": 16},
    "beta_slow": {"beta_slow": 2.0},
    "mscale alone": {"mscale": 0.8},
    "mscale_all_dim alone": {"mscale_all_dim": 0.8},
    "mscale": {"mscale": 1.0, "mscale_all_dim": 0.5},
    "truncated": {"truncate": True},
    "truncate of another type": {"truncate": "no"},
    "finetuned": {"finetuned": True},
    "two types": {"type": "linear"},
    "sections": {"mrope_section": [4, 2, 2], "mrope_interleaved": True},
    "alpha": {"alpha": 50.0},
    "unknown": {"wobble": 1.0},
}
# Beside rope_parameters.
OUTSIDE = {
    "part outside": {"partial_rotary_factor": 0.5},
    "original outside": {"original_max_position_embeddings": 24},
    "base outside": {"rope_theta": 77.0},
    "scaling outside": {"rope_scaling": {"rope_type": "linear", "factor": 3.0, "rope_theta": 77.0}},
}

WITHOUT = ("jamba", "kimi_linear", "nemotron_h")
"""Families that rotate nothing."""

# Those of several modalities read a rotation as their text models do. PhiMoE has factors of its own.
WRAPPING = ("aria", "gemma4", "mistral3", "qwen3_5_moe", "qwen3_omni_moe")
ALONE = [name for name in FAMILIES if name not in (*WRAPPING, *WITHOUT, "phimoe")]
# transformers' model rotates a part of each head, and would rotate whole heads by default.
NEVER_DEFAULT = ("mistral4",)
# Of the tiny config's own rotation, what a family cannot do without.
NEEDED = ("mrope_section", "llama_4_scaling_beta")
THOROUGHLY = ("qwen3_moe", "glm4_moe", "mellum", "qwen3_vl_moe", "hunyuan_v1_moe")


@functools.cache
def rotary_class(name):
    import torch
    import transformers

    case = families.case_of(name)
    config = transformers.AutoConfig.for_model(**families.config_json(name))
    with torch.device("meta"):
        model = getattr(transformers, case.architecture)(config)
    names = ("rotary_emb", "pos_emb")
    (found,) = {type(module) for place, module in model.named_modules() if place.rpartition(".")[2] in names}
    return found


def config_with(name, rope, outside):
    """The tiny config with a rotation, in the one place or in the place of each kind of layer."""
    config = families.config_json(name)
    text = config
    for part in FAMILIES[name].text:
        text = text[part]
    given = text["rope_parameters"]
    kinds = [key for key in given if key.endswith("_attention")]
    rope = {key: given[key] for key in NEEDED if key in given} | rope
    text["rope_parameters"] = {kind: copy.deepcopy(rope) for kind in kinds} if kinds else rope
    if name == "granitemoe_swa":
        text["layer_rope_theta"] = None
    text.update(outside)
    return config


def theirs(name, config):
    """By kind of layer: the magnitude, and frequencies for short and for long rows."""
    import torch
    import transformers

    whole = transformers.AutoConfig.for_model(**copy.deepcopy(config))
    text = whole.get_text_config()
    found = {}
    kinds = sorted(set(text.layer_types)) if "full_attention" in text.rope_parameters else [None]
    for kind in kinds:
        module = rotary_class(name)(text)
        prefix = "" if kind is None else f"{kind}_"
        by_length = []
        for length in (SHORT, LONG):
            arguments = () if kind is None else (kind,)
            table = module(torch.zeros(1), torch.arange(length)[None], *arguments)
            cos = table[0] if isinstance(table, tuple) else table.real  # or complex numbers
            by_length.append(getattr(module, f"{prefix}inv_freq").numpy().copy())
            first = cos.reshape(-1, length, cos.shape[-1])[0, 0, 0]  # of position 0 it is the magnitude
        found[kind] = (float(first), *by_length)
    return found


def ours(spec):
    """The same of every layer that has a rotation."""
    found = []
    for mixer in dict.fromkeys(layer.mixer for layer in spec.layers):
        if not mixer.rotations():
            continue
        kind = "full_attention" if getattr(mixer, "window", None) is None else "sliding_attention"
        by_length = []
        for length in (SHORT, LONG):
            cos, sin = rope_tables(mixer.rope, jnp.arange(length)[None], jnp.float32)
            by_length.append(np.arctan2(sin[0, 1], cos[0, 1]))  # at position 1 the angle is the frequency
        found.append((kind, (float(cos[0, 0, 0]), *by_length)))
    assert found
    return found


def read(name, config):
    return FAMILIES[name].spec(copy.deepcopy(config), "config.json")


def check(name, kind, entries, outside):
    """Whether the rotation was loaded, and then as transformers' model has it."""
    rope = {"rope_type": kind, "rope_theta": 500.0} | TYPES[kind] | entries
    try:
        if kind == "longrope":  # a number for each pair of features
            part = {key: value for key, value in rope.items() if key == "partial_rotary_factor"}
            plain = read(name, config_with(name, {"rope_theta": 500.0} | part, {}))
            pairs = next(iter(plain.rotations)).rotary_dim // 2
            numbers = [1 + i / 4 for i in range(pairs)]
            rope |= {"short_factor": numbers, "long_factor": [2 * number for number in numbers]}
        config = config_with(name, rope, outside)
        spec = read(name, config)
    except UserError:
        return False
    try:
        expected = theirs(name, config)
    except (TypeError, KeyError):  # for us null is as if it were not there
        assert None in entries.values()
        return True
    for layer_kind, (magnitude, *frequencies) in ours(spec):
        want_magnitude, *want = expected[None] if None in expected else expected[layer_kind]
        np.testing.assert_allclose(magnitude, want_magnitude, rtol=1e-5)
        for got, wanted in zip(frequencies, want, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-7)
    return True


@pytest.mark.parametrize("name", ALONE)
def test_of_every_family(name):
    loaded = {
        (kind, label) for kind in TYPES for label, entries in EXTRAS.items() if check(name, kind, entries, {})
    }
    assert ("yarn", "nothing") in loaded
    assert {("default", "nothing"), ("default", "part")} & loaded or name in NEVER_DEFAULT


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", THOROUGHLY)
def test_of_each_way_to_read_one(name, kind):
    loaded = {label for label, entries in MORE.items() if check(name, kind, entries, {})}
    loaded |= {label for label, outside in OUTSIDE.items() if check(name, kind, {}, outside)}
    assert {"whole", "factor 1", "original", "finetuned", "two types", "original outside"} <= loaded
    assert {"beta_fast", "beta_slow", "mscale", "mscale alone", "truncated"} <= loaded
    assert "unknown" not in loaded
    if kind == "yarn":
        assert {"factor", "shrunk", "no factor", "attention_factor"} <= loaded
    if kind == "default":
        assert not {"factor", "shrunk", "attention_factor"} & loaded


def test_a_part_that_transformers_does_not_know_of():
    """MiniMax-Text-01 rotates half of each head; transformers' model does not read ``rotary_dim``."""

    def ropes(**fields):
        return read("minimax", families.config_json("minimax", fields)).rotations

    assert ropes(rotary_dim=8) == {RopeSpec(10000.0, 8)}
    assert ropes(rotary_dim=16) == ropes(rotary_dim=None) == ropes() == {RopeSpec(10000.0, 16)}
    for rotary in (18, 7, 0, "8"):
        with pytest.raises(UserError, match="rotary_dim|features"):
            ropes(rotary_dim=rotary)
