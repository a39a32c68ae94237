"""Folders of models that came from none, what an export refuses, and what transformers makes of exports."""

import functools
import json
from pathlib import Path

import families
import jax
import numpy as np
import pytest
from helpers import tiny
from helpers.exports import assert_same_files, changed_names, files_of, mesh_of, set_values, stored_bytes

import jaxmoe
from jaxmoe import UserError
from jaxmoe.interop.pretrained import from_config
from jaxmoe.interop.saving import export_new
from jaxmoe.interop.source import config_source
from jaxmoe.interop.storage.format import INDEX_FILE
from jaxmoe.params import named

FAMILIES = list(tiny.FAMILIES)
FILES = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}


@functools.cache
def new_model(family):
    """Random weights take long to compile, so the tests share them."""
    return from_config(
        families.config_json(family), dtype="bfloat16" if family == "olmoe" else "float32", seed=3
    )


class TestNewModel:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_comes_back_equal(self, folders, family):
        model = new_model(family)
        jaxmoe.save_pretrained(model, folders.export)
        assert files_of(folders.export) == ["config.json", "model.safetensors"]
        assert json.loads((folders.export / "config.json").read_text())["dtype"] == model.dtype.name
        shapes = {name: shape for name, (_, shape, _) in stored_bytes(folders.export).items()}
        assert shapes == dict(tiny.tensor_shapes(families.config_json(family)))
        again = jaxmoe.from_pretrained(folders.export, dtype=model.dtype)
        assert again.spec == model.spec
        jax.tree.map(np.testing.assert_array_equal, again.pure_params(), model.pure_params())

    def test_is_split_into_files(self, folders):
        model = new_model("qwen3_moe")
        export_new(
            model.pure_params(),
            model.source,
            folders.export,
            dtype="bfloat16",
            extra_files={"deep/tokenizer.json": Path(__file__)},
            max_shard_bytes=100_000,
        )
        shards = sorted(folders.export.glob("*.safetensors"))
        assert len(shards) > 2
        assert all(shard.stat().st_size < 100_000 + 10_000 for shard in shards)
        assert (folders.export / "deep/tokenizer.json").read_bytes() == Path(__file__).read_bytes()
        again = jaxmoe.from_pretrained(folders.export, dtype="bfloat16")
        rounded = jax.tree.map(lambda values: values.astype("bfloat16"), model.pure_params())
        jax.tree.map(np.testing.assert_array_equal, again.pure_params(), rounded)

    def test_same_seed_is_the_same_model_on_any_mesh(self):
        config = families.config_json("mixtral")
        model = new_model("mixtral")
        sharded = from_config(config, dtype="float32", seed=3, mesh=mesh_of("mesh"))
        assert len(sharded.params["embed"][...].addressable_shards) == 8
        jax.tree.map(np.testing.assert_array_equal, sharded.pure_params(), model.pure_params())

    @pytest.mark.parametrize("family", FAMILIES)
    def test_weights_have_the_deviation_of_the_config(self, family):
        seen = set()
        for name, values in named(new_model(family).pure_params()):
            values = np.asarray(values, np.float32)
            if "norm" in name:
                np.testing.assert_array_equal(values, 1, err_msg=name)
            else:
                assert abs(np.std(values) / 0.2 - 1) < 5 / np.sqrt(2 * values.size), name
                assert abs(np.mean(values)) < 5 * 0.2 / np.sqrt(values.size), name
                seen.add(values.ravel()[0])
        assert len(seen) > 5  # drawn apart from each other

    def test_source_of_a_new_model_is_its_config(self, folders):
        """A config.json file does as well as its content, and its other fields are written again."""
        path = folders.export.parent / "config.json"
        path.write_text(json.dumps(families.config_json("mixtral") | {"torch_dtype": "float16"}))
        blueprint = config_source(path)
        assert blueprint == config_source(json.loads(path.read_text()))
        model = new_model("mixtral")
        export_new(model.pure_params(), blueprint, folders.export, dtype="float32")
        assert json.loads((folders.export / "config.json").read_text()) == families.config_json("mixtral") | {
            "dtype": "float32"
        }


