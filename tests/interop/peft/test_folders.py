"""Adapters of PEFT are read as what they do, and adapters written here do the same under PEFT."""

import dataclasses

import families
import numpy as np
import pytest
from helpers import adapters, parity
from safetensors.numpy import load_file

from jaxmoe.interop.peft.reading import read_adapter
from jaxmoe.interop.peft.writing import write_adapter

pytestmark = pytest.mark.torch

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
RANKS = {"r": 3, "lora_alpha": 11}

CASES = {
    "qwen3_moe": {"target_modules": ["q_proj", "o_proj"], "target_parameters": [*EXPERTS, "mlp.gate.weight"]},
    "mixtral": {
        "target_modules": ["v_proj"],
        "target_parameters": [EXPERTS[1], "gate.weight"],
        "use_rslora": True,
    },
    "gpt_oss": {
        "target_modules": ["k_proj", "embed_tokens", "lm_head"],
        "target_parameters": [*EXPERTS, "gate_up_proj_bias", "router.weight"],
    },
    "gemma4_text": {
        "target_modules": ["q_proj"],
        "target_parameters": [*EXPERTS, "router.proj.weight"],  # as it is written: rounding depends on it
        "rank_pattern": {"down_proj": 2, r"layers\.1\..*q_proj": 5},
        "alpha_pattern": {"gate_up_proj": 4},
    },
    "aria_text": {
        "target_modules": [],
        "target_parameters": EXPERTS,
        "modules_to_save": ["lm_head", "router"],
    },
    "granitemoe": {"target_modules": "all-linear", "target_parameters": EXPERTS},
    "olmoe": {"target_modules": ["q_proj", "v_proj"], "use_dora": True},
    # Names of transformers 4, which PEFT turns into parameters of twice the rank and alpha.
    "glm4_moe": {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]},
    "mellum": {"target_modules": "all-linear", "use_rslora": True},
}


def _save(name, folder):
    wrapped = adapters.adapted(families.torch_model(name), **RANKS, **CASES[name])
    return wrapped, adapters.save(wrapped, folder)


def _weights(model):
    from jaxmoe.interop.torch_bridge import to_numpy

    return {key: np.array(to_numpy(value)) for key, value in model.state_dict().items()}


def _merged_by_definition(adapter, weights):
    """Base and delta, written out for one expert and one output after another."""
    merged = dict(weights) | dict(adapter.saved)
    for name, pair in adapter.pairs.items():
        weight = merged[name].astype(np.float64)
        weight = weight.swapaxes(-1, -2) if pair.transposed else weight
        delta = pair.scale * np.matmul(pair.b.astype(np.float64), pair.a.astype(np.float64))
        weight = weight + delta
        if pair.magnitude is not None:
            weight *= (pair.magnitude / np.linalg.norm(weight, axis=-1))[..., None]
        merged[name] = weight.swapaxes(-1, -2) if pair.transposed else weight
    return merged


def _logits(name, model):
    import torch

    case = families.case_of(name)
    tokens = torch.from_numpy(parity.tokens_of(model.config.get_text_config().vocab_size))
    with torch.no_grad():
        return model(**case.inputs({"input_ids": tokens, "use_cache": False})).logits.numpy()


@pytest.mark.parametrize("name", CASES)
def test_reads_what_peft_merges(name, tmp_path):
    model = families.torch_model(name)
    anatomy, weights = adapters.anatomy_of(model), _weights(model)
    wrapped, folder = _save(name, tmp_path)
    adapter = read_adapter(folder, anatomy)
    targets = adapters.targets_of(wrapped)
    assert {key: (pair.rank, pair.scale) for key, pair in adapter.pairs.items()} == targets
    with adapters.quiet():
        theirs = _weights(wrapped.merge_and_unload())
    ours = _merged_by_definition(adapter, weights)
    for key, want in theirs.items():
        np.testing.assert_allclose(ours[key], want, atol=2e-6, rtol=2e-6, err_msg=key)
    changed = {key for key, want in theirs.items() if not np.array_equal(want, weights[key])}
    assert changed == adapter.pairs.keys() | adapter.saved.keys() - (
        {"model.embed_tokens.weight"} - adapter.pairs.keys()
    )


@pytest.mark.parametrize("name", CASES)
def test_peft_loads_what_is_written(name, tmp_path):
    model = families.torch_model(name)
    anatomy = adapters.anatomy_of(model)
    wrapped, folder = _save(name, tmp_path / "theirs")
    adapter = read_adapter(folder, anatomy)
    write_adapter(dataclasses.replace(adapter, base="org/base"), anatomy, tmp_path / "ours")
    theirs = load_file(folder / "adapter_model.safetensors")
    ours = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    for key, want in theirs.items():
        np.testing.assert_array_equal(ours[key], want, err_msg=key)
    again = adapters.load(model, tmp_path / "ours")
    expected = {key: pytest.approx(value) for key, value in adapters.targets_of(wrapped).items()}
    assert adapters.targets_of(again) == expected
    np.testing.assert_allclose(_logits(name, again), _logits(name, wrapped), atol=1e-5, rtol=1e-5)


def test_a_wrong_packing_of_b_is_seen(tmp_path, monkeypatch):
    """Experts slowest in B as in A: of the same shape, and nearly of the same norm."""
    model = families.torch_model("qwen3_moe")
    anatomy = adapters.anatomy_of(model)
    wrapped, folder = _save("qwen3_moe", tmp_path / "theirs")
    adapter = read_adapter(folder, anatomy)

    def wrong(a_EKI, b_EOK):
        experts, rank, _ = a_EKI.shape
        return a_EKI.reshape(experts * rank, -1), b_EOK.transpose(1, 0, 2).reshape(-1, rank * experts)

    monkeypatch.setattr("jaxmoe.interop.peft.writing.pack", wrong)
    write_adapter(adapter, anatomy, tmp_path / "ours")
    again = adapters.load(model, tmp_path / "ours")
    assert np.abs(_logits("qwen3_moe", again) - _logits("qwen3_moe", wrapped)).max() > 0.1
