"""FLOPs of a token: products of the weights that it meets, and of attention."""

import families
import pytest

from jaxmoe.interop.source import config_source
from jaxmoe.model.cost import active_params, train_flops_per_token


def test_flops_of_a_token():
    raw = families.config_json("mixtral")
    spec = config_source(raw).spec
    width, hidden, layers = raw["hidden_size"], raw["intermediate_size"], raw["num_hidden_layers"]
    queries, keys = raw["num_attention_heads"], raw["num_key_value_heads"]
    head = raw.get("head_dim") or width // queries
    norms = 2 * width
    of_layer = 2 * width * head * (queries + keys) + width * raw["num_local_experts"] + norms
    of_layer += raw["num_experts_per_tok"] * 3 * width * hidden
    active = layers * of_layer + raw["vocab_size"] * width
    assert active_params(spec) == active
    whole, frozen = (train_flops_per_token(spec, 75, base_trains=trains) for trains in (True, False))
    assert whole - frozen == pytest.approx(2 * active), "a frozen weight has no gradient: a third less"
    assert train_flops_per_token(spec, 76) > whole > 6 * active
