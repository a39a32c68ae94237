"""Boxes of fused axes."""

import numpy as np
import pytest

from jaxmoe.interop.storage.slices import finer_axes, runs

pytestmark = pytest.mark.once  # Indices of numpy arrays.


def test_runs_of_fused_axes():
    for sizes in ((6,), (2, 5), (3, 2, 4)):
        array = np.arange(np.prod(sizes)).reshape(sizes)
        for start in range(array.size):
            for stop in range(start + 1, array.size + 1):
                found = np.concatenate([array[box].ravel() for box in runs(sizes, start, stop)])
                np.testing.assert_array_equal(found, np.arange(start, stop))


def test_finer_axes():
    assert finer_axes((6, 40), (2, 3, 8, 5)) == [[0, 1], [2, 3]]
    assert finer_axes((1, 40), (1, 8, 1, 5, 1)) == [[], [0, 1, 2, 3, 4]]
    for sizes in ((6, 20), (6, 40, 2), (3, 2, 20, 4), (240,)):
        with pytest.raises(ValueError, match="does not split"):
            finer_axes((6, 40), sizes)
