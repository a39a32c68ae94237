"""Several adapters merged at once, and adapters extracted from what a fine-tune changed."""

import dataclasses

import families
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxmoe.cli import main as cli
from jaxmoe.errors import UserError
from jaxmoe.interop.peft.adapter import Adapter, LowRank
from jaxmoe.interop.peft.combining import weighted
from jaxmoe.interop.peft.reading import read_adapter
from jaxmoe.interop.peft.today import today
from jaxmoe.interop.peft.writing import write_adapter
from jaxmoe.interop.source import open_source

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return families.written(tmp_path_factory, "qwen3_moe", "gpt_oss")


def random_adapter(folder, seed, rank):
    """On queries, experts and routers, of ranks 2 and 3."""
    anatomy = today(open_source(folder)).anatomy
    rng = np.random.default_rng(seed)
    pairs = {}
    for module, parameter in anatomy.parameters():
        name = module.full(parameter)
        if not name.endswith(("q_proj.weight", "gate_up_proj", "down_proj", "gate.weight", "router.weight")):
            continue
        outputs, inputs = module.sizes(parameter)
        stack = module.parameters[parameter][:-2]
        a, b = (
            0.3 * rng.standard_normal((*stack, *shape)).astype(np.float32)
            for shape in ((rank, inputs), (outputs, rank))
        )
        pairs[name] = LowRank(name, a, b, 0.5 + seed, transposed=module.stored_transposed(parameter))
    return Adapter(pairs), anatomy


def tensors(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_weighted_adapters_are_merged_at_once(name, folders, tmp_path, capfd):
    for number, rank in ((1, 2), (2, 3)):
        adapter, anatomy = random_adapter(folders[name], number, rank)
        write_adapter(adapter, anatomy, tmp_path / f"adapter{number}")
    base = str(folders[name])
    one, two = (str(tmp_path / f"adapter{number}") for number in (1, 2))
    assert cli(["merge", base, one, str(tmp_path / "both"), "--weight", "0.7", "--add", two, "-0.2"]) == 0
    for number, path in ((1, one), (2, two)):
        assert cli(["merge", base, path, str(tmp_path / f"merged{number}")]) == 0
    before, first, second, both = (
        tensors(folder)
        for folder in (folders[name], tmp_path / "merged1", tmp_path / "merged2", tmp_path / "both")
    )
    for key, value in before.items():
        expected = value + 0.7 * (first[key] - value) - 0.2 * (second[key] - value)
        np.testing.assert_allclose(both[key], expected, atol=1e-5, err_msg=key)
    assert any(np.abs(both[key] - before[key]).max() > 0.1 for key in before)
    assert cli(["merge", base, one, str(tmp_path / "no"), "--add", two, "much"]) == 2
    assert "found 'much', expected a folder and a number" in capfd.readouterr().err


def test_what_cannot_be_added(folders):
    adapter, _ = random_adapter(folders["qwen3_moe"], 1, 2)
    name, pair = next(iter(adapter.pairs.items()))
    lengths = dataclasses.replace(pair, magnitude=np.ones(len(pair.b), np.float32))
    with pytest.raises(UserError, match="DoRA's lengths"):
        weighted([(adapter, 1.0), (Adapter({name: lengths}), 1.0)])
    saved = Adapter({}, {"model.norm.weight": np.ones(3, np.float32)})
    with pytest.raises(UserError, match="is replaced by two adapters"):
        weighted([(saved, 1.0), (saved, 2.0)])


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_an_adapter_is_found_in_the_model_that_it_was_merged_into(name, folders, tmp_path, capfd):
    adapter, anatomy = random_adapter(folders[name], 1, 3)
    write_adapter(adapter, anatomy, tmp_path / "adapter")
    base, tuned = str(folders[name]), str(tmp_path / "tuned")
    assert cli(["merge", base, str(tmp_path / "adapter"), tuned]) == 0
    assert cli(["merge", "--extract", base, tuned, str(tmp_path / "found"), "--rank", "3"]) == 0
    assert cli(["merge", "--extract", base, tuned, str(tmp_path / "less"), "--rank", "2"]) == 0
    out = capfd.readouterr().out
    found, less = (read_adapter(tmp_path / folder, anatomy) for folder in ("found", "less"))
    assert found.pairs.keys() == less.pairs.keys() == adapter.pairs.keys()
    for key, pair in adapter.pairs.items():
        delta = pair.delta()
        np.testing.assert_allclose(
            found.pairs[key].delta(), delta, atol=2e-5 * np.abs(delta).max(), err_msg=key
        )
        left = np.linalg.norm(delta - less.pairs[key].delta()) / np.linalg.norm(delta)
        matrices = delta.reshape(-1, *delta.shape[-2:])
        values = np.linalg.svd(matrices, compute_uv=False)
        assert left == pytest.approx(np.sqrt((values[:, 2:] ** 2).sum() / (values**2).sum()), rel=1e-3)
        assert f"{left:8.2%}  {key}" in (tmp_path / "less" / "errors.txt").read_text()
    assert "rank 2 of" in out


def test_norms_that_changed_are_replaced_as_a_whole(folders, tmp_path, capfd):
    import shutil

    adapter, anatomy = random_adapter(folders["qwen3_moe"], 1, 2)
    write_adapter(adapter, anatomy, tmp_path / "adapter")
    base = str(folders["qwen3_moe"])
    assert cli(["merge", base, str(tmp_path / "adapter"), str(tmp_path / "tuned")]) == 0
    (file,) = (tmp_path / "tuned").glob("*.safetensors")
    changed = load_file(file)
    changed["model.norm.weight"] = changed["model.norm.weight"] + np.float32(0.25)
    save_file(changed, file, metadata={"format": "pt"})
    assert (
        cli(["merge", "--extract", base, str(tmp_path / "tuned"), str(tmp_path / "found"), "--rank", "2"])
        == 0
    )
    assert cli(["merge", base, str(tmp_path / "found"), str(tmp_path / "again")]) == 0
    again = tensors(tmp_path / "again")
    for key, value in changed.items():
        np.testing.assert_allclose(again[key], value, atol=1e-4 * np.abs(value).max(), err_msg=key)
    shutil.copytree(base, tmp_path / "same")
    assert (
        cli(["merge", "--extract", base, str(tmp_path / "same"), str(tmp_path / "none"), "--rank", "2"]) == 2
    )
    assert "expected a model that was trained" in capfd.readouterr().err
    assert cli(["merge", base, str(tmp_path / "same"), str(tmp_path / "none"), "--rank", "2"]) == 2
    assert "expected --extract with a rank" in capfd.readouterr().err


@pytest.mark.once
@pytest.mark.parametrize(
    "options", [["--weight", "2"], ["--add", "a", "1"], ["--quantization"], ["--mtp", "present"]]
)
def test_extracting_merges_nothing(options, capfd):
    assert cli(["merge", "--extract", "base", "tuned", "out", "--rank", "2", *options]) == 2
    assert f"{options[0]}: --extract writes an adapter and merges nothing" in capfd.readouterr().err
