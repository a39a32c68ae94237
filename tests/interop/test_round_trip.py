"""Loading and exporting: nothing is lost, and what training did not change is the source's bit for bit."""

import filecmp
import functools
import json
import os
from pathlib import Path
from types import SimpleNamespace

import families
import jax
import numpy as np
import pytest
from helpers import tiny

import jaxmoe
from jaxmoe import UserError
from jaxmoe.interop.pretrained import from_config
from jaxmoe.interop.saving import export_like_source, export_new
from jaxmoe.interop.source import config_source
from jaxmoe.interop.storage.format import INDEX_FILE
from jaxmoe.interop.storage.reader import CheckpointFolder
from jaxmoe.parallel.sharding import make_mesh
from jaxmoe.params import named

FAMILIES = list(tiny.FAMILIES)
FILES = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}


def mesh_of(kind):
    return None if kind == "no mesh" else make_mesh(data=1, fsdp=2, expert=2, tensor=2)


def files_of(folder):
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())


def assert_same_files(first, second):
    assert files_of(first) == files_of(second)
    same, different, unreadable = filecmp.cmpfiles(first, second, files_of(first), shallow=False)
    assert (different, unreadable) == ([], [])
    assert same


def stored_bytes(folder):
    """Every tensor's dtype, shape and bytes."""
    with CheckpointFolder(folder) as files:
        return {
            name: (i.dtype, i.shape, b"".join(files.iter_bytes(name))) for name, i in files.tensors.items()
        }


def changed_names(before, after):
    assert before.keys() == after.keys()
    return {name for name in before if before[name] != after[name]}


def set_values(leaf, values):
    """Replace an nnx.Param's values, keeping its sharding."""
    leaf[...] = jax.device_put(values.astype(leaf.dtype), leaf[...].sharding)


@pytest.fixture
def folders(tmp_path):
    return SimpleNamespace(source=tmp_path / "source", export=tmp_path / "export")


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


def test_other_files_are_copied_but_no_other_weights(folders):
    tiny.write_checkpoint(folders.source, "mixtral", "bfloat16", shards=2)
    not_told = {".git/HEAD": b"ref", ".git/objects/pack/x.bin": b"any"}
    copied = {
        "README.md": b"# card \xff",
        "chat_template.jinja": b"{{ messages }}\r\n",
        "assets/deep/picture.png": b"\x89PNG",
        "empty.txt": b"",
        ".gitattributes": b"*.safetensors filter=lfs\n",
    }
    left_out = {
        "pytorch_model.bin": b"old weights",
        "consolidated.safetensors": (folders.source / "model-00001-of-00002.safetensors").read_bytes(),
        "original/consolidated.00.pth": b"old weights",
        "onnx/model.onnx": b"old weights",
        "tf_model.h5": b"old weights",
    }
    for name, content in (copied | left_out | not_told).items():
        (folders.source / name).parent.mkdir(parents=True, exist_ok=True)
        (folders.source / name).write_bytes(content)
    model = jaxmoe.from_pretrained(folders.source)
    assert export_like_source(model.pure_params(), model.source, folders.export) == sorted(left_out)
    unwritten = left_out.keys() | not_told.keys()
    assert set(files_of(folders.export)) == set(files_of(folders.source)) - unwritten
    for name in unwritten:
        (folders.source / name).unlink()
    assert_same_files(folders.source, folders.export)


def test_what_another_trainer_left_is_not_copied(folders):
    tiny.write_checkpoint(folders.source, "mixtral", "bfloat16", shards=1)
    left_out = [
        "checkpoint-500/",
        "events.out.tfevents.1.host",
        "global_step20/",
        "latest",
        "linked/",
        "nowhere.txt",
        "optimizer.pt",
        "other/adapter_config.json",
        "other/adapter_model.safetensors",
        "pipe",
        "rng_state_0.pth",
        "runs/",
        "scheduler.pt",
        "tokenizer.model",
        "trainer_state.json",
        "training_args.bin",
        "zero_to_fp32.py",
    ]
    copied = [
        "all_results.json",
        "assets/latest.txt",
        "assets/runs/note.txt",
        "checkpoint-note.md",
        "link.txt",
    ]
    not_told = [".git", ".cache/huggingface/x.lock"]
    inside = ["checkpoint-500/config.json", "runs/Nov01/x", "global_step20/state.txt"]
    for name in [*left_out, *copied, *not_told, *inside]:
        path = folders.source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name == "linked/":
            path.symlink_to(folders.source / "assets")
        elif name in ("link.txt", "nowhere.txt", "tokenizer.model"):
            path.symlink_to({"link.txt": "config.json", "tokenizer.model": "/dev/zero"}.get(name, "gone"))
        elif name == "pipe":
            os.mkfifo(path)
        elif not name.endswith("/"):
            path.write_text(name)
    model = jaxmoe.from_pretrained(folders.source)
    assert export_like_source(model.pure_params(), model.source, folders.export) == left_out
    assert set(files_of(folders.export)) == FILES | {"model.safetensors", *copied}
    assert not (folders.export / "link.txt").is_symlink()


