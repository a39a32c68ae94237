"""transformers imports torch where that is installed, which takes a second and which no command needs."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

_left_out = False


def leave_torch_out() -> None:
    """From now on `importing_transformers` hides torch. For processes that are a command's own: it cannot be undone."""
    global _left_out
    _left_out = True


@contextlib.contextmanager
def importing_transformers() -> Iterator[None]:
    """To import transformers in; it remembers whether it found torch. Others, such as einops, look for it later."""
    if not _left_out or "torch" in sys.modules:
        yield
        return
    absent: Any = None
    sys.modules["torch"] = absent
    try:
        yield
    finally:
        del sys.modules["torch"]
