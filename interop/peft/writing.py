"""Writing an adapter as a folder that PEFT 0.19.1 and later load as it is."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmoe.errors import UserError, listed
from jaxmoe.interop.peft.adapter import Adapter, LowRank
from jaxmoe.interop.peft.anatomy import Anatomy, Module
from jaxmoe.interop.peft.card import model_card
from jaxmoe.interop.peft.config import CONFIG_FILE, AdapterConfig, parse_adapter_config
from jaxmoe.interop.peft.keys import factor_key, whole_key
from jaxmoe.interop.peft.matching import match
from jaxmoe.interop.peft.packing import pack
from jaxmoe.interop.peft.reading import WEIGHTS_FILE
from jaxmoe.interop.storage.format import dtype_name, new_shard
from jaxmoe.interop.storage.problems import raise_problems
from jaxmoe.interop.storage.writer import FORMAT_METADATA, FolderWriter

PEFT_VERSION = "0.21.2"
"""Of the format that is written; readers tell from it how square experts are packed."""


def write_adapter(
    adapter: Adapter,
    anatomy: Anatomy,
    folder: str | Path,
    *,
    overwrite: bool = False,
    extra_files: Mapping[str, bytes] | None = None,
) -> None:
    """Write an adapter's config, weights and card.

    Args:
        adapter: what to write, in its own dtypes.
        anatomy: of the model that it belongs to.
        folder: new or empty; with `overwrite` it may hold an adapter.
        overwrite: replace it.
        extra_files: further files by name, and their content.

    Raises:
        UserError: PEFT has no form for it, all reasons listed once; or the folder cannot be written.
    """
    raise_problems(folder, list(_problems(adapter, anatomy)))
    config = describe_adapter(adapter, anatomy, str(folder))
    tensors = adapter_tensors(adapter, anatomy)
    shapes = [(name, dtype_name(array.dtype), array.shape) for name, array in tensors.items()]
    with FolderWriter(folder, overwrite=overwrite) as writer:
        writer.shard(new_shard(WEIGHTS_FILE, shapes, FORMAT_METADATA), lambda info: tensors[info.name])
        writer.file(CONFIG_FILE, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
        writer.file("README.md", model_card(adapter.base).encode())
        for name, content in (extra_files or {}).items():
            writer.file(name, content)


def _problems(adapter: Adapter, anatomy: Anatomy) -> Iterator[str]:
    if not adapter.pairs:
        yield "the adapter has no pairs: expected at least one; write a model of changed weights alone as a checkpoint"
    holders = {module.full(name): (module, name) for module, name in anatomy.parameters()}
    with_lengths = {name for name, pair in adapter.pairs.items() if pair.magnitude is not None}
    for name, pair in adapter.pairs.items():
        if name not in holders:
            yield f"tensor {name} is adapted and not part of the model"
            continue
        module, parameter = holders[name]
        shape, (outputs, inputs) = module.parameters[parameter], module.sizes(parameter)
        experts = shape[:-2]
        expected = (*experts, pair.rank, inputs), (*experts, outputs, pair.rank)
        if (pair.a.shape, pair.b.shape) != expected:
            found = f"{list(pair.a.shape)} and {list(pair.b.shape)}"
            yield f"tensor {name} has A and B of {found}, expected {' and '.join(str(list(s)) for s in expected)}"
        if _is_alone(module) and with_lengths:
            yield f"tensor {name} cannot be adapted beside DoRA, of which PEFT has no form for bare parameters"
        elif with_lengths and name not in with_lengths:
            yield f"tensor {name} has no DoRA magnitude, which others have: expected all or none"
    for name, array in adapter.saved.items():
        if name not in holders:
            yield f"tensor {name} is replaced and not part of the model"
        elif array.shape != holders[name][0].parameters[holders[name][1]]:
            yield f"tensor {name} is replaced by one of another shape, {list(array.shape)}"


def describe_adapter(adapter: Adapter, anatomy: Anatomy, where: str) -> dict[str, Any]:
    """The content of adapter_config.json.

    Modules are named by their endings where these name no others, and in full otherwise, so wherever towers may have
    modules of the same endings.

    Raises:
        UserError: PEFT cannot say what the adapter is.
    """
    modules = [m.name for m in _adapted(adapter, anatomy) if not _is_alone(m)]
    alone = [m.full(p) for m in _adapted(adapter, anatomy) if _is_alone(m) for p in m.parameters]
    alone = [name for name in alone if name in adapter.pairs]
    saved = _whole_modules(adapter, anatomy, where)
    rank = Counter(pair.rank for pair in adapter.pairs.values()).most_common(1)[0][0]
    alpha = Counter(_alpha(pair) for pair in adapter.pairs.values() if pair.rank == rank).most_common(1)[0][0]
    keys = {m.full("weight"): m.name for m in anatomy.modules if not _is_alone(m)}
    raw: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base,
        "r": rank,
        "lora_alpha": alpha,
        # Of bare parameters PEFT knows none, and loads no config that asks for it.
        "lora_dropout": 0.0 if alone else adapter.dropout,
        "bias": "none",
        "use_rslora": False,
        "use_dora": any(pair.magnitude is not None for pair in adapter.pairs.values()),
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "rank_pattern": {keys.get(n, n): p.rank for n, p in adapter.pairs.items() if p.rank != rank},
        "alpha_pattern": {keys.get(n, n): _alpha(p) for n, p in adapter.pairs.items() if _alpha(p) != alpha},
        "modules_to_save": saved or None,
        "peft_version": PEFT_VERSION,
    }
    for endings in (True, False) if anatomy.whole else (False,):
        raw["target_modules"] = _endings(modules) if endings else modules
        raw["target_parameters"] = _endings(alone, 3) if endings else alone
        config = parse_adapter_config(raw, where)
        if _says(config, adapter, anatomy, where):
            return raw
    raise UserError(
        f"{where}: adapted and replaced modules overlap in a way that PEFT's patterns cannot tell apart: "
        f"{listed(modules + saved, 8)}"
    )


def _says(config: AdapterConfig, adapter: Adapter, anatomy: Anatomy, where: str) -> bool:
    """Whether PEFT would understand a config as the adapter."""
    try:
        matched = match(config, anatomy, where)
    except UserError:
        return False
    # What is stored of an adapted module, the bias of a head as well, goes with its pair.
    carried = {module.full(name) for module in _adapted(adapter, anatomy) for name in module.parameters}
    whole = adapter.saved.keys() - carried
    ranks = {name: target.rank for name, target in matched.targets.items()}
    return ranks == {name: pair.rank for name, pair in adapter.pairs.items()} and set(matched.saved) == whole


def _alpha(pair: LowRank) -> int | float:
    alpha = pair.scale * pair.rank
    near = round(alpha)
    return near if near / pair.rank == pair.scale else alpha


def _endings(names: Sequence[str], parts: int = 1) -> list[str]:
    """The last so many words of names, each once."""
    return sorted({".".join(name.split(".")[-parts:]) for name in names})


def _is_alone(module: Module) -> bool:
    """Whether its parameters are targeted by their own names; so can routers be, whichever kind they are."""
    return module.kind in ("router", "other")


def _adapted(adapter: Adapter, anatomy: Anatomy) -> list[Module]:
    return [m for m in anatomy.modules if any(m.full(name) in adapter.pairs for name in m.parameters)]


def _whole_modules(adapter: Adapter, anatomy: Anatomy, where: str) -> list[str]:
    """Modules of the replaced parameters.

    Raises:
        UserError: some parameters of a module are replaced and others are not.
    """
    whole = []
    for module in anatomy.modules:
        names = [module.full(name) for name in module.parameters]
        replaced = [name for name in names if name in adapter.saved]
        if not replaced or any(name in adapter.pairs for name in replaced):
            continue
        if replaced != names:
            raise UserError(
                f"{where}: {replaced[0]} is replaced and another parameter of {module.name} is not: expected whole "
                "modules, which is what PEFT stores; train all of it or none"
            )
        whole.append(module.name)
    return whole


def adapter_tensors(adapter: Adapter, anatomy: Anatomy) -> Mapping[str, np.ndarray]:
    """The tensors of adapter_model.safetensors by name. Wrappers nest, the first registered parameter innermost."""
    tensors: dict[str, np.ndarray] = {}
    for module in _adapted(adapter, anatomy):
        names = [module.full(name) for name in module.parameters if module.full(name) in adapter.pairs]
        for depth, name in enumerate(reversed(names)):
            pair, embedding = adapter.pairs[name], module.kind == "embedding"
            a, b = pack(pair.a, pair.b) if pair.a.ndim == 3 else (pair.a, pair.b)
            tensors[factor_key(module.name, depth, "a", embedding=embedding)] = a
            tensors[factor_key(module.name, depth, "b", embedding=embedding)] = b
            if pair.magnitude is not None:
                tensors[factor_key(module.name, depth, "magnitude")] = pair.magnitude
    adapted = {module.name for module in _adapted(adapter, anatomy)}
    for module, parameter in anatomy.parameters():
        name = module.full(parameter)
        if name in adapter.saved:
            key = whole_key(module.name, parameter, adapted=module.name in adapted)
            tensors[key] = adapter.saved[name]
    return tensors
