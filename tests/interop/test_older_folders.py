"""Folders as older transformers wrote them, crafted here; `make older-folders` makes real ones."""

import json

import families
import jax
import numpy as np
import pytest
from helpers import tiny
from safetensors.numpy import load_file

import jaxmoe
from jaxmoe.interop.families import FAMILIES
from jaxmoe.interop.source import config_source
from jaxmoe.model.module import MoEModel
from jaxmoe.parallel.sharding import make_mesh
from jaxmoe.params import named

EXPERTS = ".mlp.experts."


def write(folder, config, tensors, version):
    tiny.write_tensors(folder, tensors)
    (folder / "config.json").write_text(json.dumps(config | {"transformers_version": version}))
    return folder


def random_tensors(config):
    noise = np.random.default_rng(0)
    bindings = config_source(config).bindings.of_tensor
    return {name: noise.standard_normal(part.shape).astype(np.float32) for name, part in bindings.items()}


def cut(tensors):
    """As 5.0 does: turned over, then taken apart as if it had not been."""
    apart = {}
    for name, fused in tensors.items():
        if not name.endswith("experts.gate_up_proj") and not name.endswith("experts.down_proj"):
            apart[name] = fused
            continue
        stem, words = name.removesuffix("gate_up_proj").removesuffix("down_proj"), ["down_proj"]
        parts = [fused.transpose(0, 2, 1)]
        if name.endswith("gate_up_proj"):
            words, parts = ["gate_proj", "up_proj"], np.array_split(parts[0], 2, axis=1)
        for word, part in zip(words, parts, strict=True):
            apart |= {f"{stem}{e}.{word}.weight": np.ascontiguousarray(x) for e, x in enumerate(part)}
    return apart


def leaves(model):
    return {name: np.asarray(value) for name, value in named(model.pure_params())}


class TestQwen3VLOf5_0:
    @pytest.fixture(params=[40, 41])
    def config(self, request):
        return families.config_json("qwen3_vl_moe", text_config={"hidden_size": request.param})

    @pytest.fixture
    def tensors(self, config):
        return random_tensors(config)

    @pytest.fixture
    def folder(self, tmp_path, config, tensors):
        return write(tmp_path / "older", config, cut(tensors), "5.0.0")

    def test_experts_are_put_together(self, tmp_path, config, tensors, folder):
        assert not any(
            name.endswith(EXPERTS + "gate_up_proj") for name in load_file(folder / "model.safetensors")
        )
        mine = leaves(jaxmoe.from_pretrained(folder, dtype="float32"))
        fused = jaxmoe.from_pretrained(write(tmp_path / "fused", config, tensors, "5.24.0"), dtype="float32")
        assert mine.keys() == leaves(fused).keys()
        for name, value in leaves(fused).items():
            np.testing.assert_array_equal(mine[name], value, err_msg=name)

    def test_export_repeats_every_byte(self, tmp_path, folder):
        jaxmoe.save_pretrained(jaxmoe.from_pretrained(folder, dtype="bfloat16"), tmp_path / "export")
        for path in folder.iterdir():
            assert (tmp_path / "export" / path.name).read_bytes() == path.read_bytes(), path.name

    def test_changed_weights_are_cut_alike(self, tmp_path, folder, config, tensors):
        loaded = jaxmoe.from_pretrained(folder, dtype="float32")
        doubled = jax.tree.map(lambda x: 2 * x, loaded.pure_params())
        changed = MoEModel(loaded.spec, doubled, loaded.dtype, source=loaded.source)
        jaxmoe.save_pretrained(changed, tmp_path / "export")
        written = load_file(tmp_path / "export" / "model.safetensors")
        expected = cut({name: 2 * x for name, x in tensors.items()})
        assert written.keys() == expected.keys()
        for name, values in expected.items():
            np.testing.assert_array_equal(written[name], values, err_msg=name)