def test_a_file_that_takes_another_ones_place_must_be_regular(folders):
    tiny.write_checkpoint(folders.source, "mixtral", "bfloat16", shards=1)
    model = jaxmoe.from_pretrained(folders.source)
    pipe = folders.source.parent / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(UserError, match="pipe: cannot be read: it is a named pipe, expected a regular file"):
        export_like_source(
            model.pure_params(), model.source, folders.export, replaced_files={"tokenizer.json": pipe}
        )


class TestFilesThatTransformersWouldNotFind:
    """jaxmoe reads such folders; their exports have the same tensors where transformers looks for them."""

    def exported(self, folders):
        model = jaxmoe.from_pretrained(folders.source)
        jaxmoe.save_pretrained(model, folders.export)
        assert stored_bytes(folders.export) == stored_bytes(folders.source)
        again = jaxmoe.from_pretrained(folders.export)
        jax.tree.map(np.testing.assert_array_equal, again.pure_params(), model.pure_params())

    @pytest.mark.parametrize("name", ["model-00001-of-00001.safetensors", "consolidated.safetensors"])
    def test_one_file_of_another_name(self, folders, name):
        tiny.write_checkpoint(folders.source, "mixtral", "bfloat16", shards=1)
        before = (folders.source / "model.safetensors").read_bytes()
        (folders.source / "model.safetensors").rename(folders.source / name)
        self.exported(folders)
        assert set(files_of(folders.export)) == FILES | {"model.safetensors"}
        assert (folders.export / "model.safetensors").read_bytes() == before

    @pytest.mark.parametrize("metadata", ["none", None, [], "text"])
    def test_an_index_without_metadata(self, folders, metadata):
        tiny.write_checkpoint(folders.source, "mixtral", "bfloat16", shards=2)
        index = json.loads((folders.source / INDEX_FILE).read_text())
        total = index.pop("metadata")["total_size"]
        if metadata != "none":
            index["metadata"] = metadata
        (folders.source / INDEX_FILE).write_text(json.dumps(index))
        self.exported(folders)
        written = json.loads((folders.export / INDEX_FILE).read_text())
        assert written["weight_map"] == index["weight_map"]
        assert written["metadata"]["total_size"] == total
        for file in folders.source.glob("*.safetensors"):
            assert (folders.export / file.name).read_bytes() == file.read_bytes()

    def test_model_safetensors_as_one_of_several(self, folders):
        """transformers would load it alone, and draw the other weights at random."""
        tiny.write_checkpoint(folders.source, "mixtral", "bfloat16", shards=2)
        first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
        (folders.source / second).rename(folders.source / "model.safetensors")
        text = (folders.source / INDEX_FILE).read_text().replace(second, "model.safetensors")
        (folders.source / INDEX_FILE).write_text(text)
        self.exported(folders)
        assert set(files_of(folders.export)) == FILES | {INDEX_FILE, first, second}

    @pytest.mark.parametrize("spelling", ["deep/er/", "./deep//er/"])
    def test_shards_below_the_folder_stay_there(self, folders, spelling):
        tiny.write_checkpoint(folders.source, "mixtral", "bfloat16", shards=2)
        second = "model-00002-of-00002.safetensors"
        (folders.source / "deep" / "er").mkdir(parents=True)
        (folders.source / second).rename(folders.source / "deep" / "er" / second)
        text = (folders.source / INDEX_FILE).read_text().replace(second, spelling + second)
        (folders.source / INDEX_FILE).write_text(text)
        self.exported(folders)
        assert_same_files(folders.source, folders.export)


