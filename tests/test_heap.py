"""What is freed stays with the process."""

import platform
import subprocess
import sys

import pytest

_PROGRAM = """
import resource
from jaxmoe.heap import keep_freed_memory
assert keep_freed_memory() is KEPT
for size in [1 << 26] * 3:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"1" * size  # more than what glibc keeps by itself
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc's malloc that is told")
@pytest.mark.parametrize("variables", [{}, {"MALLOC_ARENA_MAX": "2"}])
def test_freed_memory_is_kept(variables):
    """But not where the environment says what malloc should do."""
    program = _PROGRAM.replace("KEPT", str(not variables))
    environment = {"JAX_PLATFORMS": "cpu"} | variables
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert (int(run.stdout) < 10) == (not variables)
