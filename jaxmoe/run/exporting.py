"""What a run exports, and where to."""

from pathlib import Path
from typing import Literal

from jaxmoe.config import RunConfig
from jaxmoe.errors import UserError
from jaxmoe.interop.peft.config import CONFIG_FILE
from jaxmoe.run.assemble import Assembled
from jaxmoe.run.folder import RunLayout
from jaxmoe.run.model import export_adapter, export_merged, export_model
from jaxmoe.run.tokenizers import tokenizer_files
from jaxmoe.training.state import TrainState

Export = Literal["model", "adapter", "merged"]


def exports(config: RunConfig, layout: RunLayout) -> dict[Export, Path]:
    """The folders that a run leaves at its end, by what is in them."""
    wanted = config.train.export
    if not wanted:
        return {}
    if config.adapter is None:
        return {"model": layout.export}
    if wanted == "both":
        return {"adapter": layout.export, "merged": layout.merged}
    return {"merged" if wanted == "merged" else "adapter": layout.export}


def holds(what: Export, folder: Path) -> bool:
    """Whether a run's folder of an export holds it already.

    Raises:
        UserError: it holds another kind of export.
    """
    if not folder.exists():
        return False
    if (folder / CONFIG_FILE).exists() != (what == "adapter"):
        found = "a model" if what == "adapter" else "an adapter"
        raise UserError(
            f"{folder}: holds {found}, and train.export now asks for {what}: write it with jaxmoe export to another "
            "folder, or put train.export back"
        )
    return True


def export(
    assembled: Assembled,
    state: TrainState,
    what: Export,
    folder: Path,
    *,
    overwrite: bool = False,
    quantization: str | None = None,
) -> list[str]:
    """Write one of them; returns files of the model's folder that were left out.

    Every process calls it, the first one writes.

    Args:
        assembled: the run.
        state: with its weights.
        what: "model", or of a run with an adapter that one, or the model with it merged in.
        folder: a new folder, or with `overwrite` one that is replaced.
        overwrite: see `folder`.
        quantization: of a "model"; by default what the run's config says.

    Raises:
        UserError: the folder is not empty or holds something else, the disk is full, or a value does not fit the
            tensor's dtype.
    """
    config, adapted = assembled.config, assembled.adapted
    if what == "model" or adapted is None:
        return export_model(
            assembled.source,
            state.params,
            folder,
            dtype=assembled.dtype,
            tokenizer_files=tokenizer_files(config),
            overwrite=overwrite,
            quantization=quantization or config.train.export_quantization,
        )
    # With loftq the base is all of the weights, quantised, and the pair belongs to that as it is.
    lessened = None if adapted.init == "loftq" else assembled.decomposed
    if what == "adapter":
        export_adapter(
            adapted,
            state.trainable,
            folder,
            base=config.model.path,
            dtype=assembled.dtype,
            first=None if lessened is None else lessened.factors,
            overwrite=overwrite,
        )
        return []
    return export_merged(
        adapted,
        state.trainable,
        state.params,
        folder,
        dtype=assembled.dtype,
        tokenizer_files=tokenizer_files(config),
        lessened=lessened,
        overwrite=overwrite,
    )
