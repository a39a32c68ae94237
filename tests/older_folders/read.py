"""What today's transformers and jaxmoe make of a folder that `write` made."""

import dataclasses
import functools
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import families
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

import jaxmoe
from jaxmoe.interop.config_json import read_config
from jaxmoe.model import decoder
from jaxmoe.model.batch import Batch
from older_folders.write import LENGTH, ROWS, logits_of, tokens_of


@dataclasses.dataclass(frozen=True)
class Finding:
    """One folder, read. Errors are the largest, over the largest magnitude of what they are compared with.

    Attributes:
        family: its model_type.
        version: of transformers, that wrote it.
        config: which of the family's configs, with "+" where it has fields that the version does not read.
        unread: those fields.
        unmade: why the version could not make such a model.
        refusal: jaxmoe's, where it does not read the folder.
        random: tensors that today's transformers did not find, and drew at random.
        today: error against today's transformers; None where either could not read the folder.
        writer: error against the version that wrote it.
        today_writer: error of today's transformers against the version that wrote it.
        repeated: the export without training repeats every byte.
        notes: what jaxmoe said on opening the folder.
    """

    family: str
    version: str
    config: str
    unread: tuple[str, ...] = ()
    unmade: str | None = None
    refusal: str | None = None
    random: int = 0
    today: float | None = None
    writer: float | None = None
    today_writer: float | None = None
    repeated: bool | None = None
    notes: tuple[str, ...] = ()


def from_json(row: Mapping[str, Any]) -> Finding:
    """A row of the results' JSON, where tuples are lists."""
    return Finding(
        **{name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}
    )


def read(folder: Path, version: str, scratch: Path) -> Finding:
    """One folder of `write`.

    Args:
        folder: named FAMILY-CONFIG.
        version: that wrote it.
        scratch: a folder that is not there yet, for the export.
    """
    family, _, config = folder.name.rpartition("-")
    finding = Finding(family, version, config, tuple(json.loads((folder / "unread.json").read_text())))
    if (refusal := folder / "refusal.txt").exists():
        return dataclasses.replace(finding, unmade=refusal.read_text(encoding="utf-8").strip())
    model = folder / "model"
    written = np.load(folder / "logits.npy")
    theirs, random = _transformers(model, family)
    finding = dataclasses.replace(finding, random=random, today_writer=_error(theirs, written))
    try:
        with _Notes() as notes:
            loaded = jaxmoe.from_pretrained(model, dtype="float32")
    except jaxmoe.UserError as error:
        return dataclasses.replace(
            finding, refusal=str(error).replace(f"{model}/", "").replace(f"{model}: ", "")
        )
    tokens = tokens_of(loaded.spec.vocab_size)
    positions = np.tile(np.arange(LENGTH), (ROWS, 1))
    batch = Batch(*(np.asarray(x, np.int32) for x in (tokens, positions, np.ones_like(tokens))))
    ours = np.asarray(_logits(loaded.pure_params(), batch, spec=loaded.spec))
    jaxmoe.save_pretrained(loaded, scratch)
    return dataclasses.replace(
        finding,
        today=None if random else _error(ours, theirs),
        writer=_error(ours, written),
        repeated=_bytes_of(scratch) == _bytes_of(model),
        notes=tuple(note.replace(f"{model}/", "") for note in notes.lines),
    )


def _transformers(model: Path, family: str) -> tuple[np.ndarray | None, int]:
    """Logits of today's transformers, None where it raises; and how many tensors it did not find."""
    case = families.case_of(family)
    architecture = read_config(model / "config.json").get("architectures", [case.architecture])[0]
    try:
        loaded, info = getattr(transformers, architecture).from_pretrained(
            model,
            attn_implementation="eager",
            experts_implementation="eager",
            dtype=torch.float32,
            output_loading_info=True,
        )
        return logits_of(loaded.eval(), case), len(info["missing_keys"])
    except Exception as error:  # whatever it has to say of an older folder
        logging.getLogger(__name__).warning("transformers on %s: %s", model, error)
        return None, 0


@functools.partial(jax.jit, static_argnames="spec")
def _logits(params: Any, batch: Batch, *, spec: Any) -> jax.Array:
    return decoder.logits(params, spec, decoder.hidden_states(params, spec, batch, dtype=jnp.float32)[0])


def _error(one: np.ndarray | None, other: np.ndarray | None) -> float | None:
    if one is None or other is None:
        return None
    return float(np.abs(one.astype(np.float64) - other).max() / np.abs(other).max())


def _bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class _Notes(logging.Handler):
    """Keeps what jaxmoe logs within a ``with``."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def __enter__(self) -> "_Notes":
        logging.getLogger("jaxmoe").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("jaxmoe").removeHandler(self)
