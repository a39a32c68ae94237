"""A line of JSON as an object, and what to say where it is none."""

import codecs
import json
from typing import Any

from jaxmoe.errors import UserError

MAX_RECORD_BYTES = 2**25
"""Longest line of a jsonl file and longest text in a parquet file, which are read in one piece."""

BYTE_ORDER_MARK = codecs.BOM_UTF8


def parse_object(line: bytes, where: str, offset: int, expected: str = "an object") -> dict[str, Any]:
    """The object that a line holds.

    Args:
        line: its bytes.
        where: the file with the number of the line, which begins a message.
        offset: of the line's first byte in the file.
        expected: what a message says was expected.

    Raises:
        UserError: the line is not UTF-8, not JSON or no object.
    """
    try:
        source = line.decode()
    except UnicodeDecodeError as error:
        raise not_utf8(error, where, offset) from None
    try:
        row = json.loads(source)
    except json.JSONDecodeError as error:
        at = offset + len(source[: error.pos].encode())
        raise UserError(
            f"{where}: not JSON ({error.msg} at byte {at}); expected one object per line"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not readable as JSON ({error}); mend or remove the line") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: a JSON {json_type(row)}, expected {expected}")
    return row


def too_long(where: str, most: int, remedy: str) -> UserError:
    """What to say of a line with more than ``most`` bytes."""
    return UserError(
        f"{where}: longer than {most:,} bytes, the most that is read of a line; {remedy}, or raise the data's "
        "max_record_bytes"
    )


def not_utf8(error: UnicodeDecodeError, where: str, offset: int) -> UserError:
    """What to say of bytes that begin at ``offset`` and could not be decoded."""
    return UserError(
        f"{where}: byte 0x{error.object[error.start]:02x} at offset {offset + error.start} is not UTF-8; "
        "convert the file to UTF-8 (iconv -f ENCODING -t UTF-8) or leave it out"
    )


def half_surrogate(what: str, character: int | None = None) -> UserError:
    """What to say of a text with one of the two halves that only JSON's escapes can write apart."""
    at = "" if character is None else f" at character {character}"
    return UserError(f"{what} holds half a surrogate pair{at}, which no UTF-8 text can; remove it")


def json_type(value: object) -> str:
    """What JSON calls a value's type; Python's name of one that JSON does not have."""
    kinds = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return "null" if value is None else kinds.get(type(value), type(value).__name__)
