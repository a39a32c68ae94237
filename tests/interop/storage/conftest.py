"""A folder to read, and arrays to write."""

import ml_dtypes
import numpy as np
import pytest
from helpers.files import random_array, write_index
from safetensors.numpy import save_file

from jaxmoe.interop.storage.format import DTYPES


@pytest.fixture
def sharded(tmp_path):
    """A folder of two shards; returns it and its arrays."""
    rng = np.random.default_rng(0)
    arrays = {
        "a": random_array(rng, (3, 5), ml_dtypes.bfloat16),
        "b": random_array(rng, (7,)),
        "c": random_array(rng, (2, 4), np.int64),
        "d": random_array(rng, (6,), np.uint8),
    }
    save_file(
        {name: arrays[name] for name in "ad"}, tmp_path / "model-00001-of-00002.safetensors", {"format": "pt"}
    )
    save_file({name: arrays[name] for name in "bc"}, tmp_path / "model-00002-of-00002.safetensors")
    write_index(
        tmp_path, {name: f"model-0000{1 if name in 'ad' else 2}-of-00002.safetensors" for name in arrays}
    )
    return tmp_path, arrays


@pytest.fixture
def arrays():
    """A tensor of every dtype that numpy holds, names against the dtype order; some empty, some scalars."""
    rng = np.random.default_rng(0)
    result = {}
    for number, (name, entry) in enumerate(DTYPES.items()):
        if entry.numpy is not None:
            shape = (number % 4, 3) if number % 5 else ()
            result[f"{number * 7 % 23}.{name}"] = rng.integers(0, 2, shape).astype(entry.numpy)
    return result | {"zulu": np.ones((2, 3), np.float32), "alpha": np.zeros((5,), np.float32)}
