"""A config.json of what no model has: refused in a line, at once, and in little memory."""

import json
import re
import tracemalloc

import families
import pytest

from jaxmoe import UserError
from jaxmoe.interop.config_json import read_config
from jaxmoe.interop.families import FAMILIES

ABSURD = [
    ({"num_experts": 10**6}, "num_experts = 1000000: expected at most 100,000"),
    ({"num_experts": 2**31 - 1}, "num_experts = 2147483647: expected at most 100,000"),
    ({"num_experts": 60_000}, "found 60,000 experts in each of [0-9]+ layers: expected at most 200,000"),
    ({"num_labels": 10**8}, "num_labels = 100000000: expected at most 100,000"),
    ({"num_hidden_layers": 10**6}, "num_hidden_layers = 1000000: expected at most 1,000"),
    ({"num_hidden_layers": -(2**31)}, "num_hidden_layers = -2147483648: expected a positive integer"),
    ({"vocab_size": 2**31 - 1}, "vocab_size = 2147483647: expected at most 10,000,000"),
    (
        {"hidden_size": 10**7, "vocab_size": 10**7},
        "sizes of [0-9,]+ parameters: expected at most 10,000,000,000,000",
    ),
    ({"num_attention_heads": 2**31}, "num_attention_heads = 2147483648: expected at most 100,000"),
    ({"num_experts_per_tok": 1e300}, "'num_experts_per_tok' expected int, got float"),
    ({"mlp_only_layers": [0] * 100_001}, "mlp_only_layers has 100,001 entries: expected at most 100,000"),
    ({"mlp_only_layers": [[0] * 90_000] * 90_000}, "more than 500,000 values"),
    ({"id2label": {str(i): "x" for i in range(100_001)}}, "id2label has 100,001 entries"),
    ({"hidden_act": "x" * 2_000_000}, "hidden_act has 2,000,000 characters: expected at most 1,000,000"),
    ({"hidden_act": "x" * 900_000}, r"hidden_act = 'x+\.\.\. is not supported"),
    ({"x" * 10_000: 1}, r"x+\.\.\. is no field of any model"),
    ({f"{i}" * 100: 1 for i in range(1000)}, "and 992 more"),
    ({"hidden_size": "9" * 500_000}, "'hidden_size' expected int, got str"),
    ({"rope_scaling": {"rope_type": "y" * 500_000}}, r"rope type 'y+\.\.\. is not supported"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0} | {f"z{i}": 1 for i in range(900)}}, "more"),
]


def spec_of(config):
    return FAMILIES[config["model_type"]].spec(config, "config.json")


@pytest.mark.parametrize("inside", [False, True], ids=["whole", "part"])
@pytest.mark.parametrize(("changes", "message"), ABSURD)
def test_what_no_model_has_is_refused_at_once(changes, message, inside):
    """In memory and time that do not grow with what is said: nothing is made of it."""
    config = families.config_json("qwen3_vl_moe") if inside else families.config_json("qwen3_moe")
    (config["text_config"] if inside else config).update(changes)
    spec_of(families.config_json("qwen3_moe"))  # what is made once
    tracemalloc.start()
    try:
        with pytest.raises(UserError) as caught:
            spec_of(config)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert re.search(message, str(caught.value))
    assert len(str(caught.value)) < 3000
    assert peak < 60e6


def refusal(path):
    with pytest.raises(UserError) as caught:
        read_config(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_larger_than_any(tmp_path):
    path = tmp_path / "config.json"
    with path.open("w") as file:
        file.truncate(10**11)
    assert "it has 100,000,000,000 bytes, expected at most 16,777,216" in refusal(path)


def test_more_values_than_any(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps(families.config_json("qwen3_moe"))[:-1] + f', "mlp_only_layers": [{"{}," * 1_000_000}0]}}'
    )
    assert re.search("about 2,000,0[0-9]+ values: expected at most 500,000", refusal(path))