class TestRefusals:
    def test_value_that_the_file_cannot_hold(self, folders):
        tiny.write_checkpoint(folders.source, "olmoe", "float16")
        model = jaxmoe.from_pretrained(folders.source, dtype="float32")
        values = np.array(model.params["groups"][0][0]["experts"]["down"][...])
        values[4, 10, 3, 2] = -65520.0  # rounds past the largest float16, 65504
        set_values(model.params["groups"][0][0]["experts"]["down"], values)
        name = r"tensor model\.layers\.4\.mlp\.experts\.10\.down_proj\.weight: value -?65520 .* F16"
        with pytest.raises(UserError, match=name):
            jaxmoe.save_pretrained(model, folders.export)
        assert files_of(folders.export.parent) == [f"source/{file}" for file in files_of(folders.source)]

    def test_export_onto_the_source(self, folders):
        tiny.write_checkpoint(folders.source, "olmoe", "float16", shards=1)
        link = folders.export
        link.symlink_to(folders.source)
        model = jaxmoe.from_pretrained(folders.source)
        before = stored_bytes(folders.source)
        for target in (folders.source, link, folders.source / ".." / "source"):
            for overwrite in (False, True):
                with pytest.raises(UserError, match="is the folder that the model was loaded from"):
                    jaxmoe.save_pretrained(model, target, overwrite=overwrite)
        assert stored_bytes(folders.source) == before

    def test_export_onto_a_folder_in_use(self, folders):
        tiny.write_checkpoint(folders.source, "olmoe", "float16", shards=1)
        model = jaxmoe.from_pretrained(folders.source)
        tiny.write_checkpoint(folders.export, "mixtral", shards=2)
        (folders.export / "notes.txt").write_text("mine")
        before = files_of(folders.export)
        with pytest.raises(UserError, match="is not empty"):
            jaxmoe.save_pretrained(model, folders.export)
        assert files_of(folders.export) == before
        jaxmoe.save_pretrained(model, folders.export, overwrite=True)
        assert_same_files(folders.source, folders.export)

    def test_a_folder_that_holds_the_source_is_not_replaced(self, tmp_path):
        tiny.write_checkpoint(tmp_path / "outer", "mixtral", shards=1)
        tiny.write_checkpoint(tmp_path / "outer" / "source", "olmoe", shards=1)
        model = jaxmoe.from_pretrained(tmp_path / "outer" / "source")
        before = files_of(tmp_path / "outer")
        with pytest.raises(UserError, match="outer: holds .*outer/source, which the model was loaded from"):
            jaxmoe.save_pretrained(model, tmp_path / "outer", overwrite=True)
        assert files_of(tmp_path / "outer") == before

    def test_dtype_that_is_none(self, folders):
        tiny.write_checkpoint(folders.source, "olmoe", shards=1)
        for dtype in ("int8", "float64", "fp16"):
            with pytest.raises(
                UserError, match=f"dtype '{dtype}' is not supported: expected one of bfloat16"
            ):
                jaxmoe.from_pretrained(folders.source, dtype=dtype)


@pytest.mark.torch
class TestTorch:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_checkpoint_written_by_transformers(self, folders, family, dtype):
        import torch
        from transformers import AutoModelForCausalLM

        model = families.torch_model(family).to(getattr(torch, dtype))
        model.save_pretrained(folders.source, max_shard_size="150KB")
        assert len(list(folders.source.glob("*.safetensors"))) > 2
        model = jaxmoe.from_pretrained(folders.source, dtype="float32")
        jaxmoe.save_pretrained(model, folders.export / "untouched")
        assert_same_files(folders.source, folders.export / "untouched")

        expected = AutoModelForCausalLM.from_pretrained(folders.source)
        experts = model.params["groups"][-1 if family == "olmoe" else 0][-1]["experts"][
            "gate_up"
        ]  # (L, E, G, F, D)
        layer, repeat = (3, 1) if family == "qwen3_moe" else (4, 4)
        with torch.no_grad():
            fused = expected.model.layers[layer].mlp.experts.gate_up_proj  # (E, 2F, D)
            fused[11, 28:] *= 2
            expected.model.norm.weight += 0.5
        values = np.array(experts[...])
        values[repeat, 11, 1] *= 2
        set_values(experts, values)
        set_values(model.params["norm"], np.asarray(expected.model.norm.weight.float().detach()))
        jaxmoe.save_pretrained(model, folders.export / "changed")
        assert len(changed_names(stored_bytes(folders.source), stored_bytes(folders.export / "changed"))) == 2
        self.assert_loads(folders.export / "changed", dict(expected.named_parameters()))

    @pytest.mark.parametrize("kind", ["another name", "no metadata", "one of several", "below"])
    def test_exports_of_folders_that_it_does_not_load(self, folders, kind):
        import torch

        shards = 1 if kind == "another name" else 2
        tensors = tiny.write_checkpoint(folders.source, "qwen3_moe", shards=shards)
        index = folders.source / INDEX_FILE
        last = f"model-0000{shards}-of-0000{shards}.safetensors"
        if kind == "another name":
            (folders.source / "model.safetensors").rename(folders.source / last)
        elif kind == "no metadata":
            index.write_text(json.dumps({"weight_map": json.loads(index.read_text())["weight_map"]}))
        else:
            place = "model.safetensors" if kind == "one of several" else f"deep/{last}"
            (folders.source / place).parent.mkdir(exist_ok=True)
            (folders.source / last).rename(folders.source / place)
            index.write_text(index.read_text().replace(last, place))
        jaxmoe.save_pretrained(jaxmoe.from_pretrained(folders.source, dtype="float32"), folders.export)
        names = ["model.embed_tokens.weight", "model.layers.3.self_attn.k_proj.weight", "lm_head.weight"]
        self.assert_loads(folders.export, {name: torch.from_numpy(tensors[name]) for name in names})

    @pytest.mark.parametrize("family", FAMILIES)
    def test_new_model_loads_in_transformers(self, folders, family):
        import torch

        model = new_model(family)
        jaxmoe.save_pretrained(model, folders.export)
        embed = torch.from_numpy(np.array(model.params["embed"][...], np.float32)).to(
            getattr(torch, model.dtype.name)
        )
        loaded = self.assert_loads(folders.export, {"model.embed_tokens.weight": embed})
        loaded.save_pretrained(folders.source)
        assert stored_bytes(folders.source) == stored_bytes(folders.export)

    @staticmethod
    def assert_loads(folder, expected):
        """transformers finds every tensor, and those of `expected` have the same values."""
        import torch
        from transformers import AutoModelForCausalLM

        loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), info
        parameters = dict(loaded.named_parameters())
        for name, values in expected.items():
            assert parameters[name].dtype == values.dtype
            assert torch.equal(parameters[name], values), name
        return loaded
