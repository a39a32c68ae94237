"""Export folders: what is in them, byte for byte."""

import filecmp
from pathlib import Path

import jax

from jaxmoe.interop.storage.reader import CheckpointFolder
from jaxmoe.parallel.sharding import make_mesh


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
