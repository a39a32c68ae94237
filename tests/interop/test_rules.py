"""Conversion rules: they cover every tensor of a model once, and read both ways without loss."""

import dataclasses

import families
import numpy as np
import pytest
from helpers import published, tiny

from jaxmoe import UserError
from jaxmoe.interop.families import FAMILIES
from jaxmoe.interop.rules import Binding, Rule, bind
from jaxmoe.model.spec import LayerGroup
from jaxmoe.params import Param, count, named

pytestmark = pytest.mark.once  # Names, shapes and indices of numpy arrays.

PUBLISHED = list(published.CONFIGS)

# Configs that between them have every kind of layer, bias, norm and head that the rules know.
VARIANTS = {
    "mixtral": families.config_json("mixtral"),
    "mixtral tied": families.config_json("mixtral", tie_word_embeddings=True),
    "qwen3_moe alternating": families.config_json("qwen3_moe"),
    "qwen3_moe biased, irregular": families.config_json(
        "qwen3_moe", attention_bias=True, decoder_sparse_step=1, mlp_only_layers=[0, 3]
    ),
    "olmoe": families.config_json("olmoe"),
    "olmoe biased": families.config_json("olmoe", attention_bias=True),
}


def spec_and_rules(config):
    family = FAMILIES[config["model_type"]]
    spec = family.spec(config, "config.json")
    return spec, family.rules(spec)


def shapes_of(bindings):
    return {name: binding.shape for name, binding in bindings.of_tensor.items()}


def assert_covered(bindings, spec):
    """Every parameter's bindings hold distinct parts of it that add up to the whole."""
    declared = dict(named(spec.declared))
    assert bindings.of_parameter.keys() == declared.keys()
    for name, parts in bindings.of_parameter.items():
        assert len({tuple(sorted(part.index.items())) for part in parts}) == len(parts), name
        assert len({tuple(sorted(part.index)) for part in parts}) == 1, name  # all cut along the same letters
        assert sum(np.prod(part.sizes, dtype=object) for part in parts) == declared[name].size, name


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count(name):
    spec, _ = spec_and_rules(published.CONFIGS[name])
    assert count(spec.declared) == published.PARAMETERS[name]


