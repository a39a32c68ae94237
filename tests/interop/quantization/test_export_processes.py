"""Any mesh writes the same, and all processes compute the same, whatever fails."""

import functools

import jax
import jax.numpy as jnp
import pytest
from helpers import quantize
from helpers.quantized import bytes_of, made

from jaxmoe import UserError
from jaxmoe.interop import saving
from jaxmoe.interop.loading import load_params
from jaxmoe.interop.saving import export_like_source
from jaxmoe.interop.source import open_source
from jaxmoe.parallel.sharding import make_mesh


@pytest.mark.parametrize(
    ("method", "mesh"),
    [
        ("fp8", {"fsdp": 2, "expert": 2, "tensor": 2}),
        ("fp8", {"tensor": 4, "data": 2}),
        ("mxfp4", {"tensor": 4, "fsdp": 2}),
    ],
)
def test_any_mesh_and_piece_writes_the_same(folders, monkeypatch, tmp_path, method, mesh):
    config, stored, _ = made(method, "fused")
    quantize.write(folders.source, config, stored)
    source = open_source(folders.source)
    double = functools.partial(jax.tree.map, jax.jit(lambda x: x * 1.1))
    export_like_source(
        double(load_params(source, jnp.float32)), source, folders.export, quantization="source"
    )
    monkeypatch.setattr(saving, "PIECE_BYTES", 1500)
    params = double(load_params(source, jnp.float32, make_mesh(**mesh)))
    export_like_source(params, source, tmp_path / "mesh", quantization="source")
    assert bytes_of(tmp_path / "mesh") == bytes_of(folders.export) != bytes_of(folders.source)


@pytest.mark.parametrize("quantization", ["none", "source"])
@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
def test_other_processes_compute_the_same(folders, monkeypatch, method, quantization):
    """One that skipped a slice would leave the others waiting for it."""
    config, stored, _ = made(method)
    quantize.write(folders.source, config, stored)
    source, calls = open_source(folders.source), []
    params = load_params(source, jnp.float32)
    slice_bits = saving.slice_bits

    def record(array, box):
        calls[-1].append((array.shape, str(box)))
        return slice_bits(array, box)

    monkeypatch.setattr(saving, "slice_bits", record)
    for process in (0, 1):
        calls.append([])
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        export_like_source(params, source, folders.export / str(process), quantization=quantization)
    assert calls[0] == calls[1]
    assert len(calls[0]) > 20
    assert [path.name for path in folders.export.iterdir()] == ["0"]


@pytest.mark.parametrize("quantization", ["none", "source"])
@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
def test_a_failure_leaves_no_process_waiting(folders, monkeypatch, method, quantization):
    """What the others compute is computed to its end before the failure is told."""
    config, stored, _ = made(method)
    quantize.write(folders.source, config, stored)
    source, calls = open_source(folders.source), []
    params = load_params(source, jnp.float32)
    slice_bits, shard = saving.slice_bits, saving.FolderWriter.shard

    def record(array, box):
        calls[-1].append((array.shape, str(box)))
        return slice_bits(array, box)

    def on_a_full_disk(self, plan, fetch):
        def until_full(info):
            for data in fetch(info):
                if len(calls[-1]) > 15:
                    raise OSError(28, "No space left on device")
                yield data

        shard(self, plan, until_full)

    monkeypatch.setattr(saving, "slice_bits", record)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    calls.append([])
    monkeypatch.setattr(saving.FolderWriter, "shard", on_a_full_disk)
    with pytest.raises(UserError, match="No space left"):
        export_like_source(params, source, folders.export, quantization=quantization)
    assert not folders.export.exists()
    calls.append([])
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    export_like_source(params, source, folders.export, quantization=quantization)
    assert calls[0] == calls[1]
