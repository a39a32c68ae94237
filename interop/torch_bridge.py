"""From transformers' torch models in memory. The only module that needs torch (extra ``torch``)."""

from typing import Any

import ml_dtypes
import numpy as np
import torch
from transformers.core_model_loading import revert_weight_conversion

from jaxmoe.interop.families import family_of
from jaxmoe.interop.loading import ArrayReader, read_params
from jaxmoe.interop.rules import bind
from jaxmoe.model.module import MoEModel
from jaxmoe.params import Tree


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A torch tensor as an array, bfloat16 included; shares memory where torch does."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def from_torch(model: Any, dtype: Any = "float32") -> MoEModel:
    """The same model in jaxmoe.

    Args:
        model: a transformers model of a supported family.
        dtype: of parameters and computation.
    """
    raw = model.config.to_dict()
    spec = family_of(raw, "config").spec(raw, "config")
    return MoEModel(spec, params_from_tensors(model, model.state_dict(), dtype), dtype)


def params_from_tensors(model: Any, tensors: dict[str, torch.Tensor], dtype: Any = "float32") -> Tree:
    """Arrange tensors (weights or their gradients) named as in a torch model as a parameter tree.

    Args:
        model: the transformers model.
        tensors: by the names that they have in its ``state_dict``.
        dtype: of the arrays.

    Raises:
        KeyError: a tensor is missing.
    """
    raw = model.config.to_dict()
    family = family_of(raw, "config")
    spec = family.spec(raw, "config")
    # As transformers would write them: the layouts of its models in memory are of no checkpoint.
    stored = {name: to_numpy(tensor) for name, tensor in revert_weight_conversion(model, tensors).items()}
    bindings = bind(
        family.rules(spec), spec, {name: array.shape for name, array in stored.items()}, family.ignored
    )
    if bindings.missing:
        raise KeyError(f"tensors missing: {', '.join(bindings.missing)}")
    return read_params(ArrayReader(stored), spec, bindings, dtype)
