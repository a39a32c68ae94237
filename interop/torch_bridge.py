"""From transformers' torch models in memory. The only module that needs torch (extra ``torch``)."""

import dataclasses
import json
from typing import Any

import ml_dtypes
import numpy as np
import torch
from transformers.core_model_loading import revert_weight_conversion

from jaxmoe.errors import listed
from jaxmoe.interop.loading import ArrayReader, read_params
from jaxmoe.interop.rules import Bindings, bind
from jaxmoe.interop.source import Source, config_source
from jaxmoe.model.module import MoEModel
from jaxmoe.params import Tree


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A torch tensor as an array, bfloat16 included; shares memory where torch does."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def from_torch(model: Any, dtype: Any = "float32") -> MoEModel:
    """The same model in jaxmoe; `jaxmoe.save_pretrained` writes it as a new folder.

    Args:
        model: a transformers model of a supported family.
        dtype: of parameters and computation.

    Raises:
        UserError: its config is not supported.
        KeyError: a tensor is missing.
    """
    source, stored, bindings = _stored(model, model.state_dict())
    params = read_params(ArrayReader(stored), source.spec, bindings, dtype)
    beside = {name: array for name, array in stored.items() if name not in bindings.of_tensor}
    return MoEModel(source.spec, params, dtype, source=dataclasses.replace(source, beside=beside))


def params_from_tensors(model: Any, tensors: dict[str, torch.Tensor], dtype: Any = "float32") -> Tree:
    """Arrange tensors (weights or their gradients) named as in a torch model as a parameter tree.

    Args:
        model: the transformers model.
        tensors: by the names that they have in its ``state_dict``.
        dtype: of the arrays.

    Raises:
        KeyError: a tensor is missing.
    """
    source, stored, bindings = _stored(model, tensors)
    return read_params(ArrayReader(stored), source.spec, bindings, dtype)


def _stored(model: Any, tensors: dict[str, torch.Tensor]) -> tuple[Source, dict[str, np.ndarray], Bindings]:
    """The model, and its tensors as transformers would write them: what it has in memory is laid out as no checkpoint.

    Raises:
        KeyError: a tensor is missing, or is neither the model's nor one that may lie beside it.
    """
    source = config_source(_config_json(model))
    stored = {name: to_numpy(tensor) for name, tensor in revert_weight_conversion(model, tensors).items()}
    shapes = {name: array.shape for name, array in stored.items()}
    beside = source.family.beside(source.raw, source.spec)
    bindings = bind(source.family.rules(source.spec), source.spec, shapes, beside)
    if bindings.missing or bindings.surplus:
        raise KeyError(
            f"tensors missing: {listed(bindings.missing, 8)}; unknown: {listed(bindings.surplus, 8)}"
        )
    return source, stored, bindings


def _config_json(model: Any) -> dict[str, Any]:
    """What transformers would write as config.json."""
    return json.loads(model.config.to_json_string(use_diff=False)) | {"architectures": [type(model).__name__]}
