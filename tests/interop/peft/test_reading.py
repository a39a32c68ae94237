"""Files of adapters by hand: eras of PEFT, experts one by one, and what is refused."""

import json

import ml_dtypes
import numpy as np
import pytest
from huggingface_hub import ModelCard
from safetensors.numpy import load_file, save_file

import jaxmoe
from jaxmoe.interop.peft.adapter import Adapter, LowRank
from jaxmoe.interop.peft.anatomy import Anatomy, Module, Piece
from jaxmoe.interop.peft.reading import read_adapter
from jaxmoe.interop.peft.writing import write_adapter

pytestmark = pytest.mark.once

E, D, F, R, V, Q = 5, 8, 3, 2, 11, 12
MOE, LAYER = "model.layers.0.mlp.", "model.layers.0."
PREFIX = "base_model.model."


def _anatomy(transposed=False, width=D, hidden=F):
    def stored(*shape):
        return (shape[0], shape[2], shape[1]) if transposed else shape

    experts = {"gate_up_proj": stored(E, 2 * hidden, width), "down_proj": stored(E, width, hidden)}
    pieces = {}
    for e in range(E):
        for place, word in enumerate(("gate_proj", "up_proj")):
            rows = range(place * hidden, (place + 1) * hidden)
            pieces[f"{MOE}experts.{e}.{word}"] = Piece(MOE + "experts.gate_up_proj", e, rows)
        pieces[f"{MOE}experts.{e}.down_proj"] = Piece(MOE + "experts.down_proj", e, range(width))
    return Anatomy(
        (
            Module("model.embed_tokens", "embedding", {"weight": (V, width)}),
            Module(LAYER + "self_attn.q_proj", "linear", {"weight": (Q, width), "bias": (Q,)}),
            Module(MOE + "gate", "router", {"weight": (E, width)}),
            Module(MOE + "experts", "other", experts, transposed),
            Module("model.norm", "other", {"weight": (width,)}),
            Module("lm_head", "linear", {"weight": (V, width)}),
        ),
        "lm_head",
        pieces,
    )


