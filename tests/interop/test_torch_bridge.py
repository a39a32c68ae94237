"""A model from torch is written as a folder that transformers opens and computes the same with."""

import families
import numpy as np
import pytest
from helpers import parity

import jaxmoe

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("name", ["mixtral", "gemma4"])
def test_a_model_from_torch_can_be_saved(name, tmp_path):
    import torch
    import transformers
    from safetensors.torch import load_file

    from jaxmoe.interop.torch_bridge import from_torch

    case, model = families.case_of(name), families.torch_model(name)
    mine = from_torch(model)
    jaxmoe.save_pretrained(mine, tmp_path / "saved")
    again = getattr(transformers, case.architecture).from_pretrained(
        tmp_path / "saved", attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    )
    tokens = torch.from_numpy(parity.tokens_of(mine.spec.vocab_size))
    with torch.no_grad():
        want, got = (
            case.text(one)(**case.inputs({"input_ids": tokens, "use_cache": False})).logits
            for one in (model, again)
        )
    np.testing.assert_array_equal(got.numpy(), want.numpy())
    written = {name for file in (tmp_path / "saved").glob("*.safetensors") for name in load_file(file)}
    model.save_pretrained(tmp_path / "theirs")
    theirs = {name for file in (tmp_path / "theirs").glob("*.safetensors") for name in load_file(file)}
    assert written == theirs, "towers of other modalities come along"
    with pytest.raises(jaxmoe.UserError, match="'source': the model was not loaded from a folder"):
        jaxmoe.save_pretrained(mine, tmp_path / "quantised", quantization="source")


def test_a_model_made_by_hand_says_what_it_lacks(tmp_path):
    from jaxmoe.interop.torch_bridge import from_torch
    from jaxmoe.model.module import MoEModel

    mine = from_torch(families.torch_model("mixtral"))
    with pytest.raises(ValueError, match="this model has no source: make it with source="):
        jaxmoe.save_pretrained(MoEModel(mine.spec, mine.pure_params(), mine.dtype), tmp_path / "saved")
