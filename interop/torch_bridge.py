"""From transformers' torch models in memory. The only module that needs torch (extra ``torch``)."""

import json
from typing import Any

import ml_dtypes
import numpy as np
import torch
from transformers.core_model_loading import revert_weight_conversion

from jaxmoe.interop.loading import ArrayReader, read_params
from jaxmoe.interop.rules import bind
from jaxmoe.interop.source import config_source
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
    source = config_source(_config_json(model))
    params = params_from_tensors(model, model.state_dict(), dtype)
    return MoEModel(source.spec, params, dtype, source=source)


def params_from_tensors(model: Any, tensors: dict[str, torch.Tensor], dtype: Any = "float32") -> Tree:
    """Arrange tensors (weights or their gradients) named as in a torch model as a parameter tree.

    Args:
        model: the transformers model.
        tensors: by the names that they have in its ``state_dict``.
        dtype: of the arrays.

    Raises:
        KeyError: a tensor is missing.
    """
    source = config_source(_config_json(model))
    # As transformers would write them: the layouts of its models in memory are of no checkpoint.
    stored = {name: to_numpy(tensor) for name, tensor in revert_weight_conversion(model, tensors).items()}
    shapes = {name: array.shape for name, array in stored.items()}
    bindings = bind(source.family.rules(source.spec), source.spec, shapes, source.family.ignored)
    if bindings.missing:
        raise KeyError(f"tensors missing: {', '.join(bindings.missing)}")
    return read_params(ArrayReader(stored), source.spec, bindings, dtype)


def _config_json(model: Any) -> dict[str, Any]:
    """What transformers would write as config.json."""
    return json.loads(model.config.to_json_string(use_diff=False)) | {"architectures": [type(model).__name__]}
