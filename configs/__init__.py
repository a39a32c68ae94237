"""Runs to start from (``*.yaml``), and what is known of published models (``published.json``)."""

import dataclasses
import functools
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any


@dataclasses.dataclass(frozen=True)
class Published:
    """A model as its authors published it.

    Attributes:
        hub: its id on the Hugging Face hub.
        parameters: of trunk and output head, as transformers counts them; None where nothing here counts them.
        config: its config.json, or those of its fields that decide sizes. Of a model of several parts (vision and
            language), the fields of the text model.
    """

    hub: str
    parameters: int | None
    config: Mapping[str, Any]


@functools.cache
def published() -> Mapping[str, Published]:
    """By name, in the order of ``published.json``.

    An entry there with ``"as": NAME`` is that other model with the fields of ``config`` changed.
    """
    text = resources.files(__name__).joinpath("published.json").read_text(encoding="utf-8")
    entries: dict[str, dict[str, Any]] = json.loads(text)
    models: dict[str, Published] = {}
    for name, entry in entries.items():
        if "as" in entry:
            like = models[entry["as"]]
            models[name] = Published(entry["hub"], like.parameters, {**like.config, **entry["config"]})
        else:
            models[name] = Published(entry["hub"], entry["parameters"], entry["config"])
    return models