@pytest.mark.parametrize("layout", ["experts", "fused"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_full_size_model_is_covered(name, layout):
    config = published.CONFIGS[name]
    expected = dict(tiny.tensor_shapes(config, layout))
    spec, rules = spec_and_rules(config)
    bindings = bind(rules, spec, expected)
    assert (bindings.missing, bindings.surplus) == ((), ())
    assert shapes_of(bindings) == expected
    assert_covered(bindings, spec)
    if layout == "experts":  # also the layout that a new model is written in
        assert shapes_of(bind(rules, spec)) == expected


@pytest.mark.torch
@pytest.mark.parametrize("name", PUBLISHED)
def test_full_size_model_of_transformers_is_covered(name):
    """Against the model itself, on the meta device: in memory as it is, on disk as its save_pretrained names it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    config = published.CONFIGS[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    spec, rules = spec_and_rules(config)
    in_memory = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    on_disk = {
        name: tuple(tensor.shape)
        for name, tensor in revert_weight_conversion(model, model.state_dict()).items()
    }
    assert on_disk.keys() != in_memory.keys()
    for expected in (in_memory, on_disk):
        bindings = bind(rules, spec, expected)
        assert (bindings.missing, bindings.surplus) == ((), ())
        assert shapes_of(bindings) == expected
        assert_covered(bindings, spec)
    assert dict(tiny.tensor_shapes(config)) == on_disk
    assert dict(tiny.tensor_shapes(config, "fused")) == in_memory
    assert sum(tensor.numel() for tensor in model.parameters()) == published.PARAMETERS[name]


@pytest.mark.parametrize("layout", ["experts", "fused"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_element_is_covered_once_and_comes_back(variant, layout):
    """Number the elements of every parameter, write all tensors, and read them into place again."""
    config = VARIANTS[variant]
    expected = dict(tiny.tensor_shapes(config, layout))
    spec, rules = spec_and_rules(config)
    bindings = bind(rules, spec, expected)
    assert (bindings.missing, bindings.surplus) == ((), ())
    declared = dict(named(spec.declared))
    written = {}
    for name, parts in bindings.of_parameter.items():
        numbers = np.arange(declared[name].size).reshape(declared[name].shape)
        read, times = np.full_like(numbers, -1), np.zeros_like(numbers)
        for part in parts:
            written[part.source] = part.to_tensor(numbers[part.place])
            read[part.place] = part.to_parameter(written[part.source].reshape(part.sizes))
            times[part.place] += 1
        assert (times == 1).all(), name
        np.testing.assert_array_equal(read, numbers, err_msg=name)
    assert {name: values.shape for name, values in written.items()} == expected


@pytest.mark.torch
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_are_those_of_transformers(variant):
    """The hand-written names and shapes that these tests compare with are transformers' own."""
    from transformers.core_model_loading import revert_weight_conversion

    config = VARIANTS[variant]
    model = families.torch_model(config["model_type"], config)
    in_memory = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    assert dict(tiny.tensor_shapes(config, "fused")) == in_memory
    state = {name: tensor for name, tensor in model.state_dict().items() if name in in_memory}
    on_disk = {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, state).items()}
    assert dict(tiny.tensor_shapes(config)) == on_disk


# The axes of one tensor of a parameter (L, E, G, F, D), the letters that its name fixes, and the same in numpy.
ARRANGEMENTS = [
    (["F", "D"], "LEG", lambda x: x),
    (["D", "F"], "LEG", lambda x: x.T),
    (["E", "GF", "D"], "L", lambda x: x.reshape(5, 2 * 7, 11)),
    (["E", "D", "GF"], "L", lambda x: x.reshape(5, 2 * 7, 11).transpose(0, 2, 1)),
    (["E", "FG", "D"], "L", lambda x: x.transpose(0, 2, 1, 3).reshape(5, 7 * 2, 11)),
    (["EF", "D"], "LG", lambda x: x.reshape(5 * 7, 11)),
    (["DF", "G", "E"], "L", lambda x: x.transpose(3, 2, 1, 0).reshape(11 * 7, 2, 5)),
    (["LEG", "FD"], "", lambda x: x.reshape(3 * 5 * 2, 7 * 11)),
    (["G", "D", "F", "L"], "E", lambda x: x.transpose(1, 3, 2, 0)),
]


@pytest.mark.parametrize(("axes", "fixed", "arrange"), ARRANGEMENTS)
def test_arrangement_inverts(axes, fixed, arrange):
    sizes = {"L": 3, "E": 5, "G": 2, "F": 7, "D": 11}
    groups = tuple(map(tuple, axes))
    index = {letter: sizes[letter] - 1 for letter in fixed}
    binding = Binding(
        "tensor", "parameter", Param("LEGFD", (3, 5, 2, 7, 11), "normal", "matrix"), index, groups
    )
    parameter = np.random.default_rng(0).standard_normal((3, 5, 2, 7, 11))
    part = parameter[binding.place]
    tensor = binding.to_tensor(part)
    np.testing.assert_array_equal(tensor, arrange(part))
    assert tensor.shape == binding.shape
    np.testing.assert_array_equal(binding.to_parameter(tensor.reshape(binding.sizes)), part)


class TestLayouts:
    """One parameter, several layouts: the one that the checkpoint has, layer by layer."""

    def test_transposed_layout_through_bind(self):
        spec, rules = spec_and_rules(families.config_json("olmoe"))
        name = "model.layers.{L}.moe.{E}.wi"
        rules = tuple(rule for rule in rules if not rule.target.endswith("gate_up"))
        rules += (Rule("layers.{L}.experts.gate_up", name, "D (G F)"),)
        bindings = bind(rules, spec)
        binding = bindings.of_tensor["model.layers.3.moe.11.wi"]
        assert (binding.index, binding.shape) == ({"L": 3, "E": 11}, (40, 2 * 28))
        part = np.arange(2 * 28 * 40).reshape(2, 28, 40)
        np.testing.assert_array_equal(binding.to_tensor(part), np.concatenate([part[0], part[1]]).T)

    def test_layers_may_differ(self):
        config = families.config_json("mixtral")
        by_layer = [
            dict(tiny.tensor_shapes(config, "fused" if layer % 2 else "experts")) for layer in range(5)
        ]
        expected = {
            name: shape
            for layer, names in enumerate(by_layer)
            for name, shape in names.items()
            if f"layers.{layer}." in name or "layers" not in name
        }
        spec, rules = spec_and_rules(config)
        bindings = bind(rules, spec, expected)
        assert (bindings.missing, bindings.surplus) == ((), ())
        assert shapes_of(bindings) == expected

    def test_missing_and_surplus(self):
        config = families.config_json("mixtral")
        names = dict(tiny.tensor_shapes(config))
        lost = ["model.layers.1.block_sparse_moe.experts.10.w3.weight", "model.norm.weight"]
        found = ["model.layers.5.input_layernorm.weight", "model.layers.0.self_attn.q_norm.weight"]
        spec, rules = spec_and_rules(config)
        present = {name: shape for name, shape in names.items() if name not in lost}
        present |= dict.fromkeys([*found, "vision.patch.weight"], (40,))
        bindings = bind(rules, spec, present, ignored=(r"^vision\.",))
        assert sorted(bindings.missing) == lost
        assert bindings.surplus == tuple(sorted(found))

    def test_copies_only_where_they_are(self):
        config = families.config_json("mixtral", tie_word_embeddings=True)
        names = dict(tiny.tensor_shapes(config))
        spec, rules = spec_and_rules(config)
        assert bind(rules, spec, names).copies == {}
        bindings = bind(rules, spec, names | {"lm_head.weight": (104, 40)})
        assert bindings.copies == {"lm_head.weight": "model.embed_tokens.weight"}
        assert [part.source for part in bindings.of_parameter["embed"]] == ["model.embed_tokens.weight"]
        assert bindings.of_tensor["lm_head.weight"].target == "embed"


SPECULATIVE = [name for name in FAMILIES if FAMILIES[name].speculative]


class TestBeside:
    """Tensors that are not the model's and may lie beside it."""

    @staticmethod
    def surplus(name, found, **fields):
        """Those of the tensors `found` that are refused; {L} in their names is the number of layers."""
        config = families.config_json(name)
        text = config
        for part in FAMILIES[name].text:
            text = text[part]
        text.update(fields)
        spec, rules = spec_and_rules(config)
        shapes = shapes_of(bind(rules, spec))
        depth = len(spec.layers)
        found = [tensor.replace("{L}", str(depth)).replace("{L+1}", str(depth + 1)) for tensor in found]
        bindings = bind(rules, spec, shapes | dict.fromkeys(found, (8,)), FAMILIES[name].beside(config, spec))
        assert bindings.missing == ()
        return {
            tensor.replace(f".{depth}.", ".{L}.").replace(f".{depth + 1}.", ".{L+1}.")
            for tensor in bindings.surplus
        }

    @pytest.mark.parametrize("name", FAMILIES)
    def test_frequencies_of_the_rotation(self, name):
        trunks = [prefix.trunk for prefix in FAMILIES[name].prefixes]
        buffers = [
            f"{trunk}{place}rotary_emb.inv_freq"
            for trunk in trunks
            for place in ("", "layers.0.self_attn.", "layers.1.self_attn.")
        ]
        others = {
            f"{trunk}{rest}"
            for trunk in trunks
            for rest in (
                "rotary_emb.inv_freq.weight",
                "rotary_emb.something_else",
                "layers.0.self_attn.inv_freq",
                "layers.0.self_attn.my_rotary_emb.inv_freq",
                "layers.0.self_attn.rotary_emb.weight",
            )
        }
        assert self.surplus(name, [*buffers, *others]) == others

    def test_families_with_further_layers(self):
        assert set(SPECULATIVE) == {
            "axk1",
            "axk2",
            "bailing_hybrid",
            "deepseek_v3",
            "deepseek_v32",
            "glm4_moe",
            "glm4_moe_lite",
            "glm4v_moe",
            "glm_moe_dsa",
            "hy_v3",
            "minimax_m2",
        }

    @pytest.mark.parametrize("depth", [3, 5])
    @pytest.mark.parametrize(("count", "first"), [(0, 0), (None, 1), (1, 1), (2, 2)])
    @pytest.mark.parametrize("name", SPECULATIVE)
    def test_further_layers(self, name, depth, count, first):
        """They begin where config.json says that the model ends, and are as many as it says."""
        family = FAMILIES[name]
        fields = {"num_hidden_layers": depth} | ({} if count is None else {family.speculative[0]: count})
        layers = [f"{family.prefixes[0].trunk}layers.{{{n}}}.eh_proj.weight" for n in ("L", "L+1")]
        within = f"{family.prefixes[0].trunk}layers.1.eh_proj.weight"
        assert self.surplus(name, [*layers, within], **fields) == {within, *layers[first:]}

    @pytest.mark.parametrize("count", [-1, 10**9, "1", 1.5, True])
    @pytest.mark.parametrize("name", SPECULATIVE)
    def test_malformed_number_of_further_layers(self, name, count):
        with pytest.raises(UserError, match=r"_layers|num_mtp_modules"):
            self.surplus(name, [], **{FAMILIES[name].speculative[0]: count})


class TestMistakes:
    """A family's mistakes are found when its rules are bound, whatever the checkpoint."""

    @pytest.fixture
    def spec_and_rules(self):
        return spec_and_rules(families.config_json("mixtral"))

    @staticmethod
    def replaced(rules, target, **changes):
        return tuple(
            dataclasses.replace(rule, **changes) if rule.target == target else rule for rule in rules
        )

    @pytest.mark.parametrize("axes", ["V D X", "V", "V X", "V V D", "D (V D)", ""])
    def test_letters(self, spec_and_rules, axes):
        spec, rules = spec_and_rules
        with pytest.raises(ValueError, match=r"gives letters .* for embed, declared as VD"):
            bind(self.replaced(rules, "embed", axes=axes), spec)

    def test_letters_of_the_name(self, spec_and_rules):
        spec, rules = spec_and_rules
        broken = self.replaced(rules, "norm", source="model.layers.{L}.norm.weight")
        with pytest.raises(ValueError, match=r"gives letters .* for norm, declared as D"):
            bind(broken, spec)

    def test_parameter_without_rule(self, spec_and_rules):
        spec, rules = spec_and_rules
        broken = tuple(rule for rule in rules if rule.target != "layers.{L}.experts.down")
        with pytest.raises(ValueError, match=r"no rule for parameter groups\.0\.0\.experts\.down"):
            bind(broken, spec)

    def test_two_parameters_of_one_tensor(self, spec_and_rules):
        spec, rules = spec_and_rules
        broken = self.replaced(rules, "lm_head", source="model.embed_tokens.weight")
        with pytest.raises(
            ValueError, match=r"model\.embed_tokens\.weight is taken by both embed and lm_head"
        ):
            bind(broken, spec)

    def test_layers_of_one_tensor(self, spec_and_rules):
        """A rule whose name lacks the layer must say so in its axes, else all layers would share a tensor."""
        spec, rules = spec_and_rules
        broken = self.replaced(rules, "layers.{L}.ffn_norm", source="model.shared_norm.weight")
        with pytest.raises(ValueError, match=r"gives letters .*ffn_norm, declared as LD"):
            bind(broken, spec)

    @pytest.mark.parametrize("words", ["w1", "w1|w2|w3"])
    def test_words_not_as_many_as_the_letter(self, spec_and_rules, words):
        spec, rules = spec_and_rules
        name = f"model.layers.{{L}}.block_sparse_moe.experts.{{E}}.{{G:{words}}}.weight"
        broken = tuple(rule for rule in rules if not rule.target.endswith("gate_up"))
        with pytest.raises(ValueError, match=r"words for G=2 of groups\.0\.0\.experts\.gate_up"):
            bind((*broken, Rule("layers.{L}.experts.gate_up", name, "F D")), spec)


def test_layers_keep_their_numbers_across_groups():
    """A pattern of two, thrice, after one layer: place and repeat of each layer in the stacked parameters."""
    spec, rules = spec_and_rules(families.config_json("qwen3_moe", num_hidden_layers=7))
    dense, sparse = spec.layers[:2]
    spec = dataclasses.replace(spec, groups=(LayerGroup((dense,), 1), LayerGroup((sparse, dense), 3)))
    bindings = bind(rules, spec)
    found = {
        layer: (binding.target.rpartition(".attention_norm")[0], binding.index["L"])
        for layer in range(7)
        for binding in [bindings.of_tensor[f"model.layers.{layer}.input_layernorm.weight"]]
    }
    pattern = {
        1 + 2 * repeat + place: (f"groups.1.{place}", repeat) for repeat in range(3) for place in range(2)
    }
    assert found == {0: ("groups.0.0", 0)} | pattern