def test_tensors_beside_the_model_are_copied(folders):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tensors = tiny.write_checkpoint(folders.source, "mixtral", shards=1)
    tiny.write_tensors(folders.source, tensors | {name: np.arange(8, dtype=np.int64)})
    jaxmoe.save_pretrained(jaxmoe.from_pretrained(folders.source), folders.export)
    assert_same_files(folders.source, folders.export)
    assert name in stored_bytes(folders.export)


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


class TestTied:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_without_a_copy(self, folders, family):
        tensors = tiny.write_checkpoint(folders.source, family, "bfloat16", tie_word_embeddings=True)
        assert "lm_head.weight" not in tensors
        model = jaxmoe.from_pretrained(folders.source, dtype="float32")
        assert "lm_head" not in model.params
        jaxmoe.save_pretrained(model, folders.export)
        assert_same_files(folders.source, folders.export)

    def test_equal_copy_is_written_with_the_embedding(self, folders):
        tensors = tiny.write_checkpoint(folders.source, "qwen3_moe", "bfloat16", tie_word_embeddings=True)
        embedding = tensors["model.embed_tokens.weight"]
        tiny.write_tensors(folders.source, tensors | {"lm_head.weight": embedding}, shards=3)
        model = jaxmoe.from_pretrained(folders.source, dtype="float32")
        jaxmoe.save_pretrained(model, folders.export / "untouched")
        assert_same_files(folders.source, folders.export / "untouched")
        set_values(model.params["embed"], np.asarray(model.params["embed"][...]) * 2)
        jaxmoe.save_pretrained(model, folders.export / "changed")
        before, after = stored_bytes(folders.source), stored_bytes(folders.export / "changed")
        assert changed_names(before, after) == {"model.embed_tokens.weight", "lm_head.weight"}
        assert after["lm_head.weight"] == after["model.embed_tokens.weight"]
        assert after["lm_head.weight"][2] == (embedding * 2).astype(embedding.dtype).tobytes()

    @pytest.mark.parametrize(
        ("stored", "copied", "trained"),
        [
            ("bfloat16", "float32", "float32"),
            ("bfloat16", "float16", "bfloat16"),
            ("float16", "float64", "bfloat16"),
            ("float32", "bfloat16", "float32"),
            ("float32", "float16", "bfloat16"),
        ],
    )
    def test_copy_of_another_dtype_keeps_it(self, folders, monkeypatch, stored, copied, trained):
        monkeypatch.setattr("jaxmoe.interop.saving.PIECE_BYTES", 1000)
        monkeypatch.setattr("jaxmoe.interop.source._PIECE_ELEMENTS", 300)
        tensors = tiny.write_checkpoint(folders.source, "qwen3_moe", stored, tie_word_embeddings=True)
        copy = tensors["model.embed_tokens.weight"].astype(tiny.DTYPES[copied])
        tiny.write_tensors(folders.source, tensors | {"lm_head.weight": copy}, shards=3)
        model = jaxmoe.from_pretrained(folders.source, dtype=trained)
        jaxmoe.save_pretrained(model, folders.export / "untouched")
        assert_same_files(folders.source, folders.export / "untouched")
        set_values(model.params["embed"], np.asarray(model.params["embed"][...]) * np.float32(1.1))
        jaxmoe.save_pretrained(model, folders.export / "changed")
        before, after = stored_bytes(folders.source), stored_bytes(folders.export / "changed")
        assert changed_names(before, after) == {"model.embed_tokens.weight", "lm_head.weight"}
        assert after["lm_head.weight"][0] == before["lm_head.weight"][0]
        written = np.frombuffer(after["model.embed_tokens.weight"][2], tiny.DTYPES[stored])
        assert after["lm_head.weight"][2] == written.astype(copy.dtype).tobytes()
        again = jaxmoe.from_pretrained(folders.export / "changed", dtype=trained)
        expected = written.astype(tiny.DTYPES[trained]).reshape(copy.shape)
        np.testing.assert_array_equal(again.params["embed"][...], expected)

    def test_values_that_are_not_finite_are_those_of_the_source_alone(self, folders):
        tensors = tiny.write_checkpoint(folders.source, "qwen3_moe", "bfloat16", shards=1)
        name = "model.layers.1.mlp.gate.weight"
        tensors[name][1, 2] = np.nan
        tensors[name][2, 1] = -np.inf
        tiny.write_tensors(folders.source, tensors, shards=1)
        model = jaxmoe.from_pretrained(folders.source)
        jaxmoe.save_pretrained(model, folders.export / "untouched")
        assert_same_files(folders.source, folders.export / "untouched")
        for value in (np.nan, np.inf):
            values = np.array(model.params["norm"][...])
            values[3] = value
            set_values(model.params["norm"], values)
            with pytest.raises(UserError, match=r"tensor model\.norm\.weight: found nan or infinity"):
                jaxmoe.save_pretrained(model, folders.export / "changed")
            assert not (folders.export / "changed").exists()

    def test_value_that_a_copy_cannot_hold(self, folders):
        tensors = tiny.write_checkpoint(
            folders.source, "mixtral", "bfloat16", shards=1, tie_word_embeddings=True
        )
        head = tensors["model.embed_tokens.weight"].astype(np.float16)
        tiny.write_tensors(folders.source, tensors | {"lm_head.weight": head}, shards=1)
        model = jaxmoe.from_pretrained(folders.source)
        values = np.array(model.params["embed"][...])
        values[3, 2] = 2.0**17
        set_values(model.params["embed"], values)
        with pytest.raises(
            UserError, match=r"tensor lm_head\.weight: value 131072 does not fit its dtype F16"
        ):
            jaxmoe.save_pretrained(model, folders.export)
        assert not folders.export.exists()

    @pytest.mark.parametrize("copied", ["bfloat16", "float32"])
    def test_different_copy_is_refused(self, folders, copied):
        tensors = tiny.write_checkpoint(
            folders.source, "mixtral", "bfloat16", shards=1, tie_word_embeddings=True
        )
        head = tensors["model.embed_tokens.weight"].astype(tiny.DTYPES[copied])
        head[-1, -1] = np.nextafter(head[-1, -1], head.dtype.type(9))
        tiny.write_tensors(folders.source, tensors | {"lm_head.weight": head})
        with pytest.raises(
            UserError, match=r"ties lm_head.weight to model.embed_tokens.weight .* different values"
        ):
            jaxmoe.from_pretrained(folders.source)


