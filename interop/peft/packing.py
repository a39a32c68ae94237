"""How PEFT packs the factors of all experts of a layer into two matrices, in its three eras.

A is (E·r, x), row e·r + k: experts slowest. B is (y, r·E), column k·E + e: experts fastest. Up to 0.18.1, x is the
first axis of an expert's matrix as it is stored, so that a base of (E, out, in) has its A on the outputs and its B on
the inputs ("exchanged"). 0.19.0 swapped the two for bases of (E, in, out) alone, which had been right. Since 0.19.1 A
is on the inputs of both.
"""

import re

import numpy as np

from jaxmoe.errors import quote

_ALWAYS_RIGHT = (0, 19, 1)
_ONCE_SWAPPED = (0, 19, 0)
_BEFORE = (0, 18, 1)
"""The last release that never swapped."""


def pack(a_EKI: np.ndarray, b_EOK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Factors per expert as PEFT 0.19.1 and later store them.

    Args:
        a_EKI: (E, r, in).
        b_EOK: (E, out, r).

    Returns:
        (E·r, in) and (out, r·E).
    """
    experts, rank, _ = a_EKI.shape
    b = b_EOK.transpose(1, 2, 0).reshape(-1, rank * experts)
    return a_EKI.reshape(experts * rank, -1), np.ascontiguousarray(b)


def unpack(a: np.ndarray, b: np.ndarray, experts: int, exchanged: bool) -> tuple[np.ndarray, np.ndarray]:
    """The reverse.

    Args:
        a: (E·r, in); where `exchanged` (E·r, out).
        b: (out, r·E); where `exchanged` (in, r·E).
        experts: E.
        exchanged: A is on the outputs.

    Returns:
        A (E, r, in) and B (E, out, r).
    """
    first = a.reshape(experts, -1, a.shape[1])
    second = b.reshape(b.shape[0], -1, experts).transpose(2, 0, 1)
    if exchanged:
        return np.ascontiguousarray(second.swapaxes(1, 2)), np.ascontiguousarray(first.swapaxes(1, 2))
    return first, np.ascontiguousarray(second)


def is_exchanged(
    a_size: int, b_size: int, sizes: tuple[int, int], transposed: bool, version: str | None
) -> bool:
    """Which of the two orientations factors have: by their shapes, and where those fit both by PEFT's version.

    Args:
        a_size: features that A is on.
        b_size: features that B is on.
        sizes: (out, in) of an expert.
        transposed: the base is (E, in, out).
        version: ``peft_version`` of the config.

    Raises:
        ValueError: neither fits, or both do and the version does not decide; says what was expected.
    """
    outputs, inputs = sizes
    if (b_size, a_size) not in {(outputs, inputs), (inputs, outputs)}:
        raise ValueError(
            f"A is on {a_size} features and B on {b_size}, expected {inputs} and {outputs}, or before PEFT 0.19.1 "
            f"{outputs} and {inputs}"
        )
    if outputs != inputs:
        return a_size == outputs
    if version is None:
        raise ValueError(
            f"experts of {outputs} outputs and as many inputs, which PEFT before 0.19.1 took for each other: expected "
            "peft_version in adapter_config.json; add that of the PEFT that wrote it"
        )
    return _exchanges(version, transposed)


def _exchanges(version: str, transposed: bool) -> bool:
    """Whether a version of PEFT has A on the outputs."""
    found = re.match(r"(\d+)\.(\d+)\.(\d+)(\.?dev)?", version)
    release = None if found is None else tuple(map(int, found.groups()[:3]))
    if release is None or (found is not None and found[4] and _BEFORE < release <= _ALWAYS_RIGHT):
        raise ValueError(
            f"peft_version = {quote(version)} does not say how square experts are packed: expected a release, such as "
            "'0.19.1'; set it to the one nearest to the PEFT that wrote it"
        )
    if release >= _ALWAYS_RIGHT:
        return False
    return True if release == _ONCE_SWAPPED else not transposed
