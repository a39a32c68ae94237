"""Runs under an older transformers: small models of every family that it has, as folders, and what they compute.

    python -m older_folders.write FOLDER [FAMILY ...]

For each config of a family's case it writes ``FOLDER/FAMILY-INDEX/model``, as that version saves it, and beside it
``logits.npy`` (B, T, V), computed in float32 with eager attention before saving, and ``unread.json``, the fields of its
config.json that the version does not read. A model that the version cannot make has ``refusal.txt`` in their place.
"""

import argparse
import dataclasses
import inspect
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import families
import numpy as np
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

ROWS, LENGTH = 2, 75
_COMMON = frozenset(
    {"architectures", "bos_token_id", "eos_token_id", "model_type", "pad_token_id", "tie_word_embeddings"}
)
"""Fields that every config class takes, whether its signature says so or not."""


def tokens_of(vocab_size: int) -> np.ndarray:
    """(ROWS, LENGTH) token ids. From 3 on: some families never update the row of their padding id."""
    return np.random.default_rng(7).integers(3, vocab_size, (ROWS, LENGTH))


def logits_of(model: Any, case: families.Case) -> np.ndarray:
    """Of whole rows without padding: (ROWS, LENGTH, V) float32."""
    vocab_size = getattr(model.config, "vocab_size", None) or model.config.get_text_config().vocab_size
    tokens = torch.from_numpy(tokens_of(vocab_size))
    with torch.no_grad():
        out = case.text(model)(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            position_ids=torch.arange(LENGTH).tile(ROWS, 1),
            use_cache=False,
        )
    return out.logits.float().numpy()


def configs(model_type: str) -> Iterator[dict[str, Any]]:
    """The tiny config.json of a family's case, and those of its variants."""
    yield families.config_json(model_type)
    for variant in families.case_of(model_type).variants:
        yield families.config_json(model_type, variant)


def respelt(config_class: Any, fields: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Fields as this version takes them, and the names of those that it does not read.

    The rotation is spelt as the version spells it. A published config.json may have what a version does not read: it
    keeps such a field and writes it again.
    """
    fields = dict(fields)
    read = _names_read(config_class)
    if "rope_parameters" in fields and "rope_parameters" not in read:
        rope = dict(fields.pop("rope_parameters"))
        fields["rope_theta"] = rope.pop("rope_theta")
        if "partial_rotary_factor" in rope:
            fields["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
        if rope != {"rope_type": "default"}:
            fields["rope_scaling"] = rope
    unread = [name for name in fields if name not in read]
    for name, part in getattr(config_class, "sub_configs", {}).items():
        if name in fields:
            part = _class_of(part, fields[name])
            fields[name], more = respelt(part, fields[name])
            fields[name].setdefault("model_type", part.model_type)  # without it some versions keep a mapping
            unread += [f"{name}.{inner}" for inner in more]
    return fields, unread


def _class_of(config_class: Any, fields: Mapping[str, Any]) -> Any:
    return CONFIG_MAPPING[fields["model_type"]] if config_class is transformers.AutoConfig else config_class


def _names_read(config_class: Any) -> set[str]:
    """Fields of a config that the version has by name, or that the code of its model asks for."""
    names = (
        set(inspect.signature(config_class.__init__).parameters) | set(config_class.attribute_map) | _COMMON
    )
    if dataclasses.is_dataclass(config_class):
        names |= {field.name for field in dataclasses.fields(config_class)}
    for path in Path(inspect.getfile(config_class)).parent.glob("modeling_*.py"):
        asked = re.findall(r'config\.([a-z_0-9]+)|config, "([a-z_0-9]+)"', path.read_text(encoding="utf-8"))
        names |= {name for pair in asked for name in pair if name}
    return names


def without(fields: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Fields without some of them, those of a config within called OUTER.INNER."""
    return {
        name: without(
            value, [inner.removeprefix(f"{name}.") for inner in names if inner.startswith(f"{name}.")]
        )
        if isinstance(value, Mapping) and name.endswith("_config")
        else value
        for name, value in fields.items()
        if name not in names
    }


def _eager(config: Any) -> None:
    config._attn_implementation = "eager"
    if hasattr(config, "_experts_implementation"):
        config._experts_implementation = "eager"
    for part in getattr(config, "sub_configs", ()):
        if getattr(config, part, None) is not None:
            _eager(getattr(config, part))


def write(model_type: str, fields: Mapping[str, Any], folder: Path) -> None:
    """One model with random weights."""
    case = families.case_of(model_type)
    config = CONFIG_MAPPING[model_type](**fields)
    _eager(config)
    model = families.with_random_weights(getattr(transformers, case.architecture)(config), case)
    logits = logits_of(model, case)
    model.save_pretrained(folder / "model")
    np.save(folder / "logits.npy", logits)


def write_all(model_type: str, folder: Path) -> None:
    """Every config of a family; with a "+" in the folder's name, the fields that the version does not read as well."""
    for index, given in enumerate(configs(model_type)):
        del given["model_type"]
        fields, unread = respelt(CONFIG_MAPPING[model_type], given)
        forms = {f"{model_type}-{index}": (without(fields, unread), [])}
        if unread:
            forms[f"{model_type}-{index}+"] = (fields, unread)
        for name, (form, names) in forms.items():
            place = folder / name
            place.mkdir(parents=True)
            (place / "unread.json").write_text(json.dumps(names), encoding="utf-8")
            try:
                write(model_type, form, place)
            except Exception as error:  # whatever that version says of a config newer than itself
                reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
                (place / "refusal.txt").write_text(reason + "\n", encoding="utf-8")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("family", nargs="*")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for family in options.family:
        if family in CONFIG_MAPPING and hasattr(transformers, families.case_of(family).architecture):
            write_all(family, options.folder)


if __name__ == "__main__":
    main()
