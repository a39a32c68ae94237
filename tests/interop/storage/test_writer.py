"""Writing files as the safetensors library and transformers do."""

import json
import re
import textwrap

import ml_dtypes
import numpy as np
import pytest
from helpers.files import contents, described
from safetensors.numpy import load_file, save, save_file

from jaxmoe.interop.storage.format import INDEX_FILE, dtype_name, new_shard
from jaxmoe.interop.storage.reader import CheckpointFolder
from jaxmoe.interop.storage.writer import FolderWriter, index_json, plan_shards, write_shard


def test_a_fresh_file_is_the_library_s_own(tmp_path, arrays):
    arrays |= {'é"\\/\x7f': np.ones(2, np.int16), "\x01\n\u2028😀": np.ones(3, np.int16)}
    for metadata in ({"format": "pt"}, {}, None):
        shard = new_shard("model.safetensors", described(arrays), metadata)
        path = tmp_path / f"{metadata}.safetensors"
        write_shard(path, shard, lambda info: arrays[info.name])
        assert path.read_bytes() == save(arrays, metadata)
        assert shard.file_bytes == path.stat().st_size


def test_metadata_is_that_of_transformers_by_default(arrays):
    (shard,) = plan_shards(described(arrays), 1 << 30)
    assert shard.metadata == {"format": "pt"}
    assert shard.header.startswith(b'{"__metadata__":{"format":"pt"},')


def test_a_folder_is_repeated_byte_for_byte(tmp_path, arrays):
    """Headers in any key order, spacing and padding; types below a byte; by arrays, bytes and streams."""
    source = tmp_path / "source"
    source.mkdir()
    save_file(arrays, source / "b.safetensors", {"format": "pt"})
    entries = {
        "late": {"data_offsets": [4, 8], "shape": [8], "dtype": "F4"},
        "empty": {"shape": [0], "dtype": "F32", "data_offsets": [4, 4]},
        "early": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4], "note": "kept"},
    }
    header = (json.dumps(entries, indent=1) + " \n ").encode()
    (source / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"abcdefgh")
    places = dict.fromkeys(arrays, "b.safetensors") | dict.fromkeys(entries, "a.safetensors")
    (source / INDEX_FILE).write_text(json.dumps({"weight_map": places}))

    with CheckpointFolder(source) as folder, FolderWriter(tmp_path / "target") as writer:
        assert [info.name for info in folder.shards[0].tensors] == ["early", "empty", "late"]
        writer.shard(folder.shards[0], lambda info: folder.iter_bytes(info.name, 3))
        writer.shard(folder.shards[1], lambda info: folder.read(info.name))
        writer.copy(source / INDEX_FILE, INDEX_FILE)
    assert contents(tmp_path / "target") == contents(source)

    with CheckpointFolder(source) as folder:
        for shard in folder.shards:
            write_shard(tmp_path / shard.file, shard, lambda info: folder.iter_bytes(info.name))
            assert (tmp_path / shard.file).read_bytes() == (source / shard.file).read_bytes()


def test_arrays_of_any_strides_are_written_in_order(tmp_path):
    array = np.arange(24, dtype=np.int32).reshape(2, 3, 4)
    (shard,) = plan_shards([("x", "I32", (4, 3, 2))], 1000)
    write_shard(tmp_path / "x", shard, lambda _: array.T)
    assert (load_file(tmp_path / "x")["x"] == array.T).all()


@pytest.mark.parametrize(
    "data",
    [bytes(24), bytearray(24), np.zeros((2, 3), np.float32).data, iter([np.zeros((0, 3)).data, bytes(24)])],
)
def test_bytes_of_any_kind_are_written(tmp_path, data):
    shard = new_shard("x", [("x", "F32", (2, 3)), ("y", "F32", (0, 3))], None)
    write_shard(
        tmp_path / "x", shard, lambda info: data if info.nbytes else np.zeros((0, 3), np.float32).data
    )
    assert (tmp_path / "x").read_bytes() == shard.prefix + bytes(24)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (np.zeros((3, 2), np.float32), ValueError, r"'x': fetched float32 \(3, 2\), expected F32 \(2, 3\)"),
        (np.zeros((2, 3), np.int32), ValueError, r"'x': fetched int32 \(2, 3\), expected F32"),
        (np.zeros((2, 3), ">f4"), ValueError, "'x': fetched >f4"),
        (bytes(23), ValueError, "'x': fetched 23, fewer than its 24 bytes"),
        (bytes(25), ValueError, "'x': fetched more than its 24 bytes"),
        (iter([bytes(20), bytes(3)]), ValueError, "'x': fetched 23, fewer"),
        (iter([bytes(20), bytes(5)]), ValueError, "'x': fetched more"),
        (iter([]), ValueError, "'x': fetched 0, fewer"),
        ([bytes(24)], TypeError, "'x': fetched list, expected an array"),
        (None, TypeError, "'x': fetched NoneType"),
    ],
)
def test_wrong_data_is_refused_and_leaves_no_file(tmp_path, data, error, message):
    (shard,) = plan_shards([("x", "F32", (2, 3))], 1000)
    with pytest.raises(error, match=message):
        write_shard(tmp_path / "x", shard, lambda _: data)
    assert not any(tmp_path.iterdir())