@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"fsdp": 2, "tensor": 2, "expert": 2}])
def test_shards_of_cut_experts(tmp_path, axes):
    """A device's shard may end within either part of a tensor that was cut."""
    config = families.config_json("qwen3_vl_moe", text_config={"moe_intermediate_size": 16, "num_experts": 8})
    tensors = random_tensors(config)
    folder = write(tmp_path / "older", config, cut(tensors), "5.0.0")
    mine = jaxmoe.from_pretrained(folder, dtype="float32", mesh=make_mesh(**axes))
    whole = leaves(jaxmoe.from_pretrained(folder, dtype="float32"))
    for name, value in leaves(mine).items():
        np.testing.assert_array_equal(value, whole[name], err_msg=name)
    jaxmoe.save_pretrained(mine, tmp_path / "export")
    for path in folder.iterdir():
        assert (tmp_path / "export" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("index", [0, 1])
def test_aria_named_as_in_memory(tmp_path, index):
    """As 5.5 and 5.10 write it: ``model.language_model.…`` and ``lm_head``, the towers under ``model.`` too."""
    config = families.config_json("aria", [{}, *families.case_of("aria").variants][index])
    tensors = random_tensors(config)
    beside = {"model.vision_tower.patch": np.zeros(3), "model.multi_modal_projector.query": np.zeros(2)}
    renamed = {
        name.replace("language_model.lm_head", "lm_head").replace(
            "language_model.model.", "model.language_model."
        ): x
        for name, x in tensors.items()
    }
    folder = write(tmp_path / "older", config, renamed | beside, "5.5.4")
    mine = jaxmoe.from_pretrained(folder, dtype="float32")
    published = jaxmoe.from_pretrained(write(tmp_path / "as-is", config, tensors, "4.57.6"), dtype="float32")
    for (name, value), (_, expected) in zip(leaves(mine).items(), leaves(published).items(), strict=True):
        np.testing.assert_array_equal(value, expected, err_msg=name)


ROTATED = "rotated all 16 features of a head whatever rotary_dim says; read with rotary_dim = 8"
ROTATES = ROTATED.replace("rotated", "rotates", 1)
CLAMPED = "clamped experts at 7.0 whatever swiglu_limit says; read with swiglu_limit = 1.0"
WEIGHTS = "gave the chosen experts the weights of the first ones"
CUT = "cut experts in a way that 5.2 and later take for missing tensors"
PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}


@pytest.mark.parametrize(
    ("family", "fields", "versions", "words"),
    [
        ("minimax_m2", {}, ("5.0.0", "5.0.0.dev0", "5.5.4", "5.17.0"), ROTATED),
        ("minimax_m2", {}, ("4.57.1", "5.18.0", "5.24.0", None, "", 5.0, "main"), None),
        ("minimax_m2", {"rotary_dim": 16}, ("5.5.4",), None),
        ("minimax_m2", {"rope_parameters": PARTIAL}, ("5.5.4",), None),
        ("minimax", {"rotary_dim": 8}, ("4.53.0", "5.24.0"), ROTATES),
        ("minimax", {"rotary_dim": 16}, ("5.24.0",), None),
        ("minimax", {}, ("5.24.0",), None),
        ("gpt_oss", {}, ("4.55.0", "4.57.6", "5.10.4", "5.18.0"), CLAMPED),
        ("gpt_oss", {}, ("5.19.0", "5.24.0"), None),
        ("gpt_oss", {"swiglu_limit": 7.0}, ("4.55.0", "5.10.4"), None),
        ("hunyuan_v1_moe", {}, ("5.0.0", "5.0.0rc1"), WEIGHTS),
        ("hunyuan_v1_moe", {}, ("4.57.6", "5.1.0", "5.5.4"), None),
        ("qwen3_vl_moe", {}, ("5.0.0", "5.1.0"), CUT),
        ("qwen3_vl_moe", {}, ("4.57.6", "5.2.0"), None),
    ],
)
def test_what_is_said_of_the_version(family, fields, versions, words):
    for version in versions:
        raw = families.config_json(family, fields) | {"transformers_version": version}
        FAMILIES[family].spec(raw, "config.json")
        notes = FAMILIES[family].notes(raw)
        assert len(notes) == (words is not None)
        if words is not None:
            assert notes[0].startswith(f"transformers {version}, which wrote this folder, {words}")


def test_it_is_said_on_opening(tmp_path, caplog):
    config = families.config_json("minimax_m2")
    folder = write(tmp_path / "model", config, random_tensors(config), "5.5.4")
    for _ in range(2):
        jaxmoe.from_pretrained(folder)
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert line.startswith(f"{folder}/config.json: transformers 5.5.4, which wrote this folder, {ROTATED}")
    assert "\n" not in line


@pytest.mark.parametrize(
    ("family", "mended"), [("minimax_m2", {"rotary_dim": 16}), ("gpt_oss", {"swiglu_limit": 7.0})]
)
def test_remedy_is_what_that_version_computed(family, mended):
    """It knew no such field: the model is that of a config without it."""
    config = families.config_json(family)
    (field,) = mended
    without = {name: value for name, value in config.items() if name != field}
    assert FAMILIES[family].spec(config | mended, "") == FAMILIES[family].spec(without, "")
    assert FAMILIES[family].spec(config, "") != FAMILIES[family].spec(without, "")


@pytest.mark.torch
def test_tables_are_those_of_the_results():
    from helpers.readme import place_of
    from older_folders import DOCUMENT, ROOT, VERSIONS
    from older_folders.read import from_json
    from older_folders.report import tables

    results = json.loads((ROOT / "benchmarks" / "results" / "older_folders_cpu.json").read_text())
    text = DOCUMENT.read_text(encoding="utf-8")
    start, stop = place_of("older folders", text)
    assert text[start:stop] == tables([from_json(row) for row in results["rows"]], VERSIONS), (
        "run: make older-folders"
    )
