"""Bases that stay in the checkpoint's own few bits: codes and scales as they are stored, and what they compute."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import yaml
from helpers import quantize, tiny
from helpers.adapters import with_random_factors
from helpers.packed import bnb4, bnb_config
from helpers.quantized import (
    BLOCK,
    GPT_OSS,
    QWEN,
    any_fp8,
    any_mxfp4,
    folder_of,
    fused_bnb,
    gpt_oss_tensors,
    is_matrix,
    made,
    tensors_of,
)

from jaxmoe.codecs import PACKED, Fp8Blocks, four_bit, unpack
from jaxmoe.config import RunConfig
from jaxmoe.errors import UserError
from jaxmoe.interop.loading import load_params
from jaxmoe.interop.pairs import base_of
from jaxmoe.interop.peft.reading import read_adapter
from jaxmoe.model import decoder
from jaxmoe.model.batch import make_batch
from jaxmoe.parallel.sharding import make_mesh
from jaxmoe.params import joined, named, split
from jaxmoe.run.assemble import assemble
from jaxmoe.run.memory import held_bytes
from jaxmoe.run.model import export_adapter, export_merged

LORA = {"rank": 3, "target_modules": ["q_proj", "o_proj"], "target_parameters": ["experts.down_proj"]}
EXPERTS = {"gate_up", "down"}
MATRICES = EXPERTS | {"q_proj", "k_proj", "v_proj", "o_proj"}

FOLDERS = {
    "fp8": (lambda: made("fp8"), "fp8", MATRICES),
    "fp8, fused": (lambda: made("fp8", "fused", ml_dtypes.bfloat16), "fp8", MATRICES),
    "mxfp4": (lambda: made("mxfp4"), "mxfp4", EXPERTS),
    "mxfp4 of experts one by one": (lambda: folder_of("mxfp4"), "mxfp4", MATRICES),
    "fp8 per row": (lambda: folder_of("fp8 per row"), "fp8", MATRICES),
    "fp8 per tensor": (lambda: folder_of("fp8 per tensor"), "fp8", MATRICES),
    "nf4": (lambda: folder_of("nf4 in rows of blocks"), "nf4", MATRICES),
    "nested, fused, float16": (lambda: fused_bnb(True, "float16"), "nf4", MATRICES),
    "int8": (lambda: folder_of("llm.int8"), "int8", MATRICES),
}


def assembled_for(model, mesh, dtype="float32", **adapter):
    return assemble(
        RunConfig.from_mapping(
            {
                "model": {"quantization": "keep", "dtype": dtype, **model},
                "data": {"path": "nothing.txt", "sequence_length": 16},
                "optimizer": {"learning_rate": 0.01},
                "train": {"steps": 2, "batch_size": 8},
                "adapter": LORA | adapter,
                "mesh": mesh,
                "output_dir": "nowhere",
            }
        ),
        make_mesh(**mesh, devices=jax.devices()[: int(np.prod(list(mesh.values()) or [1]))]),
    )


def is_packed(leaf):
    return isinstance(leaf, PACKED)


def by_name(assembled, tree):
    structure = jax.tree.structure(assembled.source.spec.declared)
    names = [name for name, _ in named(assembled.source.spec.declared)]
    return dict(zip(names, structure.flatten_up_to(tree), strict=True))


@pytest.mark.parametrize(
    ("kind", "mesh"),
    [
        *((kind, {}) for kind in FOLDERS),
        ("fp8", {"expert": 2, "fsdp": 2, "tensor": 2}),
        ("mxfp4", {"expert": 2, "fsdp": 2}),
    ],
)
def test_what_is_held_is_what_the_checkpoint_has(kind, mesh, tmp_path):
    """Every number, in the dtype of the checkpoint, and not a byte of it in another."""
    make, held, names = FOLDERS[kind]
    config, stored, _ = make()
    quantize.write(tmp_path, config, stored)
    assembled = assembled_for({"path": str(tmp_path)}, mesh)
    found = by_name(assembled, base_of(assembled.initial_weights.make()))
    whole = by_name(assembled, load_params(assembled.source, jnp.float32))
    packed = {name: leaf for name, leaf in found.items() if is_packed(leaf)}
    assert {name.rpartition(".")[2] for name in packed} == names
    for name, leaf in packed.items():
        assert assembled.adapted.forms[name].kind == (
            "fp4" if "fused, fl" in kind and "q_proj" in name else held
        )
        np.testing.assert_array_equal(unpack(leaf, jnp.float32), whole[name], err_msg=name)
    size = sum(array.nbytes for leaf in packed.values() for array in jax.tree.leaves(leaf))
    if not mesh:
        plain = sum(leaf.nbytes for name, leaf in found.items() if name not in packed)
        told = held_bytes(assembled)
        assert (told["packed weights"], told["frozen weights"]) == (size, plain)
        assert told["trained weights"] * 2 <= told["optimiser"] < told["trained weights"] * 2 + 100
    values = sum(whole[name].size for name in packed)
    assert size / values < {"fp8": 1.5, "int8": 1.1}.get(held, 0.63)


def test_codes_of_every_kind_and_scales_to_the_ends(tmp_path):
    """All codes and scales that a file can hold, NaN and what is less than normal aside."""
    blocks, exponents = any_mxfp4(3, 6, 64)
    exponents = np.maximum(exponents, 4)
    flat = np.stack([blocks & 15, blocks >> 4], -1).reshape(3, 6, 64)
    packed = four_bit.from_codes(jnp.asarray(flat), jnp.asarray(exponents), "mxfp4", 32)
    expected = quantize.dequantize_mxfp4(blocks, exponents).swapaxes(-1, -2)
    np.testing.assert_array_equal(unpack(packed, jnp.bfloat16), expected)
    codes, scales = any_fp8((6, 40), (1, 16))
    codes = np.where(np.isnan(codes.astype(np.float32)), np.zeros_like(codes), codes)
    packed = Fp8Blocks(jnp.asarray(codes.view(np.uint8)), jnp.asarray(scales), 16)
    np.testing.assert_array_equal(
        unpack(packed, jnp.bfloat16), quantize.dequantize_fp8(codes, scales, (1, 16))
    )


@pytest.mark.parametrize(
    ("kind", "mesh"),
    [("fp8", {}), ("mxfp4", {"data": 2, "expert": 2, "fsdp": 2}), ("nested, fused, float16", {})],
)
def test_computes_with_what_the_codes_stand_for(kind, mesh, tmp_path):
    """Outputs and gradients of the factors: those of the values in plain arrays."""
    config, stored, _ = FOLDERS[kind][0]()
    quantize.write(tmp_path, config, stored)
    assembled = assembled_for({"path": str(tmp_path)}, mesh)
    params = with_random_factors(assembled)
    plain = jax.tree.map(
        lambda leaf: unpack(leaf, jnp.float32) if is_packed(leaf) else leaf, params, is_leaf=is_packed
    )
    mask = jax.tree.map(
        lambda leaf, trained: False if is_packed(leaf) else trained,
        *(params, assembled.mask),
        is_leaf=is_packed,
    )
    tokens = np.random.default_rng(1).integers(0, assembled.spec.vocab_size, (8, 13))

    def outcome(params, mask):
        trainable, frozen = split(params, mask)

        @jax.jit
        def run(trainable, frozen):
            def loss(trainable):
                whole = joined(trainable, frozen)
                hidden, _ = decoder.hidden_states(
                    whole, assembled.spec, make_batch(tokens), dtype=jnp.float32
                )
                logits = decoder.logits(whole, assembled.spec, hidden)
                return jnp.sum(jnp.sin(logits)), logits

            return jax.grad(loss, has_aux=True)(trainable)

        with jax.set_mesh(assembled.mesh):
            return jax.device_get(run(trainable, frozen))

    (grads, logits), (want_grads, want_logits) = outcome(params, assembled.mask), outcome(plain, mask)
    np.testing.assert_allclose(logits, want_logits, atol=1e-5 * np.abs(want_logits).max(), rtol=0)
    found, wanted = jax.tree.leaves(grads), jax.tree.leaves(want_grads)
    assert len(found) == len(wanted) > 0
    for one, other in zip(found, wanted, strict=True):
        assert np.abs(other).max() > 0
        np.testing.assert_allclose(one, other, atol=1e-4 * np.abs(other).max(), rtol=0)


def test_layers_that_are_quantised_beside_others_that_are_not(tmp_path):
    """The same kinds of layers are then held in two groups."""
    config = QWEN | {"num_hidden_layers": 4}
    stored, plain, quantization = quantize.quantize(
        tiny.random_tensors(config, "bfloat16"), "fp8", is_matrix, BLOCK, np.float32
    )
    plain_ones = {name: plain[name] for name in plain if ".layers.2." in name and is_matrix(name)}
    one = "model.layers.3.mlp.experts.0.down_proj.weight"
    plain_ones[one] = plain[one]
    stored = {n: array for n, array in stored.items() if n.removesuffix("_scale_inv") not in plain_ones}
    quantize.write(tmp_path, config | {"quantization_config": quantization}, stored | plain_ones)
    assembled = assembled_for({"path": str(tmp_path)}, {})
    spec = assembled.source.spec
    found = by_name(assembled, base_of(assembled.initial_weights.make()))
    whole = by_name(assembled, load_params(assembled.source, jnp.float32))
    for layer in range(4):
        group, place, _ = spec.locate(layer)
        own = {name: leaf for name, leaf in found.items() if name.startswith(f"groups.{group}.{place}.")}
        packed = {name.rpartition(".")[2] for name, leaf in own.items() if is_packed(leaf)}
        assert packed == {2: set(), 3: MATRICES - {"down"}}.get(layer, MATRICES)
    for name, leaf in found.items():
        values = unpack(leaf, jnp.float32) if is_packed(leaf) else leaf
        np.testing.assert_array_equal(values, whole[name], err_msg=name)


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_exports(kind, tmp_path):
    """The adapter says nothing of the base; the merged model is the values with the deltas."""
    config, stored, plain = made(kind)
    quantize.write(tmp_path / "base", config, stored)
    assembled = assembled_for({"path": str(tmp_path / "base")}, {})
    adapted, weights = assembled.adapted, with_random_factors(assembled)
    trained, _ = split(weights, adapted.mask)
    export_adapter(adapted, trained, tmp_path / "adapter", base=None, dtype=jnp.float32)
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    export_merged(adapted, trained, weights, tmp_path / "merged", dtype=jnp.float32, tokenizer_files={})
    merged = tensors_of(tmp_path / "merged")
    assert merged.keys() == plain.keys()
    pairs = read_adapter(tmp_path / "adapter", adapted.model.anatomy).pairs
    assert {name.split(".", 3)[3] for name in pairs} >= {"self_attn.q_proj.weight", "mlp.experts.down_proj"}
    for name, pair in pairs.items():
        deltas = pair.scale * np.float64(pair.b) @ np.float64(pair.a)
        if name in plain:
            expected = {name: deltas.swapaxes(-1, -2) if pair.a.ndim == 3 else deltas}
        else:  # experts one by one
            stem = name.removesuffix("down_proj")
            expected = {f"{stem}{e}.down_proj.weight": delta for e, delta in enumerate(deltas)}
        for tensor, delta in expected.items():
            found = np.frombuffer(merged[tensor][2], ml_dtypes.bfloat16).reshape(merged[tensor][1])
            if pair.a.ndim == 3:  # PEFT rounds those of bare parameters first
                delta = np.float32(delta).astype(ml_dtypes.bfloat16)
            want = (np.float32(plain[tensor]) + np.float32(delta)).astype(ml_dtypes.bfloat16)
            np.testing.assert_allclose(
                np.float32(found), np.float32(want), rtol=0, atol=2**-8 * np.abs(delta).max()
            )
            assert (found == want).mean() > 0.99
    changed = {name for name in plain if merged[name][2] != plain[name].tobytes()}
    adapted_ones = re.compile(r"(q_proj|o_proj)\.weight|experts\.(\d+\.)?down_proj(\.weight)?$")
    assert changed == {name for name in plain if adapted_ones.search(name)}


def test_random_weights_of_a_quantised_config():
    """What a plan is made of: as many bytes as a checkpoint would have."""
    config = GPT_OSS | {"quantization_config": {"quant_method": "mxfp4"}}
    assembled = assembled_for({"config": config}, {})
    found = by_name(assembled, base_of(assembled.initial_weights.make()))
    packed = [leaf for leaf in found.values() if is_packed(leaf)]
    assert {leaf.kind for leaf in packed} == {"mxfp4"}
    assert len(packed) == len(assembled.adapted.forms) > 0
    fp8 = made("fp8")[0]
    forms = assembled_for({"config": fp8}, {}).adapted.forms
    assert {form.kind for form in forms.values()} == {"fp8"}
    assert {form.block for form in forms.values()} == {BLOCK[1]}


def test_what_is_not_kept_is_told(tmp_path, caplog):
    config, stored, plain = made("fp8")
    head = quantize.quantize(
        {"lm_head.weight": plain["lm_head.weight"]}, "fp8", lambda _: True, BLOCK, np.float32
    )
    quantize.write(tmp_path, config, {n: a for n, a in stored.items() if n != "lm_head.weight"} | head[0])
    assembled_for({"path": str(tmp_path)}, {})
    assert "1 quantised tensors of" in caplog.text
    assert "such as lm_head.weight" in caplog.text


def test_nan_among_the_codes(tmp_path):
    config, stored, _ = made("fp8")
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    stored[name] = stored[name].copy()
    stored[name].view(np.uint8)[3, 4] = 0xFF
    quantize.write(tmp_path, config, stored)
    with pytest.raises(UserError, match=rf"tensor {name} holds nan"):
        assembled_for({"path": str(tmp_path)}, {}).initial_weights.make()


@pytest.mark.parametrize(
    "given", ["keep", {"kind": "keep"}, {"kind": "int8"}, {"kind": "nf4", "block_size": 128}]
)
def test_configs_are_read_as_they_are_written(given):
    """A run goes on with the config that it wrote."""
    config = RunConfig.from_mapping(
        {
            "model": {"path": "x", "quantization": given},
            "data": {"path": "nothing.txt", "sequence_length": 16},
            "optimizer": {"learning_rate": 0.01},
            "train": {"steps": 2, "batch_size": 8},
            "adapter": LORA,
            "output_dir": "nowhere",
        }
    )
    assert RunConfig.from_mapping(yaml.safe_load(config.to_yaml())) == config


def test_a_plan_leaves_out_what_the_config_does():
    config = made("fp8")[0]
    without = config["quantization_config"] | {"modules_to_not_convert": ["self_attn", "lm_head"]}
    forms = assembled_for({"config": config | {"quantization_config": without}}, {}).adapted.forms
    assert {name.rpartition(".")[2] for name in forms} == EXPERTS | {"gate_up", "down"}


def test_refusals(tmp_path):
    config, stored, _ = folder_of("int4 with zero points")
    quantize.write(tmp_path / "int4", config, stored)
    with pytest.raises(
        UserError, match=r"found 'keep', but of .*int4 no weight .* can be kept in FP8.*q_proj"
    ):
        assembled_for({"path": str(tmp_path / "int4")}, {})
    stored, _ = bnb4(np.random.default_rng(0), (4, 64, 192), name="model.layers.0.mlp.experts.gate_up_proj")
    tensors = {name: values for name, values in gpt_oss_tensors().items() if name not in stored}
    quantize.write(tmp_path / "along", GPT_OSS | {"quantization_config": bnb_config(4)}, tensors | stored)
    with pytest.raises(
        UserError, match=r"along no weight .* blocks along its inputs: .*gate_up_proj have none"
    ):
        assembled_for({"path": str(tmp_path / "along")}, {})
    with pytest.raises(UserError, match="found 'keep', but of model.config .* nothing in it is quantised"):
        assembled_for({"config": GPT_OSS}, {})
    config, stored, _ = made("fp8")
    quantize.write(tmp_path / "fp8", config, stored)
    nf4 = GPT_OSS | {"quantization_config": bnb_config(4)}
    with pytest.raises(UserError, match="without the checkpoint's files that is known of MXFP4 and of FP8"):
        assembled_for({"config": nf4}, {})
    with pytest.raises(UserError, match=r"q_proj.weight stays in few bits .* 'pissa' takes a part out of it"):
        assembled_for({"path": str(tmp_path / "fp8")}, {}, init="pissa", target_parameters=[])
    with pytest.raises(UserError, match="found block_size beside kind 'keep'"):
        assembled_for({"path": "x", "quantization": {"kind": "keep", "block_size": 128}}, {})
    with pytest.raises(UserError, match="'loftq' without a model.quantization that loses anything"):
        assembled_for({"path": "x"}, {}, init="loftq")
