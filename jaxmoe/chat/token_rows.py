"""Rows that were tokenized before."""

from collections.abc import Mapping
from typing import Any

from jaxmoe.chat.reading import shown, unexpected
from jaxmoe.chat.records import Tokens
from jaxmoe.errors import UserError

IGNORED = -100
"""The label of a token that is not trained."""

MASKS = ("assistant_masks", "completion_mask")

_MOST_ID = 2**31


def read_tokens(
    where: str, row: Mapping[str, Any], ids_at: tuple[str, Any], labels_at: tuple[str, Any]
) -> Tokens:
    """The ids of a row and which are trained, without its padding.

    Args:
        where: of the row, for messages.
        row: which may have an attention_mask, and masks of what is trained in place of labels.
        ids_at: name and value of the ids.
        labels_at: the like of the labels, which are not shifted; None where there are none.

    Raises:
        UserError: something in it is not as expected.
    """
    ids = _ids(f"{where}: {ids_at[0]}", ids_at[1])
    masks = {name: row[name] for name in MASKS if row.get(name) is not None}
    if labels_at[1] is not None:
        if masks:
            raise UserError(
                f"{where}: {labels_at[0]} and {next(iter(masks))} both say what is trained, expected one; remove the "
                "other"
            )
        trained = _from_labels(f"{where}: {labels_at[0]}", labels_at[1], ids)
    else:
        trained = [True] * len(ids)
        for name, mask in masks.items():  # trained is what all of them have
            flags = _mask(f"{where}: {name}", mask, len(ids))
            trained = [a and b for a, b in zip(trained, flags, strict=True)]
    end = _end(where, row.get("attention_mask"), len(ids))
    return Tokens(tuple(ids[:end]), tuple(map(float, trained[:end])))


def _ids(at: str, value: object) -> list[int]:
    if not isinstance(value, list):
        raise unexpected(at, value, "an array of token ids", "mend or remove the row")
    if not value:
        raise UserError(f"{at} is empty, expected at least one token id; remove the row")
    for i, item in enumerate(value):
        if type(item) is not int or not 0 <= item < _MOST_ID:
            raise unexpected(
                f"{at}[{i}]", item, "a token id, a whole number of 0 or more", "tokenize the row again"
            )
    return value


def _same_length(at: str, value: object, count: int) -> list[Any]:
    if not isinstance(value, list):
        raise unexpected(at, value, f"an array of {count}", "mend or remove the row")
    if len(value) != count:
        raise UserError(
            f"{at} has {len(value)} entries, expected {count}, one for each id; tokenize the row again"
        )
    return value


def _from_labels(at: str, value: object, ids: list[int]) -> list[bool]:
    labels = _same_length(at, value, len(ids))
    for i, (label, token) in enumerate(zip(labels, ids, strict=True)):
        if type(label) is not int or label not in (token, IGNORED):
            raise UserError(
                f"{at}[{i}] is {shown(label)}, expected {token}, which is the id at its place, or {IGNORED}; labels "
                "are not shifted: remove the shift, or the labels"
            )
    return [label != IGNORED for label in labels]


def _mask(at: str, value: object, count: int) -> list[bool]:
    mask = _same_length(at, value, count)
    for i, item in enumerate(mask):
        if not isinstance(item, bool | int) or item not in (0, 1):
            raise unexpected(f"{at}[{i}]", item, "0 or 1", "mend or remove the row")
    return [bool(item) for item in mask]


def _end(where: str, mask: object, count: int) -> int:
    """How many ids there are before the padding."""
    if mask is None:
        return count
    at = f"{where}: attention_mask"
    flags = _mask(at, mask, count)
    end = sum(flags)
    if not end:
        raise UserError(f"{at} has zeros only, expected ones where there are tokens; remove the row")
    if not all(flags[:end]):
        raise UserError(
            f"{at}[{flags.index(False)}] is 0 before a 1, expected zeros at the end alone, where padding is cut; "
            "remove the padding or pad on the right"
        )
    return end
