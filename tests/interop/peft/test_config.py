"""adapter_config.json: understood, ignored or refused."""

import json

import pytest

import jaxmoe
from jaxmoe.interop.peft.config import parse_adapter_config, read_adapter_config

pytestmark = pytest.mark.once

PLAIN = {"peft_type": "LORA", "r": 3, "lora_alpha": 11, "target_modules": ["q_proj"]}


def _parse(**fields):
    return parse_adapter_config({**PLAIN, **fields}, "adapter_config.json")


def test_what_changes_no_values_is_ignored():
    config = _parse(
        task_type="CAUSAL_LM", inference_mode=True, megatron_core="megatron.core", qalora_group_size=16, revision=None,
        loftq_config={}, eva_config={"rho": 2.0}, init_lora_weights="eva", use_qalora=False, rank_pattern=None,
        from_the_future=None, another=False, third={}, fourth=[], velora_config={"num_groups": 64},
    )  # fmt: skip
    assert (config.r, config.lora_alpha, config.target_modules) == (3, 11, ("q_proj",))
    assert config.rank_pattern == {}
    assert config.scale(3, 11) == 11 / 3
    assert _parse(use_rslora=True).scale(4, 11) == 5.5


@pytest.mark.torch
def test_every_field_of_peft_is_known():
    """A new version's field is refused once it is not at its default, also where it changes nothing: see to it."""
    import peft

    fields = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]).to_dict()
    fields |= {"peft_type": "LORA", "target_modules": ["q_proj"], "peft_version": peft.__version__}
    config = parse_adapter_config(json.loads(json.dumps(fields)), "adapter_config.json")
    assert (config.r, config.lora_alpha) == (8, 8)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"peft_type": "VERA"}, r"peft_type = 'VERA': expected 'LORA'; .* merge it with PEFT"),
        ({"peft_type": None}, "peft_type = None: expected 'LORA'"),
        ({"r": 0}, "r: found 0, expected a number above 0"),
        ({"r": "3"}, "r: found the string '3', expected an integer"),
        ({"lora_alpha": None}, "lora_alpha: found null, expected a number"),
        ({"use_dora": "yes"}, "use_dora: found the string 'yes', expected true or false"),
        ({"bias": "some"}, "bias: found the string 'some', expected 'none', 'all' or 'lora_only'"),
        ({"target_modules": [3]}, "target_modules.*found 3, expected a string"),
        ({"rank_pattern": {"q": 0}}, r"rank_pattern\.q: found 0, expected a number above 0"),
        ({"lora_bias": True}, "lora_bias = True: expected it off; biases of B are not read"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out = True: expected it off"),
        ({"trainable_token_indices": [1]}, r"trainable_token_indices = \[1\]: expected it off"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [7]}, "aLoRA acts on a part of the tokens"),
        (
            {"new_factor": 2},
            "unknown field 'new_factor' = 2: expected none that may change the weights; remove it",
        ),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "changes the base weights: .*path_initial_model_for_weight_conv",
        ),
        ({"target_modules": "q", "layers_to_transform": [1]}, "put the layers into the expression"),
        ({"layers_pattern": "layers"}, "without layers_to_transform: expected both or neither"),
    ],
)
def test_what_would_change_values_is_refused(fields, told):
    with pytest.raises(jaxmoe.UserError, match=f"adapter_config.json: .*{told}") as raised:
        _parse(**fields)
    assert "\n" not in str(raised.value)


def test_several_problems_are_told_together():
    with pytest.raises(jaxmoe.UserError, match="kasa_config = .*; use_qalora = True: "):
        _parse(kasa_config={"beta": 1}, use_qalora=True)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "does not exist: expected the folder of a PEFT adapter"),
        ("{", "is not readable JSON: "),
        ("[1]", r"found \[1\], expected a JSON object"),
    ],
)
def test_files_that_are_none(tmp_path, content, told):
    if content is not None:
        (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(jaxmoe.UserError, match=told):
        read_adapter_config(tmp_path)
