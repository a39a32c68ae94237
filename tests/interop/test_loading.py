"""Loading onto a mesh: what is read, how often, into which memory, and what does not fit."""

import tracemalloc
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from helpers import tiny

import jaxmoe
from jaxmoe import UserError
from jaxmoe.interop import loading
from jaxmoe.interop.loading import LocalShards, load_params, pieces
from jaxmoe.interop.source import open_source
from jaxmoe.parallel.sharding import make_mesh, shardings
from jaxmoe.params import named

MESHES = [
    {"data": 8},
    {"fsdp": 8},
    {"data": 2, "expert": 4},
    {"data": 2, "tensor": 4},
    {"fsdp": 4, "tensor": 2},
    {"fsdp": 2, "expert": 2, "tensor": 2},
]
GATE_UP = "groups.0.0.experts.gate_up"  # LEGFD, of mixtral and olmoe


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "source"


@pytest.mark.parametrize("elements", [1, 7, 10, 60, 10**6])
def test_pieces_follow_each_other(elements):
    array = np.arange(4 * 3 * 1 * 10).reshape(4, 3, 1, 10)
    box = (slice(1, 3), slice(0, 3), slice(0, 1), slice(2, 9))
    cut = [array[piece].ravel() for piece in pieces(box, elements)]
    np.testing.assert_array_equal(np.concatenate(cut), array[box].ravel())
    assert max(map(len, cut)) <= elements
    assert len(cut) < 2 * array[box].size / elements + 1


@pytest.mark.parametrize("layout", ["experts", "fused"])
@pytest.mark.parametrize("mesh", MESHES)
def test_every_byte_is_read_once(folder, monkeypatch, mesh, layout):
    """However often a shard is replicated, and however finely the shards divide the rows of a tensor."""
    tensors = tiny.write_checkpoint(folder, "qwen3_moe", "bfloat16", layout)
    source = open_source(folder)
    assert source.files.bytes_read == 0
    whole = load_params(source, np.float32)
    once = sum(values.nbytes for values in tensors.values())
    assert source.files.bytes_read == once
    monkeypatch.setattr(loading, "PIECE_ELEMENTS", 300)
    sharded = load_params(source, np.float32, make_mesh(**mesh))
    assert source.files.bytes_read == 2 * once
    jax.tree.map(np.testing.assert_array_equal, sharded, whole)


def placement_of(source, mesh, devices):
    """The sharding of `GATE_UP` as a process sees it that holds some of the devices only."""
    declared = dict(named(source.spec.declared))[GATE_UP]
    sharding = shardings({GATE_UP: declared}, mesh)[GATE_UP]
    indices = sharding.devices_indices_map(declared.shape)
    local = {device: indices[device] for device in mesh.devices.flat[list(devices)]}
    return declared, SimpleNamespace(addressable_devices_indices_map=lambda _: local), local.values()


@pytest.mark.parametrize("layout", ["experts", "fused"])
@pytest.mark.parametrize(
    ("mesh", "devices", "share"),
    [
        ({"data": 2, "expert": 4}, [1], 1 / 4),
        ({"data": 2, "expert": 4}, [1, 5], 1 / 4),  # the same experts, in both halves of the data axis
        ({"data": 2, "expert": 4}, [0, 2, 3], 3 / 4),  # what lies between is left out
        ({"expert": 4, "fsdp": 2}, [2, 6], 1 / 4),
        ({"expert": 2, "tensor": 4}, [0, 1, 2, 3], 1 / 2),
    ],
)
def test_a_process_reads_what_its_own_devices_hold(folder, monkeypatch, mesh, devices, share, layout):
    monkeypatch.setattr(loading, "PIECE_ELEMENTS", 2 * 28 * 40)  # an expert
    tiny.write_checkpoint(folder, "mixtral", "bfloat16", layout)
    source = open_source(folder)
    expected = np.asarray(dict(named(load_params(source, np.float32)))[GATE_UP])
    before = source.files.bytes_read
    declared, placement, indices = placement_of(source, make_mesh(**mesh), devices)
    shards = LocalShards(declared, placement, np.dtype("float32"))
    for part in source.bindings.of_parameter[GATE_UP]:
        shards.fill(part, source.files)
    assert source.files.bytes_read - before == declared.size * 2 * share
    for index in indices:
        np.testing.assert_array_equal(shards.at(index), expected[index])