def test_an_existing_file_is_not_touched(tmp_path):
    (tmp_path / "x").write_bytes(b"before")
    (shard,) = plan_shards([("x", "F32", (2, 3))], 1000)
    with pytest.raises(FileExistsError):
        write_shard(tmp_path / "x", shard, lambda _: bytes(24))
    assert (tmp_path / "x").read_bytes() == b"before"


@pytest.mark.parametrize(
    ("limit", "want"),
    [
        (1, ["a", "b", "c", "d"]),
        (19, ["b", "ac", "d"]),  # b is larger than a file may be, and leaves the open one
        (20, ["a", "b", "cd"]),
        (27, ["a", "bc", "d"]),
        (28, ["ab", "cd"]),
        (46, ["abcd"]),
    ],
)
def test_a_file_is_closed_where_the_next_tensor_would_take_it_over_the_limit(limit, want):
    sizes = {"a": 8, "b": 20, "c": 7, "d": 11}
    shards = plan_shards([(name, "U8", (size,)) for name, size in sizes.items()], limit)
    assert ["".join(sorted(info.name for info in shard.tensors)) for shard in shards] == want
    count = f"{len(want):05d}"
    several = [f"model-{number:05d}-of-{count}.safetensors" for number in range(1, len(want) + 1)]
    assert [shard.file for shard in shards] == (several if len(want) > 1 else ["model.safetensors"])
    index = json.loads(index_json(shards))
    assert index["weight_map"] == {info.name: shard.file for shard in shards for info in shard.tensors}
    assert index["metadata"]["total_size"] == 46


def test_index_form():
    shards = plan_shards([("b", "BF16", (2, 3)), ("a.é", "F32", (5,)), ("c", "F32", ())], 22)
    assert index_json(shards).decode() == textwrap.dedent(
        """\
        {
          "metadata": {
            "total_parameters": 12,
            "total_size": 36
          },
          "weight_map": {
            "a.\\u00e9": "model-00002-of-00003.safetensors",
            "b": "model-00001-of-00003.safetensors",
            "c": "model-00003-of-00003.safetensors"
          }
        }
        """
    )


@pytest.mark.parametrize(
    ("tensors", "limit", "message"),
    [
        ([], 10, "0 tensors"),
        ([("x", "F32", (2,))], 0, "shards of 0 bytes"),
        ([("x", "F32", (2,)), ("x", "I8", (2,))], 4, "1 tensor names are repeated"),
        ([("__metadata__", "F32", (2,))], 10, "'__metadata__' is reserved"),
        ([("x", "float32", (2,))], 10, "unknown dtype 'float32'"),
        ([("x", "F4", (3,))], 10, "12 bits"),
        ([("x", "F32", (-2, -2))], 100, "not negative"),
    ],
)
def test_plans_that_cannot_be_written(tensors, limit, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        plan_shards(tensors, limit)


def test_types_below_a_byte_can_be_planned():
    shard = new_shard("x", [("a", "F6_E2M3", (4, 3)), ("b", "F4", (2,))], None)
    assert [(info.name, info.nbytes) for info in shard.tensors] == [("a", 9), ("b", 1)]


def test_unknown_dtypes_have_no_name():
    with pytest.raises(ValueError, match="dtype float4_e2m1fn cannot be stored"):
        dtype_name(ml_dtypes.float4_e2m1fn)


@pytest.mark.torch
def test_transformers_writes_the_same_folder(tmp_path):
    pytest.importorskip("torch")
    import transformers

    config = transformers.Qwen3MoeConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=20,
        moe_intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=5,
        num_experts_per_tok=2,
        tie_word_embeddings=False,
    )
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(tmp_path, max_shard_size=20_000)
    with CheckpointFolder(tmp_path) as folder:
        assert len(folder.shards) > 2
        assert index_json(folder.shards) == (tmp_path / INDEX_FILE).read_bytes()
        for shard in folder.shards:
            tensors = [(info.name, info.dtype, info.shape) for info in shard.tensors]
            assert new_shard(shard.file, reversed(tensors), shard.metadata) == shard
