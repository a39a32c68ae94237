"""Conversion rules say what transformers' modules are called and what they are."""

import families
import numpy as np
import pytest
from helpers import adapters

from jaxmoe.interop.families import FAMILIES
from jaxmoe.interop.peft.today import today
from jaxmoe.interop.source import config_source


@pytest.mark.torch
@pytest.mark.parametrize("name", FAMILIES)
def test_modules_are_those_of_transformers(name):
    model = families.torch_model(name)
    buffers = {key.rpartition(".")[0] for key, _ in model.named_buffers()}
    theirs = adapters.anatomy_of(model).by_name
    ours = today(config_source(families.config_json(name))).anatomy
    for module in ours.modules:
        if module.name not in theirs:
            assert module.name in buffers or module.name == ours.head, module.name
            continue
        other = theirs[module.name]
        known = [(key, shape) for key, shape in module.parameters.items() if key in other.parameters]
        assert module.kind == other.kind or "weight" not in module.parameters, module.name
        assert module.transposed == other.transposed
        assert known == list(other.parameters.items()) or module.name == "lm_head"
    left = {one for one, module in theirs.items() if one not in ours.by_name and not module.aside}
    assert left <= {"lm_head"}, "a tied head has no weight of its own"
    assert ours.head == (None if left or ours.head is None else "lm_head") or name == "qwen3_omni_moe"


@pytest.mark.torch
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("gpt_oss", "aria_text")])
def test_pieces_are_the_tensors_of_a_published_folder(name, tmp_path):
    """What transformers writes of a model, taken from its parameters by the pieces."""
    from safetensors.numpy import load_file

    from jaxmoe.interop.torch_bridge import to_numpy

    model = families.torch_model(name)
    held = {key: to_numpy(value) for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    written = {
        key: value for file in tmp_path.glob("*.safetensors") for key, value in load_file(file).items()
    }
    pieces = today(config_source(families.config_json(name))).anatomy.pieces
    for module, piece in pieces.items():
        tensor = written.get(f"{module}.weight")
        if tensor is None:
            continue
        whole = held[piece.parameter] if piece.expert is None else held[piece.parameter][piece.expert]
        rows = slice(piece.rows.start, piece.rows.stop, piece.rows.step)
        np.testing.assert_array_equal(whole[rows], tensor, err_msg=module)