def test_arrays_take_the_buffers_over(folder):
    tiny.write_checkpoint(folder, "olmoe", "bfloat16")
    source = open_source(folder)
    sharded = dict(named(load_params(source, np.float32, make_mesh(data=4, fsdp=2))))[GATE_UP]
    places = {shard.data.unsafe_buffer_pointer() for shard in sharded.addressable_shards}
    assert len(places) == 2  # one for each half of D: had they been copied, each device would have its own


def test_memory_beside_the_shards_is_a_few_pieces(folder, monkeypatch):
    monkeypatch.setattr(loading, "PIECE_ELEMENTS", 1 << 15)
    tiny.write_checkpoint(folder, "mixtral", "bfloat16", "fused", hidden_size=320, intermediate_size=192)
    source = open_source(folder)
    declared, placement, _ = placement_of(source, make_mesh(fsdp=8), range(8))
    assert declared.size > 200 * loading.PIECE_ELEMENTS
    tracemalloc.start()
    shards = LocalShards(declared, placement, np.dtype("float32"))
    for part in source.bindings.of_parameter[GATE_UP]:
        shards.fill(part, source.files)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 4 * declared.size < peak < 4 * declared.size + 10 * loading.PIECE_ELEMENTS


def test_shards_are_where_the_mesh_says(folder):
    tiny.write_checkpoint(folder, "mixtral", "bfloat16")
    model = jaxmoe.from_pretrained(folder, mesh=make_mesh(fsdp=2, expert=2, tensor=2))
    experts = model.params["groups"][0][0]["experts"]["gate_up"][...]
    assert {shard.data.shape for shard in experts.addressable_shards} == {(5, 6, 2, 14, 20)}
    assert len({str(shard.index) for shard in experts.addressable_shards}) == 8


@pytest.mark.parametrize(
    ("stored", "value", "dtype", "remedy"),
    [
        ("bfloat16", 1e6, "float16", "load it as bfloat16 or float32"),
        ("float32", -70000.0, "float16", "load it as bfloat16 or float32"),
        ("float32", 3.4e38, "bfloat16", "load it as float32"),
        ("float64", 3.4e38, "bfloat16", "load it as float32"),
        ("float64", -1e39, "float32", "no dtype that jaxmoe computes in holds it"),
        ("float64", 1e300, "bfloat16", "no dtype that jaxmoe computes in holds it"),
    ],
)
def test_value_that_the_dtype_cannot_hold(folder, stored, value, dtype, remedy):
    tensors = tiny.write_checkpoint(folder, "olmoe", stored, shards=1)
    name = "model.layers.1.mlp.experts.7.up_proj.weight"
    tensors[name][5, 6] = value
    tensors[name][5, 7] = np.inf  # infinite as it is, so it may stay so
    tiny.write_tensors(folder, tensors)
    with pytest.raises(UserError) as caught:
        jaxmoe.from_pretrained(folder, dtype=dtype)
    shown = abs(float(tensors[name][5, 6]))
    assert str(caught.value) == f"tensor {name}: value {shown:.6g} does not fit {dtype}; {remedy}"


@pytest.mark.parametrize(
    ("stored", "value", "dtype"),
    [("float64", 3e38, "bfloat16"), ("float64", 3.4e38, "float32"), ("float16", 65504.0, "bfloat16")],
)
def test_largest_values_that_fit(folder, stored, value, dtype):
    tensors = tiny.write_checkpoint(folder, "olmoe", stored, shards=1)
    tensors["model.norm.weight"][:3] = value, np.inf, np.nan
    tiny.write_tensors(folder, tensors)
    norm = np.asarray(jaxmoe.from_pretrained(folder, dtype=dtype).params["norm"][...])
    expected = tensors["model.norm.weight"].astype(norm.dtype).astype(np.float32)
    np.testing.assert_array_equal(norm.astype(np.float32), expected)