@functools.cache
def new_model(family):
    """Random weights take long to compile, so the tests share them."""
    return from_config(
        families.config_json(family), dtype="bfloat16" if family == "olmoe" else "float32", seed=3
    )


class TestNewModel:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_comes_back_equal(self, folders, family):
        model = new_model(family)
        jaxmoe.save_pretrained(model, folders.export)
        assert files_of(folders.export) == ["config.json", "model.safetensors"]
        assert json.loads((folders.export / "config.json").read_text())["dtype"] == model.dtype.name
        shapes = {name: shape for name, (_, shape, _) in stored_bytes(folders.export).items()}
        assert shapes == dict(tiny.tensor_shapes(families.config_json(family)))
        again = jaxmoe.from_pretrained(folders.export, dtype=model.dtype)
        assert again.spec == model.spec
        jax.tree.map(np.testing.assert_array_equal, again.pure_params(), model.pure_params())

    def test_is_split_into_files(self, folders):
        model = new_model("qwen3_moe")
        export_new(
            model.pure_params(),
            model.source,
            folders.export,
            dtype="bfloat16",
            extra_files={"deep/tokenizer.json": Path(__file__)},
            max_shard_bytes=100_000,
        )
        shards = sorted(folders.export.glob("*.safetensors"))
        assert len(shards) > 2
        assert all(shard.stat().st_size < 100_000 + 10_000 for shard in shards)
        assert (folders.export / "deep/tokenizer.json").read_bytes() == Path(__file__).read_bytes()
        again = jaxmoe.from_pretrained(folders.export, dtype="bfloat16")
        rounded = jax.tree.map(lambda values: values.astype("bfloat16"), model.pure_params())
        jax.tree.map(np.testing.assert_array_equal, again.pure_params(), rounded)

    def test_same_seed_is_the_same_model_on_any_mesh(self):
        config = families.config_json("mixtral")
        model = new_model("mixtral")
        sharded = from_config(config, dtype="float32", seed=3, mesh=mesh_of("mesh"))
        assert len(sharded.params["embed"][...].addressable_shards) == 8
        jax.tree.map(np.testing.assert_array_equal, sharded.pure_params(), model.pure_params())

    @pytest.mark.parametrize("family", FAMILIES)
    def test_weights_have_the_deviation_of_the_config(self, family):
        seen = set()
        for name, values in named(new_model(family).pure_params()):
            values = np.asarray(values, np.float32)
            if "norm" in name:
                np.testing.assert_array_equal(values, 1, err_msg=name)
            else:
                assert abs(np.std(values) / 0.2 - 1) < 5 / np.sqrt(2 * values.size), name
                assert abs(np.mean(values)) < 5 * 0.2 / np.sqrt(values.size), name
                seen.add(values.ravel()[0])
        assert len(seen) > 5  # drawn apart from each other

    def test_source_of_a_new_model_is_its_config(self, folders):
        """A config.json file does as well as its content, and its other fields are written again."""
        path = folders.export.parent / "config.json"
        path.write_text(json.dumps(families.config_json("mixtral") | {"torch_dtype": "float16"}))
        blueprint = config_source(path)
        assert blueprint == config_source(json.loads(path.read_text()))
        model = new_model("mixtral")
        export_new(model.pure_params(), blueprint, folders.export, dtype="float32")
        assert json.loads((folders.export / "config.json").read_text()) == families.config_json("mixtral") | {
            "dtype": "float32"
        }


