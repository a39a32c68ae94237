"""Several processes as one run: how they join, and how they agree where they could part.

A process that raises alone leaves the others waiting in a collective operation for good. So whatever one of them
may find wrong, or see differently, goes through `agree` or `first`, which end alike in all. These are collective
too: every process calls them, in the same order. In a run of one process they do nothing but call.
"""

import json
import os
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import numpy as np

from jaxmoe.errors import UserError, first_line

T = TypeVar("T")


def join() -> None:
    """Connect this process to the others of its run, before anything else is done with jax.

    Slurm, Open MPI and others tell jax where they are. Elsewhere JAX_COORDINATOR_ADDRESS, which jax reads itself,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID do.

    Raises:
        UserError: there is nothing to join.
    """
    try:
        jax.distributed.initialize(
            num_processes=_number("JAX_NUM_PROCESSES"), process_id=_number("JAX_PROCESS_ID")
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"train.distributed: found no cluster to join ({first_line(error)}): start the command "
            "with srun or mpirun, set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or set "
            "train.distributed=false"
        ) from error


def agree(action: Callable[[], T]) -> T:
    """Run `action` in every process; what one of them raises is raised in all.

    Nothing in `action` may wait for another process that could have failed before it came to that.

    Returns:
        What `action` returned in this process.

    Raises:
        UserError: one process raised it; the first's message where several did.
        Exception: a fault in this process.
        RuntimeError: a fault in another process.
    """
    if jax.process_count() == 1:
        return action()
    result: T | None = None
    failure: Exception | None = None
    try:
        result = action()
    except Exception as error:
        failure = error
    outcomes = gather(None if failure is None else _told(failure))
    mistakes = [message for kind, message in filter(None, outcomes) if kind == UserError.__name__]
    if mistakes:
        raise UserError(mistakes[0]) from failure
    if failure is not None:
        raise failure
    faults = [f"process {i}: {': '.join(told)}" for i, told in enumerate(outcomes) if told is not None]
    if faults:
        raise RuntimeError(f"another process failed: {faults[0]}")
    return cast(T, result)


def first(action: Callable[[], T]) -> T:
    """Run `action` in process 0 alone; all get what it returns or raises.

    Args:
        action: its value must be one that JSON can hold.

    Raises:
        UserError, RuntimeError: as in `agree`.
    """
    if jax.process_count() == 1:
        return action()
    return gather(agree(lambda: action() if jax.process_index() == 0 else None))[0]


def gather(value: Any) -> list[Any]:
    """The value of every process, in the order of their indices. JSON must be able to hold it."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    text = np.frombuffer(b"" if value is None else json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(text.size)).reshape(-1)
    if not sizes.any():  # by far the most frequent case costs one exchange
        return [None] * sizes.size
    padded = np.zeros(1 << (int(sizes.max()) - 1).bit_length(), np.uint8)  # few sizes, to compile for few
    padded[: text.size] = text
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) if size else None for row, size in zip(rows, sizes, strict=True)]


def _told(error: Exception) -> list[str]:
    kind = UserError if isinstance(error, UserError) else type(error)
    return [kind.__name__, str(error)]


def _number(name: str) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return None
    if not text.isdecimal():
        raise UserError(f"the environment has {name} = {text!r}: expected a number from 0")
    return int(text)
