"""Between jaxmoe and transformers' torch models in memory. The only module that needs torch (extra ``torch``)."""

from typing import Any

import ml_dtypes
import numpy as np
import torch

from jaxmoe.interop.checkpoint import ArrayReader, read_params
from jaxmoe.interop.families import family_of
from jaxmoe.interop.rules import bind
from jaxmoe.model.module import MoEModel
from jaxmoe.params import Tree, named


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
    return MoEModel(spec, params_from_tensors(model.config, dict(model.named_parameters()), dtype), dtype)


def params_from_tensors(config: Any, tensors: dict[str, torch.Tensor], dtype: Any = "float32") -> Tree:
    """Arrange tensors (weights or their gradients) named as in a torch model as a parameter tree.

    Args:
        config: the transformers config.
        tensors: by parameter name, in transformers' layout in memory (experts fused).
        dtype: of the arrays.

    Raises:
        KeyError: a tensor is missing.
    """
    raw = config.to_dict()
    family = family_of(raw, "config")
    spec = family.spec(raw, "config")
    bindings = bind(family.rules(spec), spec, tensors, family.ignored)
    if bindings.missing:
        raise KeyError(f"tensors missing: {', '.join(bindings.missing)}")
    reader = ArrayReader({name: to_numpy(tensor) for name, tensor in tensors.items()})
    return read_params(reader, spec, bindings, dtype)


def load_into_torch(model: MoEModel, target: Any) -> None:
    """Write a jaxmoe model's weights into a transformers model of the same architecture, in place.

    Args:
        model: the weights.
        target: a transformers model; its parameters keep their dtype.

    Raises:
        KeyError: the target has parameters that the model does not know.
    """
    raw = target.config.to_dict()
    family = family_of(raw, "config")
    tensors = dict(target.named_parameters())
    bindings = bind(family.rules(model.spec), model.spec, tensors, family.ignored)
    if bindings.missing or bindings.surplus:
        raise KeyError(f"missing {bindings.missing}, surplus {bindings.surplus}")
    params = dict(named(model.pure_params()))
    with torch.no_grad():
        for name, binding in bindings.of_tensor.items():
            values = binding.to_tensor(np.asarray(params[binding.target])[binding.place])
            tensors[name].copy_(torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)))
