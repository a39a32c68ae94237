"""Mosaic GPU kernels on a CPU: the interpreter that ships with jax, made usable for a test suite.

One jaxpr is compiled once and not once for every simulated warpgroup and block; a deadlock is an error after
`PATIENCE` seconds; and jax 0.10.2, the last one for Python 3.11, learns to read transposed operands of the tensor
cores and takes kernels that leave a barrier's last phase unobserved, as jax 0.12 does and devices do.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import jax
from jax._src.pallas.mosaic.interpret import thread_map, utils
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, shared_memory
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from jax._src.state.types import TransposeTransform

from jaxmoe.kernels.expert_mlp import api
from jaxmoe.kernels.expert_mlp.mosaic.layer import Mosaic

PATIENCE = 120.0
"""Seconds without any arrival at a barrier after which a thread that waits there gives up."""

MULTIPROCESSORS = 2
"""Simulated one after the other, so that tiles are dealt out as on a device."""

PARAMETERS = InterpretGPUParams()


def mosaic_backend() -> Mosaic:
    """The kernels, interpreted."""
    return Mosaic(MULTIPROCESSORS, PARAMETERS)


@contextlib.contextmanager
def interpreted_kernels() -> Iterator[None]:
    """`expert_mlp(backend="mosaic")` runs on this CPU; what a failing kernel leaves behind is cleared at the end."""
    on_device = api._BACKENDS["mosaic"]
    api._BACKENDS["mosaic"] = mosaic_backend()
    try:
        yield
    finally:
        api._BACKENDS["mosaic"] = on_device
        gpu_callbacks.reset_gpu_interpret_mode_state()


def jit_and_wait(function: Callable[..., Any]) -> Callable[..., Any]:
    """A jitted function that waits for its results.

    An interpreted kernel calls back to Python, which uses jax on small arrays; if the next computation was dispatched
    by then, both would wait for each other.
    """
    jitted = jax.jit(function)
    return lambda *arguments: jax.block_until_ready(jitted(*arguments))


def _compile_once() -> None:
    """The interpreter compiles a kernel anew in every thread (0.10.2), or in all threads at once (0.12)."""
    compiled: dict[int, tuple[Any, Any]] = {}
    lock = threading.Lock()

    def run_jaxpr(jaxpr: Any, consts: Any, *args: Any) -> None:
        with lock:
            if id(jaxpr) not in compiled:
                run = lambda consts, *args: jax.core.eval_jaxpr(jaxpr, consts, *args) and None
                # The jaxpr is kept too, or another one might get its id.
                compiled[id(jaxpr)] = jaxpr, jax.jit(run).lower(consts, *args).compile()
        compiled[id(jaxpr)][1](consts, *args)

    thread_map._run_jaxpr = run_jaxpr


class _ImpatientCondition(threading.Condition):
    def wait(self, timeout: float | None = None) -> bool:
        arrived = super().wait(PATIENCE if timeout is None else timeout)
        if timeout is None and not arrived:
            raise TimeoutError(
                f"no arrival at a barrier for {PATIENCE:g} seconds: the kernel is in a deadlock"
            )
        return arrived


def _give_up_on_deadlocks() -> None:
    names = {name: getattr(threading, name) for name in threading.__all__}
    shared_memory.threading = SimpleNamespace(**(names | {"Condition": _ImpatientCondition}))


ON_0_10 = not hasattr(utils, "to_access")


class _Transposed(tuple):
    """A range of a buffer whose two axes the reader wants swapped."""


def _read_transposed() -> None:
    """What jax 0.12 does in `shared_memory.access`, for a transposition that comes after all indexing."""
    to_range, get = utils.to_range, shared_memory.GPUSharedMemory.get_buffer_content

    def to_range_or_transposed(transforms: Any) -> Any:
        if not transforms or not isinstance(transforms[-1], TransposeTransform):
            return to_range(transforms)
        assert tuple(transforms[-1].permutation) == (1, 0)
        return _Transposed(to_range(transforms[:-1]))

    def get_buffer_content(self: Any, key: Any, rnge: Any, *args: Any, **kwargs: Any) -> Any:
        content, *rest = get(self, key, tuple(rnge), *args, **kwargs)
        return (content.T if isinstance(rnge, _Transposed) else content), *rest

    utils.to_range = to_range_or_transposed
    shared_memory.GPUSharedMemory.get_buffer_content = get_buffer_content


def _allow_unobserved_phases() -> None:
    """Nobody waits until the consumers have released the last stages."""

    def deallocate(self: Any) -> None:
        with self.cv:
            self.ref_count -= 1

    shared_memory.Barrier.deallocate = deallocate


_compile_once()
_give_up_on_deadlocks()
if ON_0_10:
    _read_transposed()
    _allow_unobserved_phases()
