"""Pairs that begin as a part of the weights: against numpy, against PEFT, and the same bits every time."""

import functools

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import adapters, parity

from jaxmoe.codecs import PACKED, unpack
from jaxmoe.config import AdapterConfig, QuantizationConfig
from jaxmoe.interop.adapting import adapt, base_of, named_pairs
from jaxmoe.interop.decomposing import Decomposed, principal, triangular
from jaxmoe.interop.peft.writing import write_adapter
from jaxmoe.interop.source import open_source
from jaxmoe.model import decoder
from jaxmoe.model.batch import make_batch
from jaxmoe.model.linear import LowRank, dense
from jaxmoe.parallel.sharding import make_mesh
from jaxmoe.params import joined, named, split
from jaxmoe.run.weights import InitialWeights
from jaxmoe.training.state import stored_dtypes

MODULES = {
    "qwen3_moe": ["q_proj", "o_proj", "v_proj"],
    "qwen2_moe": [
        "k_proj",
        "o_proj",
        "shared_expert.gate_proj",
        "shared_expert.up_proj",
        "shared_expert.down_proj",
    ],
}


def random(*shape):
    return np.random.default_rng(shape).standard_normal(shape)


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)])
def test_the_largest_singular_values(shape):
    matrix = random(*shape)
    a, b = principal(matrix, 3, 0.5)
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    np.testing.assert_allclose(0.5 * b @ a, (left[:, :3] * values[:3]) @ right[:3], atol=2e-3)
    lengths = [np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=0)]
    np.testing.assert_allclose(lengths, [np.sqrt(values[:3] / 0.5)] * 2, rtol=1e-3)
    assert (np.take_along_axis(b, np.abs(b).argmax(axis=0)[None], axis=0) > 0).all()


@pytest.mark.parametrize("shape", [(12, 7), (7, 12)])
def test_the_first_part_of_qr(shape):
    matrix = random(*shape)
    a, b = triangular(matrix, 3, 0.5)
    q, r = np.linalg.qr(matrix)
    np.testing.assert_allclose(b, q[:, :3], atol=2e-4)
    np.testing.assert_allclose(a, r[:3], atol=2e-3)
    assert (np.tril(a, -1) == 0).all()


@pytest.mark.parametrize("take", [principal, triangular])
def test_bits_do_not_depend_on_the_order_of_sums(take):
    """What another BLAS would do is another order of the same numbers, here of columns."""
    matrix = random(64, 48)
    a, b = take(matrix, 5, 2.0)
    order = np.concatenate([np.arange(5), 5 + np.random.default_rng(1).permutation(43)])
    again_a, again_b = take(matrix[:, order], 5, 2.0)
    np.testing.assert_array_equal(again_a, a[:, order])
    np.testing.assert_array_equal(again_b, b)
    assert {np.unique(np.frexp(x)[0] * 4096 % 1).tobytes() for x in (a, b)} == {
        np.zeros(1, np.float32).tobytes()
    }


def begin(base, quantization=None, **config):
    """What is adapted, all weights as training begins with them, and the factors."""
    source = open_source(base)
    adapted = adapt(source, AdapterConfig(rank=3, alpha=4, **config), quantization)
    decomposed = Decomposed(adapted.source, adapted, 0) if adapted.decomposes else None
    dtypes = stored_dtypes(adapted.declared, adapted.mask, jnp.float32)
    mesh = make_mesh(devices=jax.devices()[:1])
    weights = InitialWeights(adapted.source, dtypes, mesh, 0, adapted, decomposed).make()
    return adapted, weights, None if decomposed is None else decomposed.factors


@functools.partial(jax.jit, static_argnames="spec")
def logits_of(weights, tokens, *, spec):
    hidden, _ = decoder.hidden_states(weights, spec, make_batch(tokens), dtype=jnp.float32)
    return decoder.logits(weights, spec, hidden)


def torch_logits(model, tokens):
    import torch

    positions = torch.arange(tokens.shape[1]).expand(*tokens.shape)
    return model(input_ids=torch.from_numpy(tokens), position_ids=positions, use_cache=False).logits


def assert_logits(ours, theirs):
    theirs = theirs.detach().numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max(), rtol=0)


def trained(adapted, weights):
    """Weights with other factors."""
    trainable, frozen = split(weights, adapted.mask)
    changed = jax.tree.map(lambda x: x + 0.2 * jnp.asarray(random(*x.shape), jnp.float32), trainable)
    return joined(changed, frozen), jax.tree.map(np.asarray, changed)


@pytest.mark.torch
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_training_begins_as_in_peft(name, init, tmp_path):
    """The same base, the same gradients of A and B, whose rows and columns may have other signs."""
    import torch

    model = families.torch_model(name)
    model.save_pretrained(tmp_path / "base")
    anatomy = adapters.anatomy_of(model)
    adapted, weights, _ = begin(tmp_path / "base", init=init, target_modules=MODULES[name])
    import peft

    settings = {"r": 3, "lora_alpha": 4, "target_modules": MODULES[name], "init_lora_weights": init}
    with adapters.quiet():
        wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    tokens = parity.tokens_of(model.config.vocab_size)
    theirs = torch_logits(wrapped, tokens)
    cotangent = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(3))
    (theirs * cotangent).sum().backward()
    spec = adapted.source.spec
    assert_logits(logits_of(weights, tokens, spec=spec), theirs)

    trainable, frozen = split(weights, adapted.mask)
    loss = lambda trainable: jnp.sum(
        logits_of(joined(trainable, frozen), tokens, spec=spec) * cotangent.numpy()
    )
    grads = adapted.adapter(jax.tree.map(np.asarray, jax.grad(loss)(trainable)), None)
    factors = adapted.adapter(jax.tree.map(np.asarray, trainable), None)
    layers = dict(wrapped.base_model.model.named_modules())
    assert len(factors.pairs) == len(
        anatomy.by_name.keys() & {n.removesuffix(".weight") for n in factors.pairs}
    )
    for key, pair in factors.pairs.items():
        layer = layers[key.removesuffix(".weight")]
        a, b = (getattr(layer, f"lora_{x}")["default"].weight for x in "AB")
        signs = np.sign(np.sum(a.detach().numpy() * pair.a, axis=1))
        for ours, want, turn in (
            (pair.a, a.detach(), signs[:, None]),
            (pair.b, b.detach(), signs[None]),
            (grads.pairs[key].a, a.grad, signs[:, None]),
            (grads.pairs[key].b, b.grad, signs[None]),
        ):
            want = want.numpy() * turn
            np.testing.assert_allclose(ours, want, atol=1e-3 * np.abs(want).max(), rtol=0, err_msg=key)


