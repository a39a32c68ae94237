"""Adapters made by PEFT on tiny models of transformers, and what PEFT says of them."""

import contextlib
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxmoe.interop.peft.anatomy import Anatomy, Kind, Module

_TOWERS = re.compile(
    r"(^|\.)(visual|vision_tower|embed_vision|audio_tower|talker|code2wav|multi_modal_projector)(\.|$)"
)
_ROUTERS = re.compile(
    r"(^|\.)(mlp|block_sparse_moe|feed_forward|mixer)\.(gate|router)$|\.router\.(gate|proj)$|\.gate\.wg$"
)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings that PEFT gives about what the tests are about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def anatomy_of(model: Any) -> Anatomy:
    """A model of torch as PEFT sees it."""
    import torch

    def kind(name: str, module: Any) -> Kind:
        if _ROUTERS.search(name) and getattr(getattr(module, "weight", None), "ndim", 0) == 2:
            return "router"
        if isinstance(module, torch.nn.Linear):
            return "sealed" if _is_sealed(model, name) else "linear"
        if isinstance(module, torch.nn.Conv1d):
            return "convolution"
        return "embedding" if isinstance(module, torch.nn.Embedding) else "other"

    modules = []
    for name, module in model.named_modules():
        own = {key: tuple(value.shape) for key, value in module.named_parameters(recurse=False)}
        if own:
            transposed = getattr(module, "is_transposed", False)
            modules.append(
                Module(name, kind(name, module), own, transposed, aside=bool(_TOWERS.search(name)))
            )
    output = model.get_output_embeddings()
    head = next((name for name, module in model.named_modules() if module is output), None)
    return Anatomy(tuple(modules), head)


def _is_sealed(model: Any, name: str) -> bool:
    """Whether PEFT refuses to adapt a linear layer of a model, or a model has its weight without calling it."""
    import peft
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba

    if name.endswith(".mamba.dt_proj"):
        return True
    try:
        _check_lora_target_modules_mamba(peft.LoraConfig(), model, name.rpartition(".")[2])
    except ValueError:
        return True
    return False


def adapted(model: Any, seed: int = 7, **config: Any) -> Any:
    """The model under an adapter of PEFT, with random factors."""
    import peft
    import torch

    with quiet():
        wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                noise = 0.3 * torch.randn(parameter.shape, generator=generator)
                parameter.copy_(parameter + noise if "magnitude" in name else noise)
    return wrapped.eval()


def targets_of(wrapped: Any) -> dict[str, tuple[int, float]]:
    """What PEFT adapts: rank and scale by the parameter's name."""
    from peft.tuners.lora.layer import LoraLayer

    found = {}
    for name, module in wrapped.base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            parameter = getattr(module, "parameter_name", "weight")
            key = f"{name.replace('.base_layer', '')}.{parameter}"
            found[key] = (module.r["default"], module.scaling["default"])
    return found


def save(wrapped: Any, folder: Path) -> Path:
    """Write the adapter as PEFT does."""
    with quiet():
        wrapped.save_pretrained(folder)
    return folder


def load(model: Any, folder: Path, lost: str | None = None) -> Any:
    """A model under the adapter of a folder, as PEFT loads it; every tensor of the file has to find its place.

    Args:
        model: to adapt.
        folder: with the adapter.
        lost: a part of the names of those that PEFT does not find in what it wrote itself.
    """
    import peft

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        wrapped = peft.PeftModel.from_pretrained(model, folder)
    missing = [str(one.message) for one in told if "missing adapter keys" in str(one.message)]
    assert bool(missing) == (lost is not None)
    assert all(lost is not None and lost in name for told in missing for name in re.findall(r"'(.+?)'", told))
    return wrapped.eval()


def with_random_factors(assembled: Any, seed: int = 5) -> Any:
    """The first weights of a run of ours, but all that is trained drawn anew."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    rng = np.random.default_rng(seed)
    drawn = lambda leaf: jnp.asarray(0.1 * rng.standard_normal(leaf.shape), jnp.float32)
    weights = assembled.initial_weights.make()
    return jax.tree.map(lambda trained, leaf: drawn(leaf) if trained else leaf, assembled.mask, weights)
