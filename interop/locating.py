"""From what a user calls a model to its folder, and what such a folder may be instead of a model."""

import json
from pathlib import Path
from typing import Any

from jaxmoe.errors import UserError, listed, quote
from jaxmoe.files import read_text, why_unusable
from jaxmoe.hub import is_hub_id, snapshot

_HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.md")
_ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = ("adapter_model.*", "adapter_model-*")
_MAX_ADAPTER_CONFIG = 1 << 20
_LISTED = 3


def resolve_folder(path_or_hub_id: str | Path) -> Path:
    """A local folder, or the local snapshot of a hub repository (downloaded if need be; safetensors only).

    Raises:
        UserError: neither; or the folder holds an adapter, or is one that the hub's client keeps snapshots in.
    """
    if bad := why_unusable(path_or_hub_id):
        raise UserError(f"{bad}; give a folder with config.json, or a hub id like org/name")
    path = Path(path_or_hub_id).expanduser()
    if path.is_file():
        raise UserError(f"{path}: is a file, expected a folder with config.json; give {path.parent}")
    folder = path if path.exists() else _downloaded(path_or_hub_id)
    if bad := why_unusable(folder / "config.json"):
        raise UserError(f"{bad}; give a folder with a config.json that can be read")
    _refuse_cache(folder)
    _refuse_adapter(folder)
    return folder


def _downloaded(hub_id: str | Path) -> Path:
    if not is_hub_id(str(hub_id)):
        raise UserError(
            f"model folder {Path(hub_id).expanduser()} does not exist: give a folder with config.json, or a hub id "
            "like org/name"
        )
    return snapshot(str(hub_id), _HUB_FILES)


def _refuse_cache(folder: Path) -> None:
    """Refuse ``models--org--name`` of the hub's cache, whose snapshots are the models."""
    if (folder / "config.json").exists() or not (folder / "snapshots").is_dir():
        return
    snapshots = sorted(str(path) for path in folder.glob("snapshots/*") if path.is_dir())
    found = (
        listed(snapshots, _LISTED) if snapshots else "snapshots/, which is empty: download the model again"
    )
    raise UserError(
        f"{folder}: is a folder of the hub's cache and no model, expected one of its snapshots; give {found}"
    )


def _refuse_adapter(folder: Path) -> None:
    """Refuse a PEFT adapter, alone or beside the model that it would change: transformers applies it, we cannot."""
    found = [path.name for pattern in (_ADAPTER_CONFIG, *_ADAPTER_WEIGHTS) for path in folder.glob(pattern)]
    if not found:
        return
    base = _base_model(folder / _ADAPTER_CONFIG)
    adapter = f"a PEFT adapter ({listed(sorted(found), _LISTED)}){f' of {base}' if base else ''}"
    if (folder / "config.json").exists():
        raise UserError(
            f"{folder}: holds {adapter} beside the model, which would not be applied; merge it into the model (PEFT: "
            "merge_and_unload, save_pretrained) and give the result, or move the adapter's files out of the folder"
        )
    raise UserError(
        f"{folder}: is {adapter} and no model, expected a folder with config.json; merge it into its base model "
        "(jaxmoe merge) and give the result, or give the base model"
    )


def _base_model(file: Path) -> str | None:
    """The model that an adapter names as its own, quoted; None where it names none that can be read."""
    try:
        config: Any = json.loads(read_text(file, _MAX_ADAPTER_CONFIG))
    except (OSError, ValueError, RecursionError):
        return None
    name = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    return quote(name) if isinstance(name, str) and name else None
