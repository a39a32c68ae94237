"""What the JSON files of a folder say about how it is quantised."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxmoe.errors import UserError, quote
from jaxmoe.files import read_bytes
from jaxmoe.interop.quantization.awq import AWQ
from jaxmoe.interop.quantization.bitsandbytes import BitsAndBytes
from jaxmoe.interop.quantization.compressed_tensors import CompressedTensors
from jaxmoe.interop.quantization.fp8 import FP8Weights
from jaxmoe.interop.quantization.gptq import GPTQ
from jaxmoe.interop.quantization.modelopt import Modelopt
from jaxmoe.interop.quantization.mxfp4 import MXFP4Experts
from jaxmoe.interop.quantization.stored_form import Format
from jaxmoe.interop.storage.format import loads_strict

FIELD = "quantization_config"
_MODELOPT_FILE = "hf_quant_config.json"
FILES = frozenset({_MODELOPT_FILE, "quantize_config.json", "quant_config.json"})
"""Files that repeat what config.json says, of modelopt, GPTQ and AWQ; they have no place beside unquantised weights."""

_MOST_BYTES = 16 << 20
_MOST_VALUES = 500_000
_FORMATS: Mapping[str, Callable[[Mapping[str, Any], str], Format]] = {
    "fp8": FP8Weights.from_config,
    "mxfp4": MXFP4Experts.from_config,
    "compressed-tensors": CompressedTensors.from_config,
    "modelopt": Modelopt.from_config,
    "awq": AWQ.from_config,
    "gptq": GPTQ.from_config,
    "bitsandbytes": BitsAndBytes.from_config,
}


def split_config(
    raw: Mapping[str, Any], file: str, folder: Path | None = None
) -> tuple[dict[str, Any], Format | None]:
    """A config.json without its ``quantization_config``, and the format that this describes, if any.

    Args:
        raw: the config.json.
        file: what to call it in error messages.
        folder: where it lies, which may describe the format in a file of its own.

    Raises:
        UserError: a method, or a choice of it, that is not supported.
    """
    plain = {name: value for name, value in raw.items() if name != FIELD}
    given, where = raw.get(FIELD), f"{file}: {FIELD}"
    if given is None and folder is not None and (folder / _MODELOPT_FILE).exists():
        given, where = _read(folder / _MODELOPT_FILE), str(folder / _MODELOPT_FILE)
    if given is None:
        return plain, None
    if not isinstance(given, dict):
        raise UserError(f"{where} = {quote(given)}: expected an object with a quant_method")
    method = given.get("quant_method")
    if method is None and (given.get("load_in_4bit") or given.get("load_in_8bit")):
        method = "bitsandbytes"  # the only one when there was no such field
    if method not in list(_FORMATS):
        raise UserError(
            f"{where}.quant_method = {quote(method)} is not supported; supported: {', '.join(_FORMATS)}. "
            "Convert the checkpoint to bfloat16"
        )
    return plain, _FORMATS[method](given, where)


def _read(path: Path) -> Any:
    """A file of modelopt's, as config.json would have it."""
    try:
        given = loads_strict(read_bytes(path, _MOST_BYTES), _MOST_VALUES)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path}: cannot be read: {reason}; download it again") from error
    if not isinstance(given, dict) or "quantization" not in given:
        raise UserError(f"{path} holds {quote(given)}, expected an object with quantization")
    return given | {"quant_method": "modelopt"}
