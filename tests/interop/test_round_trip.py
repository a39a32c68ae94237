"""Loading and exporting: nothing is lost, and what training did not change is the source's bit for bit."""

import filecmp

import families
import numpy as np
import pytest
from helpers import tiny
from helpers.exports import assert_same_files, changed_names, files_of, mesh_of, set_values, stored_bytes

import jaxmoe
from jaxmoe.params import named

FAMILIES = list(tiny.FAMILIES)
FILES = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}


# One layout and one number of files for each combination, such that each family meets every pair of them.
UNTOUCHED = [
    (family, stored, dtype, mesh, ("experts", "fused")[number % 2], (1, 3)[(number // 2 + place) % 2])
    for place, family in enumerate(FAMILIES)
    for number, (stored, dtype, mesh) in enumerate(
        (stored, dtype, mesh)
        for mesh in ("no mesh", "mesh")
        for stored in ("float32", "bfloat16", "float16")
        for dtype in ("float32", "bfloat16")
    )
]


@pytest.mark.parametrize(("family", "stored", "dtype", "mesh", "layout", "shards"), UNTOUCHED)
def test_untouched_model_exports_byte_identical(folders, family, stored, dtype, mesh, layout, shards):
    tiny.write_checkpoint(folders.source, family, stored, layout, shards)
    model = jaxmoe.from_pretrained(folders.source, dtype=dtype, mesh=mesh_of(mesh))
    jaxmoe.save_pretrained(model, folders.export)
    assert_same_files(folders.source, folders.export)
    assert len(files_of(folders.export)) == len(FILES) + (1 if shards == 1 else shards + 1)


def test_tensors_of_float64_and_several_dtypes_keep_theirs(folders):
    tensors = tiny.write_checkpoint(folders.source, "mixtral", shards=1)
    for name in tensors:
        if name.endswith("norm.weight"):
            tensors[name] = tensors[name].astype(np.float64)
        elif "experts" in name:
            tensors[name] = tensors[name].astype(tiny.DTYPES["bfloat16"])
    tiny.write_tensors(folders.source, tensors)
    jaxmoe.save_pretrained(jaxmoe.from_pretrained(folders.source, dtype="bfloat16"), folders.export)
    assert_same_files(folders.source, folders.export)


def test_largest_float16_survives_bfloat16(folders):
    tensors = tiny.write_checkpoint(folders.source, "olmoe", "float16", shards=1)
    tensors["model.layers.4.mlp.experts.2.up_proj.weight"][3, 7] = 65504.0  # 65536 in bfloat16, past float16
    tiny.write_tensors(folders.source, tensors)
    jaxmoe.save_pretrained(jaxmoe.from_pretrained(folders.source, dtype="bfloat16"), folders.export)
    assert_same_files(folders.source, folders.export)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_special_values_keep_their_bits(folders, dtype):
    tensors = tiny.write_checkpoint(folders.source, "olmoe", shards=1)
    # NaNs with payloads, quiet and signalling, infinities, -0.0, subnormals, the largest float32 that fits.
    bits = [
        0x7FC12345,
        0x7F812345,
        0xFFC00001,
        0x7F800000,
        0xFF800000,
        0x80000000,
        0x00000001,
        0x807FFFFF,
        0x7F7FFFFF if dtype == "float32" else 0x7F7F7FFF,
    ]
    for name in ("model.norm.weight", "model.layers.3.mlp.experts.11.up_proj.weight"):
        tensors[name].reshape(-1).view(np.uint32)[: len(bits)] = bits
    tiny.write_tensors(folders.source, tensors)
    jaxmoe.save_pretrained(jaxmoe.from_pretrained(folders.source, dtype=dtype), folders.export)
    assert_same_files(folders.source, folders.export)


@pytest.mark.parametrize("layout", ["experts", "fused"])
@pytest.mark.parametrize("mesh", ["no mesh", "mesh"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_lands_in_its_place(folders, family, mesh, layout):
    """Layers and experts in numeric order: the twelve experts sorted as text would put 10 and 11 before 2."""
    tensors = tiny.write_checkpoint(folders.source, family, layout=layout)
    if layout == "fused":
        tensors = tiny.random_tensors(families.config_json(family))
    model = jaxmoe.from_pretrained(folders.source, dtype="float32", mesh=mesh_of(mesh))
    params = model.pure_params()
    np.testing.assert_array_equal(params["embed"], tensors.pop("model.embed_tokens.weight"))
    np.testing.assert_array_equal(params["norm"], tensors.pop("model.norm.weight"))
    np.testing.assert_array_equal(params["lm_head"], tensors.pop("lm_head.weight"))
    # Dense, sparse, dense, sparse, dense for qwen3_moe: two repeats of a pair, then one layer.
    alternating = [(0, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 0, 0)]
    places = alternating if family == "qwen3_moe" else [(0, 0, repeat) for repeat in range(5)]
    block = "block_sparse_moe" if family == "mixtral" else "mlp"
    gate, up, down = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    for layer, (group, place, repeat) in enumerate(places):
        actual = {name: np.asarray(leaf)[repeat] for name, leaf in named(params["groups"][group][place])}

        def check(name, expected, actual=actual):
            np.testing.assert_array_equal(actual.pop(name), expected, err_msg=name)

        def tensor(name, layer=layer):
            return tensors.pop(f"model.layers.{layer}.{name}.weight")

        check("attention_norm", tensor("input_layernorm"))
        check("ffn_norm", tensor("post_attention_layernorm"))
        for name in (
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            *(("q_norm", "k_norm") if family != "mixtral" else ()),
        ):
            check(f"attention.{name}", tensor(f"self_attn.{name}"))
        if "mlp.gate_up" in actual:
            check("mlp.gate_up", np.stack([tensor("mlp.gate_proj"), tensor("mlp.up_proj")]))
            check("mlp.down", tensor("mlp.down_proj"))
        else:
            check("router.weight", tensor(f"{block}.gate"))
            stem = f"{block}.experts"
            gate_up = [
                np.stack([tensor(f"{stem}.{e}.{gate}"), tensor(f"{stem}.{e}.{up}")]) for e in range(12)
            ]
            check("experts.gate_up", np.stack(gate_up))
            check("experts.down", np.stack([tensor(f"{stem}.{e}.{down}") for e in range(12)]))
        assert not actual
    assert not tensors


@pytest.mark.parametrize("mesh", ["no mesh", "mesh"])
@pytest.mark.parametrize(
    ("stored", "dtype"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "bfloat16")]
)
def test_only_what_changed_is_written_anew(folders, stored, dtype, mesh):
    tensors = tiny.write_checkpoint(folders.source, "qwen3_moe", stored)
    model = jaxmoe.from_pretrained(folders.source, dtype=dtype, mesh=mesh_of(mesh))
    changed = {}

    def change(leaf, index, name):
        values = np.array(leaf[...])
        values[index] = (-1.5 * values[index].astype(np.float32)).astype(values.dtype)
        set_values(leaf, values)
        changed[name] = values[index].astype(tiny.DTYPES[stored])

    # Layers 1 and 3 are the sparse ones, in the second place of the first group; layer 4 is a group of its own.
    sparse, last = model.params["groups"][0][1], model.params["groups"][1][0]
    change(sparse["experts"]["gate_up"], (1, 10, 1), "model.layers.3.mlp.experts.10.up_proj.weight")
    change(sparse["experts"]["down"], (0, 2), "model.layers.1.mlp.experts.2.down_proj.weight")
    change(last["ffn_norm"], (0,), "model.layers.4.post_attention_layernorm.weight")
    change(last["attention"]["k_norm"], (0,), "model.layers.4.self_attn.k_norm.weight")
    jaxmoe.save_pretrained(model, folders.export)

    before, after = stored_bytes(folders.source), stored_bytes(folders.export)
    assert changed_names(before, after) == changed.keys()
    for name, values in changed.items():
        assert (values != tensors[name]).all()  # so that no number may be the source's
        assert after[name] == (before[name][0], before[name][1], values.tobytes())
    for name in ("config.json", "tokenizer.json", "model.safetensors.index.json"):
        assert filecmp.cmp(folders.source / name, folders.export / name, shallow=False)
    for shard in folders.source.glob("*.safetensors"):  # headers, too
        size = int.from_bytes(shard.read_bytes()[:8], "little") + 8
        assert (folders.export / shard.name).read_bytes()[:size] == shard.read_bytes()[:size]


def test_changed_numbers_leave_their_neighbours_bits(folders):
    """Within a fused tensor, numbers that training left alone keep more bits than it was trained in."""
    name = "model.layers.2.mlp.experts.gate_up_proj"
    expected = tiny.write_checkpoint(folders.source, "olmoe", "float32", "fused")[name].copy()
    model = jaxmoe.from_pretrained(folders.source, dtype="bfloat16")
    leaf = model.params["groups"][0][0]["experts"]["gate_up"]  # (L, E, G, F, D)
    values = np.array(leaf[...])
    values[2, 11, 1, 5, ::3] = 7.0
    set_values(leaf, values)
    jaxmoe.save_pretrained(model, folders.export)
    expected[11, 28 + 5, ::3] = 7.0
    before, after = stored_bytes(folders.source), stored_bytes(folders.export)
    assert changed_names(before, after) == {name}
    assert after[name][2] == expected.tobytes()


def test_pieces_of_a_tensor_add_up(folders, monkeypatch):
    monkeypatch.setattr("jaxmoe.interop.saving.PIECE_BYTES", 1000)
    tiny.write_checkpoint(folders.source, "qwen3_moe", "bfloat16", "fused")
    model = jaxmoe.from_pretrained(folders.source, dtype="float32")
    jaxmoe.save_pretrained(model, folders.export)
    assert_same_files(folders.source, folders.export)


def test_second_generation_is_the_first(folders, tmp_path):
    """An export is a source like any other."""
    tiny.write_checkpoint(folders.source, "mixtral", "bfloat16")
    model = jaxmoe.from_pretrained(folders.source, dtype="float32")
    set_values(model.params["lm_head"], np.asarray(model.params["lm_head"][...]) * 3)
    jaxmoe.save_pretrained(model, folders.export)
    jaxmoe.save_pretrained(jaxmoe.from_pretrained(folders.export), tmp_path / "again")
    assert_same_files(folders.export, tmp_path / "again")