class TestRefusals:
    def test_value_that_the_file_cannot_hold(self, folders):
        tiny.write_checkpoint(folders.source, "olmoe", "float16")
        model = jaxmoe.from_pretrained(folders.source, dtype="float32")
        values = np.array(model.params["groups"][0][0]["experts"]["down"][...])
        values[4, 10, 3, 2] = -65520.0  # rounds past the largest float16, 65504
        set_values(model.params["groups"][0][0]["experts"]["down"], values)
        name = r"tensor model\.layers\.4\.mlp\.experts\.10\.down_proj\.weight: value -?65520 .* F16"
        with pytest.raises(UserError, match=name):
            jaxmoe.save_pretrained(model, folders.export)
        assert files_of(folders.export.parent) == [f"source/{file}" for file in files_of(folders.source)]

    def test_export_onto_the_source(self, folders):
        tiny.write_checkpoint(folders.source, "olmoe", "float16", shards=1)
        link = folders.export
        link.symlink_to(folders.source)
        model = jaxmoe.from_pretrained(folders.source)
        before = stored_bytes(folders.source)
        for target in (folders.source, link, folders.source / ".." / "source"):
            for overwrite in (False, True):
                with pytest.raises(UserError, match="is the folder that the model was loaded from"):
                    jaxmoe.save_pretrained(model, target, overwrite=overwrite)
        assert stored_bytes(folders.source) == before

    def test_export_onto_a_folder_in_use(self, folders):
        tiny.write_checkpoint(folders.source, "olmoe", "float16", shards=1)
        model = jaxmoe.from_pretrained(folders.source)
        tiny.write_checkpoint(folders.export, "mixtral", shards=2)
        (folders.export / "notes.txt").write_text("mine")
        before = files_of(folders.export)
        with pytest.raises(UserError, match="is not empty"):
            jaxmoe.save_pretrained(model, folders.export)
        assert files_of(folders.export) == before
        jaxmoe.save_pretrained(model, folders.export, overwrite=True)
        assert_same_files(folders.source, folders.export)

    def test_a_folder_that_holds_the_source_is_not_replaced(self, tmp_path):
        tiny.write_checkpoint(tmp_path / "outer", "mixtral", shards=1)
        tiny.write_checkpoint(tmp_path / "outer" / "source", "olmoe", shards=1)
        model = jaxmoe.from_pretrained(tmp_path / "outer" / "source")
        before = files_of(tmp_path / "outer")
        with pytest.raises(UserError, match="outer: holds .*outer/source, which the model was loaded from"):
            jaxmoe.save_pretrained(model, tmp_path / "outer", overwrite=True)
        assert files_of(tmp_path / "outer") == before

    def test_dtype_that_is_none(self, folders):
        tiny.write_checkpoint(folders.source, "olmoe", shards=1)
        for dtype in ("int8", "float64", "fp16"):
            with pytest.raises(
                UserError, match=f"dtype '{dtype}' is not supported: expected one of bfloat16"
            ):
                jaxmoe.from_pretrained(folders.source, dtype=dtype)


