"""Texts that are read in parts and continued, by what is cached; tests/interop/test_decoding.py has every family."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import parity, reading

from jaxmoe.errors import UserError
from jaxmoe.model import sampling
from jaxmoe.model.mixers.rope import Dynamic, LongRope
from jaxmoe.model.sampling import Generator, generate, stream
from jaxmoe.model.spec import group_layers
from jaxmoe.parallel.sharding import make_mesh, shardings

GREEDY = {"temperature": 0.0, "seed": 0}
SAMPLED = {"temperature": 1.0, "seed": 3}


@functools.cache
def model():
    """With windows, sinks and biases, and fewer chosen experts than there are."""
    params, spec = reading.model_of("gpt_oss")
    return types.SimpleNamespace(params=params, spec=spec, text=reading.prompt_of(spec, 150))


def generator(params=None, spec=None):
    return Generator(params or model().params, spec or model().spec, dtype=jnp.float32)


def after(ids, params=None, spec=None):
    """Logits after a text, without a cache."""
    return reading.whole(params or model().params, spec or model().spec, ids)[-1]


@pytest.fixture
def reads(monkeypatch):
    """How many tokens each call of the model reads."""
    counts, extend = [], sampling._extend

    def counting(weights, cache, tokens, start, count, length, **options):
        counts.append(count)
        return extend(weights, cache, tokens, start, count, length, **options)

    monkeypatch.setattr(sampling, "_extend", counting)
    return counts


def test_a_text_in_parts_is_the_text_at_once(reads, monkeypatch):
    """The second part outgrows the cache, the third is read in several calls, the last is one token."""
    text, one = model().text, generator()
    one.feed(text[:30])
    parity.assert_close(one.feed(text[:130]), after(text[:130]), 1e-5, "logits")
    assert reads == [30, 100]
    monkeypatch.setattr(sampling, "_PART", 11)
    one.feed(text[:149])
    assert reads[2:] == [11, 8]
    parity.assert_close(one.feed(text), after(text), 1e-5, "logits")
    assert one.tokens == text


def test_what_texts_have_in_common_is_read_once(reads):
    one, text = generator(), model().text[:60]
    other = [*text[:40], *reading.prompt_of(model().spec, 20, seed=2)]
    first = one.feed(text)
    assert one.feed(text) is first
    parity.assert_close(one.feed(other), after(other), 1e-5, "logits where they part")
    parity.assert_close(one.feed(text[:55]), after(text[:55]), 1e-5, "logits of a beginning")
    one.feed(text[:50])
    assert reads == [60, 20, 15, 1]
    assert one.tokens == text[:50]


def test_a_stream_is_what_is_generated(reads):
    params, spec, prompt = model().params, model().spec, model().text[:20]
    options = {"tokens": 12, "dtype": jnp.float32, **SAMPLED}
    want = generate(params, spec, prompt, **options)
    assert len(want) == 12
    assert reads == [20, *[1] * 11]
    del reads[:]
    tokens = stream(params, spec, prompt, **options)
    assert reads == []
    assert [next(tokens), next(tokens)] == want[:2]
    assert reads == [20, 1]
    assert list(tokens) == want[2:]
    assert generate(params, spec, prompt, **options | {"seed": 4}) != want
    begins = want.index(want[5])
    assert generate(params, spec, prompt, stop=want[5], **options) == want[:begins]
    stops = [want[7], want[5]]
    assert generate(params, spec, prompt, stop=stops, **options) == want[: min(map(want.index, stops))]


def test_a_dialogue(reads):
    """A turn, what the model says to it, and the next turn: of all that only the new is read."""
    one, prompt = generator(), model().text[:20]
    said = list(one.stream(prompt, tokens=9, **GREEDY))
    turn = [*prompt, *said, *model().text[50:60]]
    del reads[:]
    again = list(one.stream(turn, tokens=5, **GREEDY))
    assert reads[0] == 11  # the turn, and the last token that was said
    assert again == generate(model().params, model().spec, turn, tokens=5, dtype=jnp.float32, **GREEDY)


def with_scaling(spec, scaling):
    layers = [
        dataclasses.replace(
            layer,
            mixer=dataclasses.replace(
                layer.mixer, rope=dataclasses.replace(layer.mixer.rope, scaling=scaling)
            ),
        )
        for layer in spec.layers
    ]
    return dataclasses.replace(spec, groups=group_layers(layers))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotations_that_go_by_the_length_of_a_text(kind, reads, monkeypatch):
    """A continuation that outgrows the original context has the rotations of all of it from its first token on."""
    params, spec = reading.model_of("qwen3_moe")
    pairs = spec.layers[0].mixer.head_dim // 2
    long = tuple(1.0 + index / 3 for index in range(pairs))
    scaling = Dynamic(2.0, 40) if kind == "dynamic" else LongRope((1.0,) * pairs, long, 40, 1.25)
    spec = with_scaling(spec, scaling)
    prompt = reading.prompt_of(spec, 33)
    new, logits = reading.greedy(params, spec, prompt, 22, monkeypatch)
    want = reading.whole(params, spec, prompt + new)
    parity.assert_close(logits, want[32:-1], 1e-5, "logits")

    one = generator(params, spec)
    one.feed(prompt)
    one.feed(prompt[:25])
    del reads[:]
    parity.assert_close(one.feed(prompt + new), want[-1], 1e-5, "logits of a text that outgrew it")
    assert reads == [55]
    one.feed([*prompt, *new, 5])
    assert reads[1:] == ([56] if kind == "dynamic" else [1])


def test_memory_that_runs_out_leaves_no_text_behind(reads, monkeypatch):
    one, text = generator(), model().text[:40]
    one.feed(text[:30])
    extend = sampling._extend

    def exhausted(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(sampling, "_extend", exhausted)
    with pytest.raises(
        UserError, match="no memory for a text of 47 tokens, 40 so far and 7 more: ask for fewer"
    ):
        one.feed(text, ahead=7)
    assert one.tokens == []
    monkeypatch.setattr(sampling, "_extend", extend)
    parity.assert_close(one.feed(text), after(text), 1e-5, "logits")
    assert reads == [30, 40]


def test_no_tokens_are_no_text():
    with pytest.raises(ValueError, match="at least one token"):
        generator().feed([])


def test_a_token_reads_the_experts_that_it_chooses():
    """XLA's program for a token has no array of all experts of one layer, cut out of those of all layers."""
    params, spec = model().params, model().spec
    cache = jax.eval_shape(lambda: sampling.decoder.init_cache(spec, 1, 64, jnp.float32))
    options = {"spec": spec, "dtype": jnp.dtype("float32"), "device": None, "capacity": 0}

    def program(tokens):
        lowered = sampling._extend.lower(params, cache, np.zeros((1, tokens), np.int32), 20, 1, 30, **options)
        return lowered.compile().as_text()

    moe = spec.layers[0].ffn
    experts, parts = moe.router.num_experts, moe.activation.parts
    assert moe.router.top_k < experts
    one_layer = [
        f"f32[{experts},{parts},{moe.hidden},{spec.width}]",
        f"f32[1,{experts},{parts},{moe.hidden},{spec.width}]",
        f"f32[{experts},{parts * moe.hidden},{spec.width}]",
    ]
    assert not any(shape in program(1) for shape in one_layer)
    assert any(shape in program(64) for shape in one_layer), "the shapes are not those that XLA has"


def test_a_mesh_changes_nothing():
    """Keys and values of two heads, on four devices that share the heads."""
    params, spec, text = model().params, model().spec, model().text
    want = generate(params, spec, text[:20], tokens=6, dtype=jnp.float32, **GREEDY)
    mesh = make_mesh(expert=2, tensor=4)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings(spec.declared, mesh))
        assert generate(placed, spec, text[:20], tokens=6, dtype=jnp.float32, **GREEDY) == want
