"""Mutated checkpoint folders: each gives one clear line, or what it is loaded as is what other libraries read."""

import importlib.util
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from jaxmoe.errors import UserError
from jaxmoe.params import count

FILE = "model.safetensors"
_MOST_LETTERS = 1500


def tensors_verdict(folder: Path, seed: int) -> str | None:
    """Mutate the one safetensors file of a folder; what is wrong with how it is taken, or None."""
    rng = random.Random(seed)
    content = bytearray((folder / FILE).read_bytes())
    mutated = _mutate_file(content, rng)
    victim = folder.with_name("mutated")
    if not victim.exists():
        shutil.copytree(folder, victim)
    (victim / FILE).write_bytes(mutated)
    return _told(lambda: _compare_tensors(victim))


def _mutate_file(content: bytearray, rng: random.Random) -> bytes:
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    data = bytes(content[8 + length :])
    kind = rng.randrange(6)
    if kind == 0:  # a byte anywhere
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        return bytes(content)
    if kind == 1:  # bytes of the header or its length
        for _ in range(rng.randint(1, 4)):
            content[rng.randrange(8 + length)] = rng.randrange(256)
        return bytes(content)
    if kind == 2:  # cut, or more
        end = rng.randrange(len(content))
        return (
            bytes(content[:end]) if rng.random() < 0.5 else bytes(content) + rng.randbytes(rng.randint(1, 99))
        )
    name = rng.choice([name for name in header if name != "__metadata__"])
    if kind == 3:  # a value of an entry
        field = rng.choice(["dtype", "shape", "data_offsets"])
        header[name][field] = rng.choice(
            [
                None,
                "F16",
                "I64",
                [],
                [1],
                [0, 0],
                [-1, 5],
                [2**62, 3],
                {},
                7,
                [[1]],
                header[name][field][::-1],
            ]
        )
    elif kind == 4:  # an entry gone, renamed or given twice
        entry = header.pop(name)
        if rng.random() < 0.7:
            header[rng.choice([name + "x", "", "lm_head.weight", "model.extra.weight", name.upper()])] = entry
    else:  # two entries change places
        other = rng.choice([other for other in header if other != "__metadata__"])
        header[name]["data_offsets"], header[other]["data_offsets"] = (
            header[other]["data_offsets"],
            header[name]["data_offsets"],
        )
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def _compare_tensors(folder: Path) -> str | None:
    from jaxmoe.interop.source import open_source

    source = open_source(folder)
    files = source.opened[1]
    try:
        expected = load_file(folder / FILE)
    except SafetensorError as error:
        return f"loads what the safetensors library refuses ({error})"
    for name, want in expected.items():
        shape = want.shape
        found = files.read_box(name, shape, [slice(0, size) for size in shape])
        if found.tobytes() != np.ascontiguousarray(want).tobytes():
            return f"{name} is not what the safetensors library reads"
    return None


def config_verdict(folder: Path, seed: int) -> tuple[str | None, bool]:
    """Mutate a config.json; what is wrong with how it is taken, and whether it is taken for another model."""
    from jaxmoe.interop.source import config_source

    rng = random.Random(seed)
    raw = json.loads((folder / "config.json").read_text())
    before = config_source(raw).spec
    mutated = _mutate_config(dict(raw), rng)
    changed: list[bool] = []

    def attempt() -> str | None:
        spec = config_source(mutated).spec
        changed.append(spec != before)
        return _compare_counts(mutated, count(spec.declared)) if changed[0] else None

    return _told(attempt), any(changed)


def _compare_counts(raw: dict[str, Any], found: int) -> str | None:
    """Parameters of transformers' model of the same config, where torch is there to make it of nothing."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch
    import transformers

    try:
        config = transformers.AutoConfig.for_model(**raw)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
    except Exception as error:  # of many types
        if raw.get("head_dim", ...) is None:  # ours is width / heads, as in the families that leave it out
            return None
        return f"taken, where transformers refuses it ({type(error).__name__}: {str(error)[:100]})"
    expected = model.num_parameters()
    return None if found == expected else f"{found} parameters, of transformers' model {expected}"


def _mutate_config(raw: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    odd: list[Any] = [
        *(None, True, False, 0, 1, 2, -1, 3.5, 1e300, -1e-300, 10**6, 2**31, 2**63, 10**30, float("nan")),
        *(
            "",
            "8",
            "nonsense",
            "x" * 1000,
            [],
            [1],
            [None],
            ["full_attention"],
            {},
            {"a": 1},
            {"rope_type": "yarn"},
        ),
        *({"rope_type": "linear", "factor": 0}, {"rope_theta": "1"}, [[1]], "\ud800"),
    ]
    for _ in range(rng.randint(1, 3)):
        name = rng.choice(
            [*raw, "rope_scaling", "rope_parameters", "layer_types", "sliding_window", "head_dim"]
        )
        action = rng.random()
        if action < 0.15:
            raw.pop(name, None)
        elif action < 0.3:
            raw[rng.choice([name + "s", name.upper(), "_" + name])] = raw.get(name)
        elif action < 0.5 and isinstance(raw.get(name), int):
            raw[name] = raw[name] * rng.choice([2, 3, -1]) + rng.choice([0, 1])
        else:
            raw[name] = rng.choice(odd)
    return raw


def _told(attempt: Any) -> str | None:
    try:
        return attempt()
    except UserError as error:
        text = str(error)
        if "\n" in text or len(text) > _MOST_LETTERS:
            return f"a message of {len(text)} letters in {len(text.splitlines())} lines"
        return None
    except Exception as error:  # what the campaign looks for
        return f"{type(error).__name__}: {str(error)[:200]}"
