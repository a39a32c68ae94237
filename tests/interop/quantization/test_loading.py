"""Quantised folders load as the bfloat16 values that they stand for, each process reading its part."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import quantize
from helpers.quantized import MODELS, made

from jaxmoe.interop import loading
from jaxmoe.interop.loading import LocalShards, load_params
from jaxmoe.interop.source import open_source
from jaxmoe.interop.storage.reader import CheckpointFolder
from jaxmoe.parallel.sharding import make_mesh, shardings
from jaxmoe.params import named


@pytest.mark.parametrize("mesh", [None, {"fsdp": 2, "expert": 2, "tensor": 2}], ids=["no mesh", "mesh"])
@pytest.mark.parametrize(("method", "layout"), MODELS)
def test_equals_the_unquantised_folder(folders, monkeypatch, method, layout, mesh):
    config, stored, plain = made(method, layout)
    quantize.write(folders.source, config, stored)
    quantize.write(folders.plain, {k: v for k, v in config.items() if k != "quantization_config"}, plain)
    expected = load_params(open_source(folders.plain), jnp.float32)
    source = open_source(folders.source)
    if mesh is not None:
        monkeypatch.setattr(loading, "PIECE_ELEMENTS", 3000)
    actual = load_params(source, jnp.float32, None if mesh is None else make_mesh(**mesh))
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    if mesh is None:
        assert source.files.bytes_read == sum(values.nbytes for values in stored.values())


@pytest.mark.parametrize(
    ("method", "layout", "mesh", "devices", "share"),
    [
        ("fp8", "experts", {"data": 2, "expert": 4}, [1, 5], 1 / 4),
        ("fp8", "fused", {"data": 2, "expert": 4}, [0, 2, 3], 3 / 4),
        ("mxfp4", "fused", {"data": 4, "expert": 2}, [1], 1 / 2),
        ("mxfp4", "fused", {"data": 4, "tensor": 2}, [0], 1 / 2),
        ("mxfp4", "fused", {"expert": 2, "tensor": 4}, [3], 1 / 8),
    ],
)
def test_a_process_reads_what_its_own_devices_hold(
    folders, monkeypatch, method, layout, mesh, devices, share
):
    monkeypatch.setattr(loading, "PIECE_ELEMENTS", 1 << 12)
    config, stored, _ = made(method, layout)
    quantize.write(folders.source, config, stored)
    source = open_source(folders.source)
    name = "groups.0.0.experts.gate_up" if method == "mxfp4" else "groups.0.1.experts.gate_up"
    parts = source.bindings.of_parameter
    (name,) = [name] if name in parts else [n for n in parts if n.endswith("experts.gate_up")]
    expected = np.asarray(dict(named(load_params(source, np.float32)))[name])
    declared = dict(named(source.spec.declared))[name]
    mesh = make_mesh(**mesh)
    indices = shardings({name: declared}, mesh)[name].devices_indices_map(declared.shape)
    local = {device: indices[device] for device in mesh.devices.flat[devices]}
    shards = LocalShards(
        declared, SimpleNamespace(addressable_devices_indices_map=lambda _: local), np.dtype("float32")
    )
    reads = []
    read_into = CheckpointFolder.read_into

    def record(self, file, offset, target):
        reads.append((file, offset, len(target)))
        return read_into(self, file, offset, target)

    monkeypatch.setattr(CheckpointFolder, "read_into", record)
    for part in parts[name]:
        shards.fill(part, source.files)
    for index in local.values():
        np.testing.assert_array_equal(shards.at(index), expected[index])
    width = 1 if method == "fp8" else 0.5
    codes = [
        source.files.stored.tensors[source.files.quantized[part.source].codes.tensor] for part in parts[name]
    ]
    in_codes = [
        count for file, at, count in reads if any(i.file == file and i.start <= at < i.end for i in codes)
    ]
    assert sum(in_codes) == declared.size * width * share
    assert sum(count for _, _, count in reads) - sum(in_codes) <= 2 * sum(in_codes)  # tiny blocks' scales
