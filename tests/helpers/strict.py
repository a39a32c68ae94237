"""Checks shapes and dtypes of annotations at every call: what jaxtyping's import hook decorates functions with."""

import typing
from collections.abc import Callable
from typing import Any

from beartype import beartype
from jaxtyping import AbstractArray


def _is_array(annotation: Any) -> bool:
    parts = typing.get_args(annotation)
    return any(map(_is_array, parts)) or (
        isinstance(annotation, type) and issubclass(annotation, AbstractArray)
    )


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its arguments and result checked, if any is annotated with an array's shape.

    Other functions stay as they are: mypy has them.
    """
    annotations = getattr(function, "__annotations__", {}).values()
    return beartype(function) if any(map(_is_array, annotations)) else function
