"""Checks shapes and dtypes of annotations at every call: what jaxtyping's import hook decorates functions with."""

import inspect
import typing
from collections.abc import Callable
from typing import Any

import jaxtyping
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


def _may_be_array(annotation: Any) -> bool:
    unread = isinstance(annotation, str | typing.ForwardRef)
    return unread or _is_array(annotation) or any(map(_may_be_array, typing.get_args(annotation)))


_JAXTYPED = jaxtyping.jaxtyped


def _sparing(*, typechecker: Any) -> Callable[[Any], Any]:
    """`jaxtyping.jaxtyped` that leaves alone what has nothing for `checked` to check.

    It wraps every function, which makes calling one dear and importing jaxmoe take twice as long.
    """

    def decorated(thing: Any) -> Any:
        function = thing.__init__ if inspect.isclass(thing) else thing
        annotations = getattr(function, "__annotations__", {}).values()
        return _JAXTYPED(thing, typechecker=typechecker) if any(map(_may_be_array, annotations)) else thing

    return decorated


def install() -> None:
    jaxtyping.jaxtyped = _sparing  # what the hook puts above functions is looked up there
    jaxtyping.install_import_hook("jaxmoe", "helpers.strict.checked")
