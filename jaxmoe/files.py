"""Paths as users give them."""

from pathlib import Path

from jaxmoe.errors import UserError


def why_unusable(path: str | Path, *, allow: tuple[type[OSError], ...] = ()) -> str | None:
    """A sentence on why nothing could be at a path; None where something is, or could be.

    A name that is too long, a NUL in it, a loop of symlinks, a folder that may not be entered, the home of an
    unknown user: asked later, one function or another of pathlib would raise, and not the same in each Python.

    Args:
        path: may be missing.
        allow: errors of the system that are no reason.
    """
    try:
        Path(path).expanduser().stat()
        return None
    except OSError as error:
        if isinstance(error, (FileNotFoundError, NotADirectoryError, *allow)):
            return None
        reason = error.strerror or str(error)
    except ValueError:
        reason = "it has a character that no path can have"
    except RuntimeError as error:
        reason = str(error).rstrip(".")
    text = str(path)
    text = text if len(text) <= 300 else f"{text[:297]}..."
    return f"found {text!r}, which is no usable path ({reason})"


def path_argument(text: str) -> str:
    """The ``type=`` of a command's argument that is a path, or may be one.

    Raises:
        UserError: nothing could be there.
    """
    unusable = why_unusable(text)
    if unusable is not None:
        raise UserError(f"{unusable}; give another one")
    return text