@pytest.mark.torch
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_peft_loads_what_was_trained_on_the_unchanged_model(name, init, tmp_path):
    model = families.torch_model(name)
    model.save_pretrained(tmp_path / "base")
    adapted, weights, first = begin(tmp_path / "base", init=init, target_modules=MODULES[name])
    tokens = parity.tokens_of(model.config.vocab_size)
    spec = adapted.source.spec
    plain = torch_logits(model, tokens)
    assert_logits(logits_of(weights, tokens, spec=spec), plain)
    changed, host = trained(adapted, weights)
    adapter = adapted.adapter(host, None, first)
    assert {pair.rank for pair in adapter.pairs.values()} == {6}
    write_adapter(adapter, adapted.model.anatomy, tmp_path / "adapter")
    theirs = torch_logits(adapters.load(model, tmp_path / "adapter"), tokens)
    assert_logits(logits_of(changed, tokens, spec=spec), theirs)
    assert float((theirs - plain).detach().abs().max()) > 0.01 * float(plain.detach().abs().max())


@pytest.mark.torch
def test_the_same_bits_again(tmp_path):
    families.torch_model("qwen3_moe").save_pretrained(tmp_path)
    quantization = QuantizationConfig(kind="nf4")
    for config in ({"init": "pissa"}, {"init": "olora"}, {"init": "pissa", "quantization": quantization}):
        one, other = (begin(tmp_path, target_modules=["q_proj", "lm_head"], **config)[1] for _ in range(2))
        for (name, left), (_, right) in zip(named(one), named(other), strict=True):
            np.testing.assert_array_equal(left, right, err_msg=name)


@pytest.mark.torch
def test_quantising_follows(tmp_path):
    """PiSSA's base is quantised after it has lost a part, and LoftQ's factors are of what quantising lost."""
    families.torch_model("qwen3_moe").save_pretrained(tmp_path)
    options = {"target_modules": ["q_proj"]}
    whole = dict(named_pairs(begin(tmp_path, init="pissa", **options)[1]))
    options |= {"quantization": QuantizationConfig(kind="nf4")}
    adapted, plain, _ = begin(tmp_path, init="default", **options)
    pissa, loftq = (
        dict(named_pairs(begin(tmp_path, init=init, **options)[1])) for init in ("pissa", "loftq")
    )
    for name, pair in named_pairs(plain):
        equal(pissa[name].base, adapted.forms[name].quantize(whole[name].base))
        equal(pissa[name].a, whole[name].a)
        equal(loftq[name].base, pair.base)
        lost = np.float64(dense(whole[name], jnp.float32)) - np.float64(unpack(pair.base, jnp.float32))
        for layer, matrix in enumerate(lost):
            left, values, right = np.linalg.svd(matrix, full_matrices=False)
            found = np.float64(loftq[name].b[layer]) @ np.float64(loftq[name].a[layer]) * loftq[name].scale
            np.testing.assert_allclose(found, (left[:, :3] * values[:3]) @ right[:3], atol=1e-3 * values[0])


@pytest.mark.torch
def test_peft_loads_an_adapter_of_loftq_on_the_quantised_model(tmp_path):
    """What is quantised is read from a folder of its values."""
    model = families.torch_model("qwen3_moe")
    model.save_pretrained(tmp_path)
    options = {"quantization": QuantizationConfig(kind="nf4"), "target_modules": ["q_proj", "o_proj"]}
    adapted, weights, _ = begin(tmp_path, init="loftq", **options)
    import torch

    own = model.state_dict()
    flat = dict(named(base_of(jax.tree.map(whole_of, weights, is_leaf=is_weight))))
    with torch.no_grad():
        for name, binding in adapted.model.bindings.items():
            if binding.target in adapted.forms:
                tensor = binding.to_tensor(np.asarray(flat[binding.target])[binding.place])
                own[name].copy_(torch.from_numpy(np.array(tensor)))
    changed, host = trained(adapted, weights)
    write_adapter(adapted.adapter(host, None), adapted.model.anatomy, tmp_path / "adapter")
    tokens = parity.tokens_of(model.config.vocab_size)
    theirs = torch_logits(adapters.load(model, tmp_path / "adapter"), tokens)
    assert_logits(logits_of(changed, tokens, spec=adapted.source.spec), theirs)


def equal(ours, theirs):
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(one, other)


def whole_of(weight):
    """The base of a pair as an array."""
    base = weight.base if isinstance(weight, LowRank) else weight
    return dense(base, jnp.float32)


def is_weight(leaf):
    return isinstance(leaf, (LowRank, *PACKED))
