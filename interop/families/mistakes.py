"""Mistakes of older transformers that a folder does not show: what it was trained as is not what it says."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Mistake:
    """One of the versions from `since` on and before `before`.

    Attributes:
        since: major and minor number of the first version with it.
        before: of the first one without it.
        tell: config.json of the text model → what those versions did and what to do about it, to follow the version's
            name in a sentence; None where it made no difference.
    """

    since: tuple[int, int]
    before: tuple[int, int]
    tell: Callable[[Mapping[str, Any]], str | None]

    def told(self, version: Any, config: Mapping[str, Any]) -> str | None:
        """A sentence on a folder of that ``transformers_version`` and text model's config; None where it is right."""
        found = re.match(r"(\d+)\.(\d+)", version) if isinstance(version, str) else None
        if found is None or not self.since <= (int(found[1]), int(found[2])) < self.before:
            return None
        what = self.tell(config)
        return None if what is None else f"transformers {version}, which wrote this folder, {what}"
