"""YAML to nested mappings, and single keys on top of them."""

import itertools
from collections.abc import Iterator
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any

import yaml

from jaxmoe.errors import UserError, quote
from jaxmoe.files import read_text, why_unusable

MAX_BYTES = 2**18
"""Of a run's YAML: PyYAML takes seconds for so much of the densest kind."""

MAX_VALUES = 10_000
"""What all aliases of a text together may stand for. Each repeats a value as a reference, but who looks at the
values, to check or to quote them, meets each of them as often as it is there: nine in nine in nine soon are billions.
"""


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, where YAML would let the last one win."""

    def construct_object(self, node: yaml.Node, deep: bool = True) -> Any:  # noqa: ARG002
        """What a node stands for. Always deep: a list that holds itself is refused in that way alone."""
        try:
            value = super().construct_object(node, deep=True)
            if isinstance(value, str | int):
                str(value).encode()  # fails for half a surrogate pair, and for more digits than Python prints
        except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError):
            # SafeLoader takes it for granted that a value is what its tag says: !!int abc, or a 99th of May.
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(
                None, None, f"{quote(node.value)} cannot be read as {kind}", node.start_mark
            ) from None
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key_node.tag != "tag:yaml.org,2002:merge" and key_node.value.__hash__:
                if (key_node.tag, key_node.value) in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"duplicate key {key_node.value!r}", key_node.start_mark
                    )
                seen.add((key_node.tag, key_node.value))
        return super().construct_mapping(node, deep)


def read_mapping(file: Traversable) -> dict[str, Any]:
    """The sections of a YAML file.

    Raises:
        UserError: it cannot be read, is not YAML, repeats a key, or holds something else than a mapping.
    """
    mapping = _parse(_text(file), str(file))
    if not isinstance(mapping, dict):
        found = "nothing" if mapping is None else type(mapping).__name__
        raise UserError(f"{file}: found {found}, expected a mapping of sections such as model:")
    return mapping


def _text(path: Traversable) -> str:
    if unusable := why_unusable(str(path)):
        raise UserError(f"{unusable}; expected a YAML configuration")
    try:
        with resources.as_file(path) as file:
            return read_text(file, MAX_BYTES)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, expected a YAML configuration") from None
    except IsADirectoryError:
        raise UserError(f"{path}: found a folder, expected a YAML configuration file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read the configuration: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8, expected a YAML text file") from None


def _parse(text: str, source: str) -> Any:
    try:
        loader = _StrictLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        repeated = _values(node) - len(_distinct(node))
        if repeated > MAX_VALUES:
            raise UserError(
                f"{source}: its aliases (*name) stand for more than {MAX_VALUES:,} values, expected at most so many: "
                "write out what they stand for"
            )
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = "" if mark is None else f" in line {mark.line + 1}, column {mark.column + 1}"
        raise UserError(f"{source}: not valid YAML{where}: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError as error:
        raise UserError(f"{source}: not valid YAML: {error}") from None


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        yield from itertools.chain.from_iterable(node.value)
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


def _distinct(node: yaml.Node) -> set[int]:
    """Every node as it is written, by identity; an alias is the very node that it names."""
    seen, waiting = {id(node)}, [node]
    while waiting:
        for child in _children(waiting.pop()):
            if id(child) not in seen:
                seen.add(id(child))
                waiting.append(child)
    return seen


def _values(node: yaml.Node, known: dict[int, int] | None = None) -> int:
    """How many nodes there are when every alias is written out; a list in itself is left to the loader to refuse."""
    known = {} if known is None else known
    if id(node) not in known:
        known[id(node)] = 1
        known[id(node)] = 1 + sum(_values(child, known) for child in _children(node))
    return known[id(node)]


def apply_override(mapping: dict[str, Any], override: str) -> None:
    """Set one key of `mapping` in place, from ``key.path=value`` with the value read as YAML.

    Raises:
        UserError: no "=", an empty part in the path, a value that is not YAML, or a path through something
            that has no such keys.
    """
    told = f"override {quote(override)}"
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(f"{told}: expected key.path=value, such as train.steps=100")
    value = _parse(text, told)
    here: Any = mapping
    for depth, part in enumerate(parts):
        if not isinstance(here, dict):
            raise UserError(f"{told}: {'.'.join(parts[:depth])} is {quote(here)} and has no keys")
        if depth == len(parts) - 1:
            here[part] = value
            return
        if here.get(part) is None:
            here[part] = {}
        here = here[part]
