"""Memory that a step on a CPU gives back stays with the process, for the next one."""

import ctypes
import importlib.util
import os
import platform

# Of mallopt, as in malloc.h.
_ARENA_MAX, _MMAP_MAX, _TRIM_THRESHOLD = -8, -4, -1


def keep_freed_memory() -> bool:
    """Have malloc keep what is freed where a CPU computes; returns whether it now does.

    XLA allocates a step's buffers anew in every step. By default glibc gives large ones back, and the kernel then
    clears each of their pages again on first touch, which is a seventh of the time of a small model's step. The
    process never gets smaller than its peak.

    To be called before the run's modules are imported: threads that have begun keep arenas of their own. It leaves
    alone what is not glibc, processes whose jax may find an accelerator, and those whose environment sets MALLOC_
    variables.
    """
    on_cpu = os.environ.get("JAX_PLATFORMS") == "cpu" or importlib.util.find_spec("jax_plugins") is None
    if (
        platform.libc_ver()[0] != "glibc"
        or not on_cpu
        or any(name.startswith("MALLOC_") for name in os.environ)
    ):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # Arenas other than the first have large blocks from mmap in any case; a threshold of -1 is never reached.
    return all([mallopt(_ARENA_MAX, 1), mallopt(_MMAP_MAX, 0), mallopt(_TRIM_THRESHOLD, -1)])
