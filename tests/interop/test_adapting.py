"""Adapters in our trees against PEFT on transformers' models: the same logits, and the same gradients of A and B."""

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import adapters, parity
from safetensors.numpy import load_file

from jaxmoe.config import AdapterConfig
from jaxmoe.interop.adapting import adapt
from jaxmoe.interop.families import FAMILIES
from jaxmoe.interop.loading import load_params
from jaxmoe.interop.pairs import named_pairs, with_magnitudes
from jaxmoe.interop.peft.reading import WEIGHTS_FILE, read_adapter
from jaxmoe.interop.peft.today import today
from jaxmoe.interop.peft.writing import adapter_tensors
from jaxmoe.interop.source import config_source, open_source
from jaxmoe.model import decoder
from jaxmoe.model.batch import make_batch
from jaxmoe.model.dropout import Dropout
from jaxmoe.params import joined, split

pytestmark = pytest.mark.torch

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def targets_of(base) -> dict:
    """Everything that PEFT can adapt of a language model: linear layers, routers, experts."""
    source = open_source(base)
    modules = today(source).anatomy.modules
    linear = [m.name for m in modules if m.kind == "linear"]
    bare = [
        m.full(p)
        for m in modules
        if m.kind == "other"
        for p, shape in m.parameters.items()
        if len(shape) == 3
    ]
    routers = [m.full("weight") for m in modules if m.kind == "router"]
    return {"target_modules": linear, "target_parameters": [*bare, *routers]}


def saved_model(name, folder):
    """A model of a family, its folder, and the same under an adapter of PEFT with random factors, with its folder."""
    model = families.torch_model(name)
    anatomy = adapters.anatomy_of(model)
    model.save_pretrained(folder / "base")
    wrapped = adapters.adapted(model, r=3, lora_alpha=2, **targets_of(folder / "base"))
    return folder / "base", wrapped, adapters.save(wrapped, folder / "adapter"), anatomy


def gradients(base, folder, tokens, cotangent, key=None):
    """Logits, and the gradients of the factors as an adapter; with dropout where there is a key."""
    adapted = adapt(open_source(base), AdapterConfig(path=str(folder)))
    weights = adapted.begun(load_params(adapted.source, jnp.float32))
    params = adapted.joined(weights, adapted.given_factors())
    if adapted.dora:
        params = with_magnitudes(params, adapted.given_magnitudes())
    trainable, frozen = split(params, adapted.mask)

    @jax.jit
    def run(trainable, frozen):
        def loss(trainable):
            hidden, _ = decoder.hidden_states(
                joined(trainable, frozen),
                adapted.source.spec,
                make_batch(tokens),
                dtype=jnp.float32,
                key=key,
                dropout=adapted.dropout,
            )
            logits = decoder.logits(joined(trainable, frozen), adapted.source.spec, hidden)
            return jnp.sum(logits * cotangent), logits

        return jax.grad(loss, has_aux=True)(trainable)

    grads, logits = run(trainable, frozen)
    return logits, adapted.adapter(jax.tree.map(np.asarray, grads), None)


# Of qwen3_omni_moe PEFT would adapt the talker too, whose experts have the same endings; its thinker is a family too.
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "qwen3_omni_moe"])
def test_logits_and_gradients_are_those_of_peft(name, tmp_path):
    base, wrapped, folder, anatomy = saved_model(name, tmp_path)
    compare(name, tmp_path, base, wrapped, folder, anatomy)


