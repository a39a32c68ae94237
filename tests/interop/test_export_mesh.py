"""Exporting from a mesh: each piece costs what it weighs, and the bytes are the same from any mesh."""

import filecmp
import os
import re
import socket
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny
from jax.sharding import NamedSharding, PartitionSpec

from jaxmoe.interop import saving
from jaxmoe.interop.loading import load_params
from jaxmoe.interop.saving import export_like_source
from jaxmoe.interop.source import open_source
from jaxmoe.parallel.sharding import make_mesh
from jaxmoe.parallel.slicing import _slice_bits, slice_bits

MESHES = [
    {"data": 8},
    {"fsdp": 8},
    {"expert": 4, "data": 2},
    {"tensor": 4, "data": 2},
    {"fsdp": 4, "expert": 2},
    {"fsdp": 2, "expert": 2, "tensor": 2},
]
SPEC = PartitionSpec(None, "expert", None, "tensor", "fsdp")  # LEGFD


def sharded(array, mesh, spec=SPEC):
    return jax.device_put(array, NamedSharding(make_mesh(**mesh), spec))


def random_bits(shape, dtype):
    """Any bits: signalling NaNs with payloads, -0.0 and subnormals among them."""
    bits = np.random.default_rng(0).integers(0, 2 ** (8 * np.dtype(dtype).itemsize), shape)
    bits[..., :6] = np.array([0x7F812345, 0x80000000, 1, 0x807FFFFF, 0x7F800000, 0x7F81]) % (bits.max() + 1)
    return bits.astype(f"u{np.dtype(dtype).itemsize}").view(dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("mesh", MESHES)
def test_slices_have_the_bits_of_the_array(mesh, dtype):
    array = random_bits((2, 8, 2, 12, 16), tiny.DTYPES[dtype])
    placed = sharded(array, mesh)
    whole = [slice(0, size) for size in array.shape]
    for box in (
        [slice(1, 2), slice(5, 6), slice(0, 1), whole[3], whole[4]],  # an expert's tensor
        [slice(0, 1), slice(3, 4), slice(1, 2), slice(4, 11), whole[4]],  # a part, over edges of shards
        [slice(1, 2), slice(1, 6), *whole[2:]],  # several experts, over edges of shards
        [slice(0, 1), slice(1, 6), whole[2], slice(1, 12), slice(3, 14)],
        whole,
    ):
        bits = slice_bits(placed, box)
        assert bits.is_fully_replicated
        np.testing.assert_array_equal(bits, array.view(bits.dtype)[tuple(box)])


def test_slices_over_an_axis_that_two_mesh_axes_split():
    array = np.arange(16 * 6, dtype=np.float32).reshape(16, 6)
    placed = sharded(array, {"fsdp": 4, "tensor": 2}, PartitionSpec(("fsdp", "tensor")))
    for start in range(14):
        part = np.asarray(slice_bits(placed, [slice(start, start + 3), slice(2, 5)])).view(np.float32)
        np.testing.assert_array_equal(part, array[start : start + 3, 2:5])


def test_arrays_of_another_sharding_are_refused():
    spread = SimpleNamespace(sharding=SimpleNamespace(device_set={1, 2}))
    with pytest.raises(TypeError, match="expected arrays with a NamedSharding"):
        slice_bits(spread, [slice(0, 1)])


@pytest.mark.parametrize("mesh", MESHES)
def test_a_slice_costs_what_it_weighs(mesh):
    """XLA would rather gather the whole parameter on every device, and then slice it."""
    shape, sizes = (8, 16, 2, 96, 256), (1, 1, 1, 96, 256)
    placement = NamedSharding(make_mesh(**mesh), SPEC)
    everywhere = NamedSharding(placement.mesh, PartitionSpec())
    compiled = _slice_bits.lower(
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=placement),
        jax.ShapeDtypeStruct((5,), jnp.int32, sharding=everywhere),
        sizes,
        placement,
    ).compile()
    piece = 4 * np.prod(sizes)
    memory = compiled.memory_analysis()
    assert memory.output_size_in_bytes == piece
    assert memory.temp_size_in_bytes <= 3 * piece  # the parameter is 256 pieces, a shard of it 32
    moved = re.findall(r"= \w+\[([\d,]+)\]\S* (?:all|collective|reduce-scatter)\S*\(", compiled.as_text())
    assert len(moved) <= 1
    assert all(np.prod([int(size) for size in one.split(",")]) == np.prod(sizes) for one in moved)