@pytest.mark.torch
class TestTorch:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_checkpoint_written_by_transformers(self, folders, family, dtype):
        import torch
        from transformers import AutoModelForCausalLM

        model = families.torch_model(family).to(getattr(torch, dtype))
        model.save_pretrained(folders.source, max_shard_size="150KB")
        assert len(list(folders.source.glob("*.safetensors"))) > 2
        model = jaxmoe.from_pretrained(folders.source, dtype="float32")
        jaxmoe.save_pretrained(model, folders.export / "untouched")
        assert_same_files(folders.source, folders.export / "untouched")

        expected = AutoModelForCausalLM.from_pretrained(folders.source)
        experts = model.params["groups"][-1 if family == "olmoe" else 0][-1]["experts"][
            "gate_up"
        ]  # (L, E, G, F, D)
        layer, repeat = (3, 1) if family == "qwen3_moe" else (4, 4)
        with torch.no_grad():
            fused = expected.model.layers[layer].mlp.experts.gate_up_proj  # (E, 2F, D)
            fused[11, 28:] *= 2
            expected.model.norm.weight += 0.5
        values = np.array(experts[...])
        values[repeat, 11, 1] *= 2
        set_values(experts, values)
        set_values(model.params["norm"], np.asarray(expected.model.norm.weight.float().detach()))
        jaxmoe.save_pretrained(model, folders.export / "changed")
        assert len(changed_names(stored_bytes(folders.source), stored_bytes(folders.export / "changed"))) == 2
        self.assert_loads(folders.export / "changed", dict(expected.named_parameters()))

    @pytest.mark.parametrize("kind", ["another name", "no metadata", "one of several", "below"])
    def test_exports_of_folders_that_it_does_not_load(self, folders, kind):
        import torch

        shards = 1 if kind == "another name" else 2
        tensors = tiny.write_checkpoint(folders.source, "qwen3_moe", shards=shards)
        index = folders.source / INDEX_FILE
        last = f"model-0000{shards}-of-0000{shards}.safetensors"
        if kind == "another name":
            (folders.source / "model.safetensors").rename(folders.source / last)
        elif kind == "no metadata":
            index.write_text(json.dumps({"weight_map": json.loads(index.read_text())["weight_map"]}))
        else:
            place = "model.safetensors" if kind == "one of several" else f"deep/{last}"
            (folders.source / place).parent.mkdir(exist_ok=True)
            (folders.source / last).rename(folders.source / place)
            index.write_text(index.read_text().replace(last, place))
        jaxmoe.save_pretrained(jaxmoe.from_pretrained(folders.source, dtype="float32"), folders.export)
        names = ["model.embed_tokens.weight", "model.layers.3.self_attn.k_proj.weight", "lm_head.weight"]
        self.assert_loads(folders.export, {name: torch.from_numpy(tensors[name]) for name in names})

    @pytest.mark.parametrize("family", FAMILIES)
    def test_new_model_loads_in_transformers(self, folders, family):
        import torch

        model = new_model(family)
        jaxmoe.save_pretrained(model, folders.export)
        embed = torch.from_numpy(np.array(model.params["embed"][...], np.float32)).to(
            getattr(torch, model.dtype.name)
        )
        loaded = self.assert_loads(folders.export, {"model.embed_tokens.weight": embed})
        loaded.save_pretrained(folders.source)
        assert stored_bytes(folders.source) == stored_bytes(folders.export)

    @staticmethod
    def assert_loads(folder, expected):
        """transformers finds every tensor, and those of `expected` have the same values."""
        import torch
        from transformers import AutoModelForCausalLM

        loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), info
        parameters = dict(loaded.named_parameters())
        for name, values in expected.items():
            assert parameters[name].dtype == values.dtype
            assert torch.equal(parameters[name], values), name
        return loaded
