"""Conversations that every machine has: what the running Python's documentation says of its own library."""

import ast
import inspect
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxmoe.data.files import STANDARD_LIBRARY, find_files
from jaxmoe.files import cannot_write, lock, write_atomically

DOCSTRINGS = "python:docstrings"
"""The path that stands for questions and answers made of the docstrings of the running Python's standard library."""

_MOST_CHARACTERS = 300
_ASKED = {"module": "What is the module {} for?", "class": "What is a {}?", "function": "What does {} do?"}


def docstring_file(cache: Path) -> Path:
    """The rows as a .jsonl file in ``cache``, made if it is not there.

    Raises:
        UserError: it cannot be written.
    """
    file = cache / f"docstrings-{platform.python_version()}.jsonl"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # Runs that begin together would write into each other.
        held = lock(file.with_suffix(".lock"), str(file), wait=True)
        try:
            if not file.exists():
                write_atomically(file, "".join(json.dumps(row) + "\n" for row in docstring_rows()))
        finally:
            os.close(held)
    except OSError as error:
        raise cannot_write(f"data.cache: {file}: cannot write rows", error) from error
    return file


def docstring_rows() -> Iterator[dict[str, Any]]:
    """Conversations of one question and, of classes, a second one; each with one paragraph as its answer."""
    _, files = find_files(STANDARD_LIBRARY, None, ())
    for relative, path in files:
        module = relative.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        if any(part.startswith("_") for part in module.split(".")):
            continue
        try:
            tree = ast.parse(path.read_text("utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # files for other versions of Python
        said = [(module, "module", tree), *_members(tree, module)]
        for name, kind, node in said:
            turns = list(_turns(name, kind, node))
            if turns:
                yield {"messages": turns}


def _members(node: Any, prefix: str) -> Iterator[tuple[str, str, Any]]:
    for member in node.body:
        if isinstance(member, ast.FunctionDef | ast.ClassDef) and not member.name.startswith("_"):
            kind = "class" if isinstance(member, ast.ClassDef) else "function"
            yield f"{prefix}.{member.name}", kind, member
            if kind == "class":
                yield from _members(member, f"{prefix}.{member.name}")


def _turns(name: str, kind: str, node: Any) -> Iterator[dict[str, str]]:
    answer = _first_paragraph(ast.get_docstring(node) or "")
    if answer is None:
        return
    yield {"role": "user", "content": _ASKED[kind].format(name)}
    yield {"role": "assistant", "content": answer}
    methods = [m for m in getattr(node, "body", ()) if isinstance(m, ast.FunctionDef) and m.name[0] != "_"]
    if kind == "class" and methods:
        yield {"role": "user", "content": "Which methods does it have?"}
        yield {"role": "assistant", "content": ", ".join(method.name for method in methods[:8]) + "."}


def _first_paragraph(docstring: str) -> str | None:
    """In one line; None of what is no sentence or too long."""
    paragraph = " ".join(inspect.cleandoc(docstring).split("\n\n")[0].split())
    usable = 15 <= len(paragraph) <= _MOST_CHARACTERS and paragraph[0].isalpha() and paragraph.isascii()
    return paragraph if usable else None