def trained(params):
    """What training might have left: about half of the numbers changed."""

    def change(x):
        chosen = jnp.arange(x.size).reshape(x.shape) * 7 % 13 < 6
        return jnp.where(chosen, -1.5 * x, x)

    return jax.tree.map(jax.jit(change), params)


@pytest.mark.parametrize(
    ("layout", "meshes"), [("experts", MESHES[1::2]), ("fused", MESHES[0::2])], ids=["experts", "fused"]
)
def test_export_is_the_same_from_any_mesh(tmp_path, monkeypatch, layout, meshes):
    monkeypatch.setattr(saving, "PIECE_BYTES", 4000)  # pieces that end anywhere in a shard
    tiny.write_checkpoint(tmp_path / "source", "olmoe", "bfloat16", layout, num_hidden_layers=2)
    source = open_source(tmp_path / "source")
    export_like_source(trained(load_params(source, jnp.float32)), source, tmp_path / "whole")
    assert not equal_folders(tmp_path / "whole", tmp_path / "source")
    for number, mesh in enumerate(meshes):
        params = trained(load_params(source, jnp.float32, make_mesh(**mesh)))
        export_like_source(params, source, tmp_path / str(number))
        assert equal_folders(tmp_path / "whole", tmp_path / str(number)), mesh


def equal_folders(one, other):
    names = sorted(path.name for path in one.iterdir())
    assert sorted(path.name for path in other.iterdir()) == names
    return filecmp.cmpfiles(one, other, names, shallow=False)[0] == names


def test_tensors_of_a_parameter_share_a_compilation(tmp_path):
    tensors = tiny.write_checkpoint(tmp_path / "source", "mixtral", "bfloat16")
    source = open_source(tmp_path / "source")
    params = load_params(source, jnp.float32, make_mesh(fsdp=4, expert=2))
    _slice_bits.clear_cache()
    export_like_source(params, source, tmp_path / "export")
    assert len(tensors) > 200
    assert _slice_bits._cache_size() <= len(jax.tree.leaves(params)) < 15


PROCESS = """
    import sys
    import jax
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
    import jax.numpy as jnp
    from jaxmoe.interop.loading import load_params
    from jaxmoe.interop.source import open_source
    from jaxmoe.interop.saving import export_like_source
    from jaxmoe.parallel.sharding import make_mesh
    source = open_source(sys.argv[3])
    for axes, dtype in (({"fsdp": 4}, jnp.float32), ({"fsdp": 2, "expert": 2}, jnp.bfloat16)):
        params = load_params(source, dtype, make_mesh(**axes))
        params = jax.tree.map(jax.jit(lambda x: -x), params)
        export_like_source(params, source, f"{sys.argv[4]}/{'-'.join(axes)}")
"""


def test_two_processes_write_one_export(tmp_path):
    tiny.write_checkpoint(tmp_path / "source", "olmoe", "bfloat16", num_hidden_layers=1)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PROCESS), address, str(i), tmp_path / "source", tmp_path],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for i in range(2)
    ]
    try:
        said = [worker.communicate(timeout=300)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(said)
    source = open_source(tmp_path / "source")
    params = jax.tree.map(jnp.negative, load_params(source, jnp.float32))
    export_like_source(params, source, tmp_path / "whole")
    for name in ("fsdp", "fsdp-expert"):
        assert equal_folders(tmp_path / "whole", tmp_path / name)