def _random(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def _folder(folder, tensors, **config):
    folder.mkdir(exist_ok=True)
    save_file({PREFIX + name: value for name, value in tensors.items()}, folder / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": R, "lora_alpha": 7, "target_modules": [], **config}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


def _packed(experts, first, second, depth=0):
    stem = MOE + "experts" + ".base_layer" * depth
    return {
        f"{stem}.lora_A.weight": _random(experts * R, first, seed=depth),
        f"{stem}.lora_B.weight": _random(second, R * experts, seed=depth),
    }


DOWN = {"target_parameters": ["experts.down_proj"]}

ERAS = {"0.17.0": (), "0.18.1": (), "0.19.0": (True,), "0.19.1": (False,), "0.21.2": (False,)}
"""Of each version, the bases whose two axes it swaps, (E, in, out) or not: A is on the second one of those."""


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("version", ERAS)
def test_experts_of_every_era(tmp_path, version, transposed, square):
    """By PEFT's own formula: the delta of expert e at (first, second), sums over the rank spelt out."""
    hidden = D if square else F
    anatomy = _anatomy(transposed, hidden=hidden)
    first, second = anatomy.by_name[MOE + "experts"].parameters["down_proj"][1:]
    swapped = transposed in ERAS[version]
    tensors = _packed(E, *((second, first) if swapped else (first, second)))
    a, b = tensors[MOE + "experts.lora_A.weight"], tensors[MOE + "experts.lora_B.weight"]
    folder = _folder(tmp_path, tensors, peft_version=version, **DOWN)
    pair = read_adapter(folder, anatomy).pairs[MOE + "experts.down_proj"]
    expected = np.zeros((E, first, second))
    for e in range(E):
        for k in range(R):
            product = np.outer(b[:, k * E + e], a[e * R + k])
            expected[e] += 3.5 * (product if swapped else product.T)
    np.testing.assert_allclose(pair.delta(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("version", [None, "0.19.1.dev0", "0.18.2.dev0@abc", "nightly"])
def test_square_experts_need_a_version(tmp_path, version):
    folder = _folder(tmp_path, _packed(E, D, D), peft_version=version, **DOWN)
    told = r"experts\.down_proj: .*peft_version"
    with pytest.raises(jaxmoe.UserError, match=told):
        read_adapter(folder, _anatomy(hidden=D))
    assert read_adapter(_folder(tmp_path, _packed(E, F, D), peft_version=version, **DOWN), _anatomy()).pairs


def test_shapes_go_before_the_version(tmp_path):
    """An old adapter that a new PEFT saved again."""
    new = read_adapter(_folder(tmp_path, _packed(E, D, F), peft_version="0.21.2", **DOWN), _anatomy())
    old = read_adapter(_folder(tmp_path, _packed(E, D, F), peft_version="0.18.1", **DOWN), _anatomy())
    name = MOE + "experts.down_proj"
    np.testing.assert_array_equal(new.pairs[name].delta(), old.pairs[name].delta())


@pytest.mark.parametrize("swapped", [False, True])
def test_wrappers_nest_in_either_order(tmp_path, swapped):
    """PEFT puts what is registered first innermost; from another writer, shapes tell."""
    shapes = {"gate_up_proj": (D, 2 * F), "down_proj": (F, D)}
    order = ["down_proj", "gate_up_proj"] if swapped else ["gate_up_proj", "down_proj"]
    tensors = _packed(E, *shapes[order[0]], depth=1) | _packed(E, *shapes[order[1]], depth=0)
    both = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    adapter = read_adapter(_folder(tmp_path, tensors, **both), _anatomy())
    for name, depth in zip(order, (1, 0), strict=True):
        key = f"{MOE}experts{'.base_layer' * depth}.lora_A.weight"
        np.testing.assert_array_equal(
            adapter.pairs[f"{MOE}experts.{name}"].a.reshape(E * R, -1), tensors[key], err_msg=name
        )


def _one_by_one(words=("gate_proj", "up_proj", "down_proj"), experts=range(E)):
    sizes = {"gate_proj": (F, D), "up_proj": (F, D), "down_proj": (D, F)}
    tensors = {}
    for e in experts:
        for number, word in enumerate(words):
            outputs, inputs = sizes[word]
            tensors[f"{MOE}experts.{e}.{word}.lora_A.weight"] = _random(R, inputs, seed=10 * e + number)
            tensors[f"{MOE}experts.{e}.{word}.lora_B.weight"] = _random(outputs, R, seed=10 * e + number)
    return tensors


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("words", [("gate_proj", "up_proj", "down_proj"), ("up_proj",)])
def test_experts_one_by_one(tmp_path, words, rslora):
    """Each layer's delta is at its place, with its own scale, also where gate is not adapted and up is."""
    tensors = _one_by_one(words)
    config = {"target_modules": list(words), "use_rslora": rslora, "peft_version": "0.13.2"}
    adapter = read_adapter(_folder(tmp_path, tensors, **config), _anatomy())
    scale = 7 / np.sqrt(R) if rslora else 3.5
    expected = {"gate_up_proj": np.zeros((E, 2 * F, D)), "down_proj": np.zeros((E, D, F))}
    for e in range(E):
        for word in words:
            stem = f"{MOE}experts.{e}.{word}.lora_"
            delta = scale * tensors[stem + "B.weight"] @ tensors[stem + "A.weight"]
            if word == "down_proj":
                expected["down_proj"][e] = delta
            else:
                start = 0 if word == "gate_proj" else F
                expected["gate_up_proj"][e, start : start + F] = delta
    assert len(adapter.pairs) == (2 if len(words) == 3 else 1)
    for name, pair in adapter.pairs.items():
        np.testing.assert_allclose(pair.delta(), expected[name.rpartition(".")[2]], rtol=1e-5, atol=1e-5)
    assert adapter.pairs[MOE + "experts.gate_up_proj"].rank == (2 * R if len(words) == 3 else R)


def test_experts_one_by_one_of_different_ranks_and_scales(tmp_path):
    tensors = _one_by_one()
    wide = f"{MOE}experts.3.up_proj.lora_"
    tensors |= {wide + "A.weight": _random(4, D), wide + "B.weight": _random(F, 4)}
    config = {
        "rank_pattern": {"experts.3.up_proj": 4},
        "target_modules": ["gate_proj", "up_proj", "down_proj"],
    }
    pair = read_adapter(_folder(tmp_path, tensors, **config), _anatomy()).pairs[MOE + "experts.gate_up_proj"]
    expected = 7 / 4 * tensors[wide + "B.weight"] @ tensors[wide + "A.weight"]
    np.testing.assert_allclose(pair.delta()[3, F:], expected, rtol=1e-5, atol=1e-5)
    gate = f"{MOE}experts.3.gate_proj.lora_"
    expected = 3.5 * tensors[gate + "B.weight"] @ tensors[gate + "A.weight"]
    np.testing.assert_allclose(pair.delta()[3, :F], expected, rtol=1e-5, atol=1e-5)


def test_dora_of_experts_one_by_one_has_a_length_per_row(tmp_path):
    tensors = _one_by_one(("gate_proj", "up_proj"))
    for e in range(E):
        for word in ("gate_proj", "up_proj"):
            tensors[f"{MOE}experts.{e}.{word}.lora_magnitude_vector"] = _random(F, seed=e)
    config = {"use_dora": True, "target_modules": ["gate_proj", "up_proj"]}
    adapter = read_adapter(_folder(tmp_path, tensors, **config), _anatomy())
    magnitude = adapter.pairs[MOE + "experts.gate_up_proj"].magnitude
    assert magnitude.shape == (E, 2 * F)
    np.testing.assert_array_equal(magnitude[2, F:], _random(F, seed=2))
    with pytest.raises(jaxmoe.UserError, match="of which PEFT has no form for bare parameters"):
        write_adapter(adapter, _anatomy(), tmp_path / "out")


def test_what_was_renamed_since(tmp_path):
    """A router under its former name, as a pair and as a whole; no layer of a single expert as a whole."""
    anatomy, former, gate = _anatomy(), "model.layers.0.block_sparse_moe.gate", MOE + "gate.weight"
    anatomy.pieces[former] = Piece(gate, None, range(E))
    pair = {former + ".lora_A.weight": _random(R, D), former + ".lora_B.weight": _random(E, R)}
    adapter = read_adapter(_folder(tmp_path, pair, target_modules=["gate"]), anatomy)
    np.testing.assert_array_equal(adapter.pairs[gate].a, _random(R, D))
    assert adapter.pairs[gate].wrapped
    whole = _linear() | {former + ".weight": _random(E, D)}
    adapter = read_adapter(_folder(tmp_path, whole, modules_to_save=["gate"], **ATTENTION), anatomy)
    np.testing.assert_array_equal(adapter.saved[gate], _random(E, D))
    expert = _linear() | {f"{MOE}experts.{e}.down_proj.weight": _random(D, F) for e in range(E)}
    folder = _folder(tmp_path, expert, modules_to_save=["down_proj"], **ATTENTION)
    with pytest.raises(jaxmoe.UserError, match=r"down_proj\.weight, one layer of .*experts\.down_proj"):
        read_adapter(folder, anatomy)


def _linear(rank=R):
    stem = LAYER + "self_attn.q_proj.lora_"
    return {stem + "A.weight": _random(rank, D), stem + "B.weight": _random(Q, rank)}


ATTENTION = {"target_modules": ["q_proj"]}


@pytest.mark.parametrize(
    ("tensors", "config", "told"),
    [
        (
            _linear() | {"model.norm.lora_A.weight": _random(2, 8)},
            ATTENTION,
            r"model\.norm\.lora_A.* belongs to nothing",
        ),
        (_linear() | {"model.norm.weight": _random(D)}, ATTENTION, r"model\.norm\.weight belongs to nothing"),
        (
            _linear(),
            {"target_modules": ["q_proj", "lm_head"]},
            r"lm_head\.lora_A\.weight is missing; .*lora_B\.weight",
        ),
        (_linear(), {**ATTENTION, "modules_to_save": ["norm"]}, r"model\.norm\.weight is missing"),
        (_linear(3), ATTENTION, r"shapes \[3, 8\] and \[12, 3\], expected \[2, 8\] and \[12, 2\] for rank 2"),
        (_linear(), {**ATTENTION, "use_dora": True}, "q_proj.lora_magnitude_vector is missing"),
        (
            _packed(E, F + 1, D),
            DOWN,
            r"expected \[10, 3\] and \[8, 10\] on model\.layers\.0\.mlp\.experts\.down_proj",
        ),
        (_packed(E - 1, F, D), DOWN, r"expected \[10, 3\] and \[8, 10\] for rank 2"),
        (
            _packed(E, F, D) | _packed(E, D, 2 * F, depth=1),
            DOWN,
            r"base_layer\.lora_A\.weight belongs to nothing",
        ),
        (
            _packed(E, D, 2 * F),
            {"target_parameters": ["gate_up_proj", "down_proj"]},
            r"base_layer\.lora_B.* is missing",
        ),
        (
            _one_by_one(experts=range(4)),
            {"target_modules": ["down_proj", "up_proj", "gate_proj"]},
            r"experts\.4\.down",
        ),
        (
            _linear() | {"lm_head.weight": _random(V + 1, D)},
            ATTENTION,
            r"lm_head\.weight has shape \[12, 8\], expected",
        ),
        (
            {name: value.astype(np.int32) for name, value in _linear().items()},
            ATTENTION,
            "dtype I32, expected one of BF16",
        ),
    ],
)
def test_missing_unknown_and_misshapen_tensors(tmp_path, tensors, config, told):
    with pytest.raises(jaxmoe.UserError, match=told) as raised:
        read_adapter(_folder(tmp_path, tensors, **config), _anatomy())
    assert "\n" not in str(raised.value)


def test_pickled_weights_are_refused(tmp_path):
    folder = _folder(tmp_path, _linear(), **ATTENTION)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(
        jaxmoe.UserError, match="found adapter_model.bin, expected adapter_model.safetensors; .*PEFT"
    ):
        read_adapter(folder, _anatomy())
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(jaxmoe.UserError, match="there is none, expected adapter_model.safetensors"):
        read_adapter(folder, _anatomy())


def test_biases_and_keys_without_the_prefix(tmp_path):
    bias = {LAYER + "self_attn.q_proj.base_layer.bias": _random(Q)}
    folder = _folder(tmp_path, _linear() | bias, bias="lora_only", **ATTENTION)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({n.removeprefix(PREFIX): v for n, v in tensors.items()}, folder / "adapter_model.safetensors")
    adapter = read_adapter(folder, _anatomy())
    np.testing.assert_array_equal(adapter.saved[LAYER + "self_attn.q_proj.bias"], _random(Q))
    assert adapter.pairs.keys() == {LAYER + "self_attn.q_proj.weight"}
    with pytest.raises(
        jaxmoe.UserError, match=r"bias is replaced and another parameter .* is not|as a whole"
    ):
        write_adapter(Adapter({}, adapter.saved) if False else adapter, _anatomy(), tmp_path / "out")


def test_a_written_folder_says_what_it_is(tmp_path):
    pair = LowRank("lm_head.weight", _random(R, D).astype(ml_dtypes.bfloat16), _random(V, R), 0.3)
    adapter = Adapter({pair.name: pair}, base="org/base", dropout=0.1)
    write_adapter(adapter, _anatomy(), tmp_path / "out")
    again = read_adapter(tmp_path / "out", _anatomy())
    assert (again.base, again.dropout) == ("org/base", 0.1)
    assert again.pairs["lm_head.weight"].a.dtype == ml_dtypes.bfloat16
    assert again.pairs["lm_head.weight"].scale == pytest.approx(0.3, rel=1e-15)
    card = ModelCard.load(tmp_path / "out" / "README.md").data
    assert (card.base_model, card.library_name, card.pipeline_tag) == ("org/base", "peft", "text-generation")
    assert card.tags == ["base_model:adapter:org/base", "lora", "transformers", "jaxmoe"]
    wrong = Adapter({"no.such": pair, "lm_head.weight": LowRank("lm_head.weight", pair.b, pair.a, 1.0)})
    with pytest.raises(
        jaxmoe.UserError, match=r"2 problems: tensor no\.such is adapted and not part of the model; .*A"
    ):
        write_adapter(wrong, _anatomy(), tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()
