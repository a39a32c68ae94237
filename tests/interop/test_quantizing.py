"""Bases in few bits: the bytes that are loaded, and what is computed with them."""

import re

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import parity
from helpers.adapters import with_random_factors

from jaxmoe.cli import main as cli
from jaxmoe.codecs import PACKED, four_bit, int8_rows, unpack
from jaxmoe.config import RunConfig
from jaxmoe.interop.adapting import base_of, named_pairs
from jaxmoe.interop.loading import load_params
from jaxmoe.interop.source import open_source
from jaxmoe.model import decoder
from jaxmoe.model.batch import make_batch
from jaxmoe.model.linear import LowRank, dense
from jaxmoe.parallel.sharding import make_mesh
from jaxmoe.params import joined, named, split
from jaxmoe.run.assemble import assemble
from jaxmoe.run.model import export_adapter

FORMS = {
    "nf4": {"kind": "nf4", "block_size": 32},
    "fp4": {"kind": "fp4"},
    "nested": {"kind": "nf4", "block_size": 32, "double_quant": True},
    "int8": {"kind": "int8"},
}
LORA = {"rank": 3, "target_modules": "all-linear", "target_parameters": ["experts.down_proj"]}


def assembled_for(folder, form, mesh, dtype="float32", rows=8):
    return assemble(
        RunConfig.from_mapping(
            {
                "model": {"path": str(folder), "dtype": dtype, "quantization": FORMS[form]},
                "data": {"path": "nothing.txt", "sequence_length": 16},
                "optimizer": {"learning_rate": 0.01},
                "train": {"steps": 2, "batch_size": rows},
                "adapter": LORA,
                "mesh": mesh,
                "output_dir": "nowhere",
            }
        ),
        make_mesh(**mesh, devices=jax.devices()[: int(np.prod(list(mesh.values()) or [1]))]),
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models with experts one by one, and fused and transposed, of widths that are and are not whole blocks."""
    return families.written(tmp_path_factory, "qwen3_moe", "gpt_oss")


def is_packed(leaf):
    return isinstance(leaf, PACKED)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("name", "form", "mesh"),
    [
        ("qwen3_moe", "nf4", {}),
        ("qwen3_moe", "nested", {"expert": 2, "fsdp": 2}),
        ("gpt_oss", "fp4", {"expert": 2, "fsdp": 2}),
        ("gpt_oss", "int8", {}),
    ],
)
def test_what_is_loaded_is_what_is_quantised_tensor_by_tensor(name, form, mesh, folders):
    assembled = assembled_for(folders[name], form, mesh)
    held = base_of(assembled.initial_weights.make())
    whole = dict(named(load_params(assembled.source, jnp.float32)))
    structure = jax.tree.structure(assembled.source.spec.declared)
    found = dict(zip(whole, structure.flatten_up_to(held), strict=True))
    packed = {key: leaf for key, leaf in found.items() if is_packed(leaf)}
    assert packed.keys() == assembled.adapted.forms.keys()
    assert {key.rpartition(".")[2] for key in packed} >= {"q_proj", "o_proj", "gate_up", "down"}
    assert not any("router" in key or "norm" in key or "embed" in key or "head" in key for key in packed)
    for key, leaf in packed.items():
        form_of = assembled.adapted.forms[key]
        values = np.asarray(whole[key]).reshape(-1, *form_of.shape)
        arrays = [np.asarray(array).reshape(len(values), -1) for array in jax.tree.leaves(leaf)]
        for number, one in enumerate(values):
            if form == "int8":
                own = int8_rows.quantize(one)
            else:
                own = four_bit.quantize(one, form_of.kind, form_of.block, form_of.double)
            for array, expected in zip(arrays, jax.tree.leaves(own), strict=True):
                np.testing.assert_array_equal(array[number], np.asarray(expected).ravel(), err_msg=key)


@pytest.mark.torch
def test_double_quantisation_is_of_one_expert_at_a_time(folders):
    forms = assembled_for(folders["qwen3_moe"], "nested", {}).adapted.forms
    (gate_up,) = {form.stack for key, form in forms.items() if key.endswith("experts.gate_up")}
    assert gate_up == "LE"


@pytest.mark.torch
@pytest.mark.parametrize(
    ("form", "mesh"),
    [("fp4", {}), ("int8", {}), ("nf4", {"data": 2, "expert": 2, "fsdp": 2}), ("nested", {})],
)
def test_computes_with_what_the_codes_stand_for(form, mesh, folders):
    """Outputs and gradients of the factors: those of the base that the codes stand for, in plain arrays."""
    assembled = assembled_for(folders["qwen3_moe"], form, mesh)
    params = with_random_factors(assembled)
    plain = jax.tree.map(
        lambda leaf: unpack(leaf, jnp.float32) if is_packed(leaf) else leaf, params, is_leaf=is_packed
    )
    mask = jax.tree.map(
        lambda packed, trained: False if is_packed(packed) else trained,
        params,
        assembled.mask,
        is_leaf=is_packed,
    )
    tokens = parity.tokens_of(assembled.spec.vocab_size)

    def outcome(params, mask):
        trainable, frozen = split(params, mask)

        @jax.jit
        def run(trainable, frozen):
            def loss(trainable):
                hidden, _ = decoder.hidden_states(
                    joined(trainable, frozen), assembled.spec, make_batch(tokens), dtype=jnp.float32
                )
                return jnp.sum(hidden * jnp.cos(jnp.arange(hidden.size).reshape(hidden.shape))), hidden

            return jax.value_and_grad(loss, has_aux=True)(trainable)

        with jax.set_mesh(assembled.mesh):
            (_, hidden), grads = run(trainable, frozen)
        return [hidden, *jax.tree.leaves(grads)]

    for ours, theirs in zip(outcome(params, assembled.mask), outcome(plain, mask), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-3 * float(jnp.abs(theirs).max()), rtol=0)


@pytest.mark.torch
def test_no_array_of_all_experts_is_made(folders):
    """Neither in the forward nor in the backward pass: of what is unpacked no array has the axis of experts."""
    assembled = assembled_for(folders["qwen3_moe"], "nf4", {})
    with jax.set_mesh(assembled.mesh):
        text = str(jax.make_jaxpr(assembled.train_step)(assembled.state, assembled.batch))
    spec = next(layer.ffn for layer in assembled.spec.layers if hasattr(layer.ffn, "router"))
    experts, hidden, width = spec.router.num_experts, spec.hidden, assembled.spec.width
    assert f"f32[{experts},{width},{hidden}]" not in text
    assert f"f32[{experts},2,{hidden},{width}]" not in text
    assert f"f32[{2 * hidden},{width}]" in text, "one expert's"


@pytest.mark.torch
@pytest.mark.parametrize(
    ("name", "form"), [("qwen3_moe", "nested"), ("qwen3_moe", "int8"), ("gpt_oss", "nf4")]
)
def test_merging_into_what_training_saw(name, form, folders, tmp_path, capfd):
    """The merged model is base as quantised plus delta, tensor by tensor; without --quantization base plus delta."""
    assembled = assembled_for(folders[name], form, {})
    params = with_random_factors(assembled)
    trainable, _ = split(params, assembled.mask)
    export_adapter(assembled.adapted, trainable, tmp_path / "adapter", base=None, dtype=assembled.dtype)
    arguments = ["merge", str(folders[name]), str(tmp_path / "adapter")]
    assert cli([*arguments, str(tmp_path / "seen"), "--quantization"]) == 0
    assert cli([*arguments, str(tmp_path / "plain")]) == 0
    capfd.readouterr()
    whole = base_of(params)
    plain = load_params(assembled.source, jnp.float32)
    seen = jax.tree.map(lambda x: unpack(x, jnp.float32) if is_packed(x) else x, whole, is_leaf=is_packed)
    factors = {key: (pair.a, pair.b) for key, pair in named_pairs(params)}
    for folder, base in (("seen", seen), ("plain", plain)):
        expected = jax.tree.map(
            lambda x: dense(x, jnp.float32) if isinstance(x, LowRank) else x,
            assembled.adapted.joined(base, factors),
            is_leaf=lambda x: isinstance(x, LowRank),
        )
        found = load_params(open_source(tmp_path / folder).grouped(assembled.spec), jnp.float32)
        for (key, ours), theirs in zip(named(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-6 * float(jnp.abs(theirs).max()), err_msg=key)


@pytest.mark.torch
def test_replaying_needs_a_record(folders, tmp_path, capfd):
    assembled = assembled_for(folders["qwen3_moe"], "nf4", {})
    trainable, _ = split(assembled.initial_weights.make(), assembled.mask)
    export_adapter(assembled.adapted, trainable, tmp_path / "adapter", base=None, dtype=assembled.dtype)
    (tmp_path / "adapter" / "base_quantization.json").unlink()
    arguments = ["merge", str(folders["qwen3_moe"]), str(tmp_path / "adapter"), str(tmp_path / "out")]
    assert cli([*arguments, "--quantization"]) == 2
    assert "merge it without --quantization" in capfd.readouterr().err


@pytest.mark.torch
@pytest.mark.parametrize(("form", "narrow"), [("nf4", "u8"), ("int8", "s8")])
def test_a_sharded_step_gathers_bytes(form, narrow, folders):
    """Of what is packed; no device is sent a weight in full."""
    assembled = assembled_for(
        folders["qwen3_moe"], form, {"fsdp": 2}, rows=6
    )  # as many tokens as no weight has rows
    text = assembled.lower().compile().as_text()
    found = re.findall(r"= \(?(\w+)\[([\d,]*)\][^=]*? all-gather(?:-start)?\(", text)
    bytes_gathered = [dims for dtype, dims in found if dtype == narrow]
    forms = assembled.adapted.forms.values()
    codes = [form.packed.codes for form in forms]
    kinds = {tuple(sorted(declared.shape[1:])) for declared in codes if "D" in declared.dims}
    gathered = {tuple(sorted(n for n in map(int, dims.split(",")) if n > 1)) for dims in bytes_gathered}
    assert {tuple(n for n in shape if n > 1) for shape in kinds} <= gathered
    whole = {tuple(sorted(form.declared.shape[1:])) for form in forms}
    assert (
        not {tuple(sorted(map(int, dims.split(",")))) for dtype, dims in found if dtype == "f32" and dims}
        & whole
    )