def compare(name, tmp_path, base, wrapped, folder, anatomy, key=None):
    """PEFT's model and ours of its folder: logits, and gradients of all that is trained."""
    import torch

    config = wrapped.base_model.model.config.get_text_config()
    tokens = parity.tokens_of(config.vocab_size)
    case = families.case_of(name)
    positions = torch.arange(tokens.shape[1]).expand(*tokens.shape)
    arguments = {"input_ids": torch.from_numpy(tokens), "position_ids": positions, "use_cache": False}
    theirs = case.text(wrapped.base_model.model)(**case.inputs(arguments)).logits
    cotangent = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(3))
    (theirs * cotangent).sum().backward()
    logits, ours = gradients(base, folder, tokens, cotangent.numpy(), key)
    scale = float(theirs.detach().abs().max())
    np.testing.assert_allclose(logits, theirs.detach().numpy(), atol=1e-4 * scale, rtol=0)

    with torch.no_grad():
        for parameter_name, parameter in wrapped.named_parameters():
            if "lora_" in parameter_name:
                parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    written = adapters.save(wrapped, tmp_path / "gradients")
    expected = read_adapter(written, anatomy)
    assert adapter_tensors(expected, anatomy).keys() == load_file(written / WEIGHTS_FILE).keys()
    assert ours.pairs.keys() == expected.pairs.keys()
    for key, pair in expected.pairs.items():
        for factor in ("a", "b", *(() if pair.magnitude is None else ("magnitude",))):
            want = getattr(pair, factor)
            np.testing.assert_allclose(
                getattr(ours.pairs[key], factor),
                want,
                atol=1e-3 * np.abs(want).max() + 1e-6,
                rtol=0,
                err_msg=f"{key} {factor}",
            )


def drop_the_same(wrapped, monkeypatch):
    """One mask for PEFT's model and for ours, in place of random ones."""
    import torch

    def mask(width):
        return np.float32((np.arange(width) * 7 % 5 > 1) / 0.6)

    class Masked(torch.nn.Module):
        def forward(self, x):
            return x * torch.from_numpy(mask(x.shape[-1]))

    for module in wrapped.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = Masked()
            if getattr(module, "use_dora", {}).get("default"):
                module.training = True  # or it does without the product of its own that it has with dropout
    monkeypatch.setattr(Dropout, "__call__", lambda _, x: x * mask(x.shape[-1])[None, None])


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen2_moe"])
def test_dropout_is_that_of_peft(name, tmp_path, monkeypatch):
    """Where it acts, on every linear layer: both with the same mask in place of a random one."""
    model = families.torch_model(name)
    anatomy = adapters.anatomy_of(model)
    model.save_pretrained(tmp_path / "base")
    modules = targets_of(tmp_path / "base")["target_modules"]
    modules = [module for module in modules if "attn" in module or "shared" in module]
    wrapped = adapters.adapted(model, r=3, lora_alpha=2, lora_dropout=0.4, target_modules=modules)
    folder = adapters.save(wrapped, tmp_path / "adapter")
    drop_the_same(wrapped, monkeypatch)
    compare(name, tmp_path, tmp_path / "base", wrapped, folder, anatomy, jax.random.key(0))


DORA = {
    "qwen3_moe": ["self_attn", "lm_head"],
    "qwen2_moe": ["self_attn", "shared_expert."],
    "glm4_moe": ["self_attn"],
}


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("name", DORA)
def test_dora_is_that_of_peft(name, dropout, tmp_path, monkeypatch):
    """Logits and gradients, of magnitudes too; with dropout, that of which V is multiplied with."""
    model = families.torch_model(name)
    anatomy = adapters.anatomy_of(model)
    model.save_pretrained(tmp_path / "base")
    modules = targets_of(tmp_path / "base")["target_modules"]
    endings = [ending for ending in DORA[name] if not dropout or ending != "lm_head"]
    modules = [module for module in modules if any(ending in module for ending in endings)]
    settings = {"r": 3, "lora_alpha": 2, "use_dora": True, "lora_dropout": dropout, "target_modules": modules}
    wrapped = adapters.adapted(model, **settings)
    folder = adapters.save(wrapped, tmp_path / "adapter")
    if dropout:
        drop_the_same(wrapped, monkeypatch)
    compare(name, tmp_path, tmp_path / "base", wrapped, folder, anatomy, jax.random.key(0))


def test_rates_of_lora_plus():
    """Every B is faster, but of embeddings, which peft leaves to a rate of their own."""
    config = AdapterConfig(
        rank=3, target_modules=["embed_tokens", "q_proj"], target_parameters=["experts.down_proj"]
    )
    adapted = adapt(config_source(families.config_json("qwen3_moe")), config)
    assert adapted.rates(1.0) is None
    rates = dict(named_pairs(adapted.rates(16.0)))
    assert {name.rpartition(".")[2] for name in rates} == {"embed", "q_proj", "down"}
    for name, pair in rates.items():
        assert (pair.a, pair.b) == (1.0, 1.0 if name == "embed" else 16.0)
    assert set(jax.tree.leaves(adapted.rates(16.0))) == {1.0, 16.0}
