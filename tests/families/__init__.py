"""What the tests know of each model family: one module per family, found by its name.

A module has ``CASE = Case(...)``: a tiny config that forces every branch of the family, variants of it, and the
published sizes. `tests/interop/test_families.py` proves the same things of each.

Choose the tiny config by these rules. Sizes are pairwise distinct; a window, ``index_topk`` or original context is
shorter than the 75 tokens of the tests; every kind of layer occurs; groups, if any, are masked; what is a constant in
published models is random. Weights are drawn at 0.2, and norms, biases and buffers are randomised.
"""

import copy
import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any

from jaxmoe.configs import published as models

BASE: Mapping[str, Any] = {
    "vocab_size": 104,
    "hidden_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
"""Fields of a tiny config that most families share."""

GROUPED: Mapping[str, Any] = {
    "intermediate_size": 56,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.7,
}
"""Those of families whose router chooses among the best groups of experts."""


@dataclasses.dataclass(frozen=True)
class Preset:
    """A published model.

    Attributes:
        fields: of its config that differ from the defaults of transformers' config class; of the text part, if
            the config has several.
        parameters: of trunk and output head, counted once where they are tied; without transformers' buffers.
    """

    fields: Mapping[str, Any]
    parameters: int


def published(name: str) -> Preset:
    """A model whose sizes are in configs/published.json."""
    model = models()[name]
    assert model.parameters is not None
    beside = ("model_type", "architectures")
    return Preset({key: value for key, value in model.config.items() if key not in beside}, model.parameters)


@dataclasses.dataclass(frozen=True)
class Case:
    """One family.

    Attributes:
        config: a tiny config.json, without model_type.
        architecture: transformers' class.
        variants: fields that replace those of `config`, each compared with transformers on its own.
        balance: transformers' model has an auxiliary loss.
        presets: by the name of the published model.
        inputs: changes the keyword arguments of a call of transformers' model, where it wants others than
            input_ids, attention_mask and position_ids (B, T).
        scales: standard deviation of parameters and buffers whose name contains the key, where 0.2 would not
            do; the last match counts.
        weightless: parameters of ours (a part of their names) that cannot change the logits, each with the reason.
        packs: transformers' model tells documents of one row apart by positions that start again. One that does
            not gets every document as a row of its own.
        text: the part of transformers' model that computes logits of text.
        published: from the tensors that transformers writes to those of published folders, where they differ.
        derived: parts of names of buffers that follow from the config, and stay as transformers computes them.
        lost: a part of the names of modules whose adapters PEFT does not find in a folder that it wrote itself.
    """

    config: Mapping[str, Any]
    architecture: str
    variants: tuple[Mapping[str, Any], ...] = ()
    balance: bool = False
    presets: Mapping[str, Preset] = dataclasses.field(default_factory=dict)
    inputs: Callable[[dict[str, Any]], dict[str, Any]] = lambda arguments: arguments
    scales: Mapping[str, float] = dataclasses.field(default_factory=dict)
    weightless: Mapping[str, str] = dataclasses.field(default_factory=dict)
    packs: bool = True
    text: Callable[[Any], Any] = lambda model: model
    published: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    derived: tuple[str, ...] = ()
    lost: str | None = None


def case_of(model_type: str) -> Case:
    """The case of a family. Raises ModuleNotFoundError where it has none."""
    return importlib.import_module(f"families.{model_type}").CASE


def config_json(
    model_type: str, variant: Mapping[str, Any] | None = None, /, **fields: Any
) -> dict[str, Any]:
    """The tiny config.json; configs within that of `variant` replace single fields of those.

    Args:
        model_type: of a family with a case.
        variant: one of its variants, or any fields.
        fields: more of them.
    """
    case = case_of(model_type)
    config = {"model_type": model_type, "architectures": [case.architecture], **case.config}
    # transformers' config classes write into objects that they are given.
    return copy.deepcopy(_replaced(config, {**(variant or {}), **fields}))


def _replaced(config: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    changed = {
        name: _replaced(config[name], value) if name.endswith("_config") else value
        for name, value in fields.items()
    }
    return {**config, **changed}


def _eager(config: Any) -> None:
    config._attn_implementation = config._experts_implementation = "eager"
    for part in config.sub_configs:
        if getattr(config, part) is not None:
            _eager(getattr(config, part))


def torch_model(model_type: str, variant: Mapping[str, Any] | None = None, seed: int = 0) -> Any:
    """transformers' model in eval mode, eager attention and experts, every parameter and buffer random.

    Args:
        model_type: of a family with a case.
        variant: one of its variants.
        seed: of the weights.
    """
    import transformers

    case = case_of(model_type)
    config = transformers.AutoConfig.for_model(**config_json(model_type, variant))
    _eager(config)
    return with_random_weights(getattr(transformers, case.architecture)(config), case, seed)


def written(factory: Any, *model_types: str) -> dict[str, Any]:
    """Folders of these models as transformers writes them, by model_type.

    Args:
        factory: pytest's ``tmp_path_factory``.
        model_types: of families with a case.
    """
    folders = {}
    for name in model_types:
        folders[name] = factory.mktemp(name)
        torch_model(name).save_pretrained(folders[name])
    return folders


def with_random_weights(model: Any, case: Case, seed: int = 0) -> Any:
    """A model of a case in eval mode, every parameter and every buffer that is not derived random."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if any(part in name for part in case.derived):
                continue
            scale = ([0.2] + [value for part, value in case.scales.items() if part in name])[-1]
            noise = scale * torch.randn(tensor.shape, generator=generator)
            about_one = "norm" in name and not name.endswith("bias")
            tensor.copy_(1 + noise if about_one else noise)
    return model.eval()
