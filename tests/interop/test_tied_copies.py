"""Tensors of a folder that repeat others."""

import numpy as np
import pytest
from helpers import tiny
from helpers.exports import assert_same_files, changed_names, set_values, stored_bytes

import jaxmoe
from jaxmoe import UserError

FAMILIES = list(tiny.FAMILIES)
FILES = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}


class TestTied:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_without_a_copy(self, folders, family):
        tensors = tiny.write_checkpoint(folders.source, family, "bfloat16", tie_word_embeddings=True)
        assert "lm_head.weight" not in tensors
        model = jaxmoe.from_pretrained(folders.source, dtype="float32")
        assert "lm_head" not in model.params
        jaxmoe.save_pretrained(model, folders.export)
        assert_same_files(folders.source, folders.export)

    def test_equal_copy_is_written_with_the_embedding(self, folders):
        tensors = tiny.write_checkpoint(folders.source, "qwen3_moe", "bfloat16", tie_word_embeddings=True)
        embedding = tensors["model.embed_tokens.weight"]
        tiny.write_tensors(folders.source, tensors | {"lm_head.weight": embedding}, shards=3)
        model = jaxmoe.from_pretrained(folders.source, dtype="float32")
        jaxmoe.save_pretrained(model, folders.export / "untouched")
        assert_same_files(folders.source, folders.export / "untouched")
        set_values(model.params["embed"], np.asarray(model.params["embed"][...]) * 2)
        jaxmoe.save_pretrained(model, folders.export / "changed")
        before, after = stored_bytes(folders.source), stored_bytes(folders.export / "changed")
        assert changed_names(before, after) == {"model.embed_tokens.weight", "lm_head.weight"}
        assert after["lm_head.weight"] == after["model.embed_tokens.weight"]
        assert after["lm_head.weight"][2] == (embedding * 2).astype(embedding.dtype).tobytes()

    @pytest.mark.parametrize(
        ("stored", "copied", "trained"),
        [
            ("bfloat16", "float32", "float32"),
            ("bfloat16", "float16", "bfloat16"),
            ("float16", "float64", "bfloat16"),
            ("float32", "bfloat16", "float32"),
            ("float32", "float16", "bfloat16"),
        ],
    )
    def test_copy_of_another_dtype_keeps_it(self, folders, monkeypatch, stored, copied, trained):
        monkeypatch.setattr("jaxmoe.interop.saving.PIECE_BYTES", 1000)
        monkeypatch.setattr("jaxmoe.interop.source._PIECE_ELEMENTS", 300)
        tensors = tiny.write_checkpoint(folders.source, "qwen3_moe", stored, tie_word_embeddings=True)
        copy = tensors["model.embed_tokens.weight"].astype(tiny.DTYPES[copied])
        tiny.write_tensors(folders.source, tensors | {"lm_head.weight": copy}, shards=3)
        model = jaxmoe.from_pretrained(folders.source, dtype=trained)
        jaxmoe.save_pretrained(model, folders.export / "untouched")
        assert_same_files(folders.source, folders.export / "untouched")
        set_values(model.params["embed"], np.asarray(model.params["embed"][...]) * np.float32(1.1))
        jaxmoe.save_pretrained(model, folders.export / "changed")
        before, after = stored_bytes(folders.source), stored_bytes(folders.export / "changed")
        assert changed_names(before, after) == {"model.embed_tokens.weight", "lm_head.weight"}
        assert after["lm_head.weight"][0] == before["lm_head.weight"][0]
        written = np.frombuffer(after["model.embed_tokens.weight"][2], tiny.DTYPES[stored])
        assert after["lm_head.weight"][2] == written.astype(copy.dtype).tobytes()
        again = jaxmoe.from_pretrained(folders.export / "changed", dtype=trained)
        expected = written.astype(tiny.DTYPES[trained]).reshape(copy.shape)
        np.testing.assert_array_equal(again.params["embed"][...], expected)

    def test_values_that_are_not_finite_are_those_of_the_source_alone(self, folders):
        tensors = tiny.write_checkpoint(folders.source, "qwen3_moe", "bfloat16", shards=1)
        name = "model.layers.1.mlp.gate.weight"
        tensors[name][1, 2] = np.nan
        tensors[name][2, 1] = -np.inf
        tiny.write_tensors(folders.source, tensors, shards=1)
        model = jaxmoe.from_pretrained(folders.source)
        jaxmoe.save_pretrained(model, folders.export / "untouched")
        assert_same_files(folders.source, folders.export / "untouched")
        for value in (np.nan, np.inf):
            values = np.array(model.params["norm"][...])
            values[3] = value
            set_values(model.params["norm"], values)
            with pytest.raises(UserError, match=r"tensor model\.norm\.weight: found nan or infinity"):
                jaxmoe.save_pretrained(model, folders.export / "changed")
            assert not (folders.export / "changed").exists()

    def test_value_that_a_copy_cannot_hold(self, folders):
        tensors = tiny.write_checkpoint(
            folders.source, "mixtral", "bfloat16", shards=1, tie_word_embeddings=True
        )
        head = tensors["model.embed_tokens.weight"].astype(np.float16)
        tiny.write_tensors(folders.source, tensors | {"lm_head.weight": head}, shards=1)
        model = jaxmoe.from_pretrained(folders.source)
        values = np.array(model.params["embed"][...])
        values[3, 2] = 2.0**17
        set_values(model.params["embed"], values)
        with pytest.raises(
            UserError, match=r"tensor lm_head\.weight: value 131072 does not fit its dtype F16"
        ):
            jaxmoe.save_pretrained(model, folders.export)
        assert not folders.export.exists()

    @pytest.mark.parametrize("copied", ["bfloat16", "float32"])
    def test_different_copy_is_refused(self, folders, copied):
        tensors = tiny.write_checkpoint(
            folders.source, "mixtral", "bfloat16", shards=1, tie_word_embeddings=True
        )
        head = tensors["model.embed_tokens.weight"].astype(tiny.DTYPES[copied])
        head[-1, -1] = np.nextafter(head[-1, -1], head.dtype.type(9))
        tiny.write_tensors(folders.source, tensors | {"lm_head.weight": head})
        with pytest.raises(
            UserError, match=r"ties lm_head.weight to model.embed_tokens.weight .* different values"
        ):
            jaxmoe.from_pretrained(folders.source)
