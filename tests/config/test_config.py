import copy
import os
from importlib import resources
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from jaxmoe.cli import main as cli
from jaxmoe.config import OptimizerConfig, RunConfig, load_config, recorded_config
from jaxmoe.config.reference import reference_yaml
from jaxmoe.errors import UserError
from jaxmoe.optim import schedule

SMALLEST = {
    "model": {"path": "a-model"},
    "data": {"path": "train.jsonl", "sequence_length": 128},
    "optimizer": {"learning_rate": 1e-4},
    "train": {"steps": 10, "batch_size": 8},
    "output_dir": "runs/x",
}


def run(**changes):
    """The smallest run with ``section__key`` set; a value of ... removes the key."""
    mapping = copy.deepcopy(SMALLEST)
    for dotted, value in changes.items():
        *sections, key = dotted.split("__")
        here = mapping
        for section in sections:
            here = here.setdefault(section, {})
        if value is ...:
            del here[key]
        else:
            here[key] = value
    return RunConfig.from_mapping(mapping)


def message(**changes):
    with pytest.raises(UserError) as caught:
        run(**changes)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix("configuration: ")


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_defaults():
    config = run()
    assert config.model.dtype == "bfloat16"
    assert config.model.remat is True
    assert config.optimizer.name == "adamw"
    assert config.optimizer.betas == (0.9, 0.95)
    assert config.mesh.batch_shards == 1
    assert config.train.rows == 8
    assert config.train.accumulation == 1
    assert config.sample is None
    assert run(train__micro_batch_size=2).train.accumulation == 4


def test_yaml_reads_back_to_an_equal_run(tmp_path):
    config = run(
        model={"config": {"hidden_size": 32, "rope": {"theta": 1e4}}},
        data__tokenizer={"train_bpe": 300},
        data__exclude=["*.md", "ü/*"],
        optimizer__eps=1e-12,
        sample={"prompt": "Once: upon\na time"},
    )
    assert load_config(write(tmp_path, config.to_yaml())) == config
    assert yaml.safe_load(config.to_yaml())["train"]["micro_batch_size"] is None


def test_a_number_in_the_notation_that_yaml_reads_as_a_string(tmp_path):
    text = yaml.safe_dump(SMALLEST).replace(
        "learning_rate: 0.0001", "learning_rate: 2e-5\n  betas: [9e-1, .5]"
    )
    config = load_config(write(tmp_path, text))
    assert config.optimizer.learning_rate == 2e-5
    assert config.optimizer.betas == (0.9, 0.5)
    inline = run(model={"config": {"rms_norm_eps": "1e-6", "layers": [{"eps": "2E+3"}], "name": "e-6"}})
    assert inline.model.config == {"rms_norm_eps": 1e-6, "layers": [{"eps": 2e3}], "name": "e-6"}
    assert message(optimizer__learning_rate="0.1").startswith(
        "optimizer.learning_rate: found the string '0.1'"
    )


def test_sections_are_frozen_and_can_be_made_in_python():
    config = OptimizerConfig(learning_rate=0.1)
    with pytest.raises(ValidationError, match="frozen"):
        config.learning_rate = 0.2


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        ({"train__stepz": 1}, "train.stepz: unknown key, did you mean train.steps?"),
        (
            {"train__learning_rate": 1},
            "train.learning_rate: unknown key, did you mean optimizer.learning_rate?",
        ),
        ({"learning_rate": 1}, "learning_rate: unknown key, did you mean optimizer.learning_rate?"),
        ({"optimizr": {}}, "optimizr: unknown key, did you mean optimizer?"),
        ({"balance__bias_update": 0.1}, "balance.bias_update: unknown key, expected one of aux_loss, z_loss"),
        ({"sample": {"promt": "x", "prompt": "y"}}, "sample.promt: unknown key, did you mean sample.prompt?"),
        (
            {"data__tokenizer": {"train_bp": 9, "train_bpe": 9}},
            "data.tokenizer.train_bp: unknown key, did you mean data.tokenizer.train_bpe?",
        ),
        ({"train__steps": ...}, "train.steps: missing, expected a value"),
        ({"output_dir": ...}, "output_dir: missing, expected a value"),
        ({"train__steps": "8"}, "train.steps: found the string '8', expected an integer"),
        ({"train__steps": 1.5}, "train.steps: found 1.5, expected an integer"),
        ({"train__steps": 8.0}, "train.steps: found 8.0, expected an integer"),
        ({"train__steps": True}, "train.steps: found true, expected an integer"),
        ({"train__steps": None}, "train.steps: found null, expected an integer"),
        ({"train__steps": 0}, "train.steps: found 0, expected at least 1"),
        ({"train__seed": -1}, "train.seed: found -1, expected at least 0"),
        (
            {"train__export": "yes"},
            "train.export: found the string 'yes', expected 'adapter', 'merged' or 'both'",
        ),
        ({"train__export": 1}, "train.export: found 1, expected true or false"),
        ({"train": 3}, "train: found 3, expected a mapping of keys"),
        ({"balance": None}, "balance: found null, expected a mapping of keys"),
        ({"optimizer__learning_rate": 0}, "optimizer.learning_rate: found 0, expected a number above 0"),
        (
            {"optimizer__learning_rate": float("nan")},
            "optimizer.learning_rate: found nan, expected a finite number",
        ),
        ({"optimizer__weight_decay": -0.1}, "optimizer.weight_decay: found -0.1, expected at least 0"),
        ({"optimizer__weight_decay": True}, "optimizer.weight_decay: found true, expected a number"),
        ({"optimizer__name": "sgd"}, "optimizer.name: found the string 'sgd', expected 'adamw' or 'muon'"),
        ({"optimizer__betas": 0.9}, "optimizer.betas: found 0.9, expected a list"),
        ({"optimizer__betas": [0.9, 1.0]}, "optimizer.betas.1: found 1.0, expected a number below 1"),
        ({"optimizer__betas": [0.9]}, "optimizer.betas.1: missing, expected a value"),
        ({"optimizer__final_fraction": 1.1}, "optimizer.final_fraction: found 1.1, expected at most 1"),
        ({"data__eval_fraction": 0.6}, "data.eval_fraction: found 0.6, expected at most 0.5"),
        ({"data__sequence_length": 1}, "data.sequence_length: found 1, expected at least 2"),
        ({"data__include": "*.txt"}, "data.include: found the string '*.txt', expected a list"),
        ({"data__exclude": ["a", 3]}, "data.exclude.1: found 3, expected a string"),
        ({"data__path": " "}, "data.path: expected a non-empty string"),
        ({"data__tokenizer": 3}, "data.tokenizer: found 3, expected a string or a mapping"),
        (
            {"data__tokenizer": {"train_bpe": "x"}},
            "data.tokenizer.train_bpe: found the string 'x', expected an integer",
        ),
        (
            {"data__eval_path": "e", "data__eval_fraction": 0.1},
            "data: found both `eval_path` and `eval_fraction` 0.1, expected at most one",
        ),
        (
            {"model__config": {}},
            "model: found both of `path` and `config`, expected exactly one (set the other to null)",
        ),
        (
            {"model__path": None},
            "model: found neither of `path` and `config`, expected exactly one (set the other to null)",
        ),
        ({"model__config": 3}, "model.config: found 3, expected a string or a mapping"),
        ({"mesh__fsdp": 0}, "mesh.fsdp: found 0, expected at least 1"),
        ({"mesh__tensor": 10**24}, f"mesh.tensor: found {10**24}, expected at most 2147483647"),
        ({"train__steps": 10**24}, f"train.steps: found {10**24}, expected at most 2147483647"),
        ({"train__batch_size": 10**11}, "train.batch_size: found 100000000000, expected at most 2147483647"),
        ({"train__seed": 2**32}, "train.seed: found 4294967296, expected at most 4294967295"),
        (
            {"optimizer__warmup_steps": 9999999999},
            "optimizer.warmup_steps: found 9999999999, expected at most 2147483647",
        ),
        (
            {"data__sequence_length": 10**12},
            "data.sequence_length: found 1000000000000, expected at most 1048576",
        ),
        (
            {"data__tokenizer": {"train_bpe": 10**25}},
            f"data.tokenizer.train_bpe: found {10**25}, expected at most 1048576",
        ),
        (
            {"train__batch_size": 2**22},
            "train.batch_size: found 4194304 sequences of 128 tokens, expected at most 268435456 tokens per step: "
            "lower it, or data.sequence_length",
        ),
        (
            {"sample": {"prompt": "x", "seed": 2**32}},
            "sample.seed: found 4294967296, expected at most 4294967295",
        ),
        (
            {"sample": {"prompt": "x", "tokens": 10**12}},
            "sample.tokens: found 1000000000000, expected at most 1048576",
        ),
        (
            {"sample": {"prompt": "x\ud800"}},
            "sample.prompt: found 'x\\ud800', whose character 1 is half a surrogate pair; expected text that UTF-8 "
            "can hold",
        ),
        (
            {"model": {"config": {"a": [b"x"]}}},
            "model.config.a.0: found b'x', expected what JSON can hold",
        ),
        *(
            (
                {"then": value},
                "then: a run has no follow-up any more: give that one a YAML file of its own and start it after this "
                "one, with model.path leading to this run's export",
            )
            for value in ([], [{"output_dir": "y"}])
        ),
        (
            {"train__a\nb": 1},
            "train.'a\\nb': unknown key, expected one of batch_size, checkpoint_every, distributed, eval_every, "
            "export, export_mtp, export_quantization, indexer_loss, keep_checkpoints, log_every, micro_batch_size, "
            "peak_tflops, seed, steps",
        ),
    ],
)
def test_one_line_for_one_mistake(changes, want):
    assert message(**changes) == want


def test_several_mistakes_are_told_at_once_with_unknown_keys_first():
    told = message(train__steps="8", optimizer__eps=0, data__pth=1)
    assert told.startswith("data.pth: unknown key, did you mean data.path?; ")
    assert "train.steps: found" in told
    assert "optimizer.eps: found" in told
    assert message(**{f"train__{letter}": 1 for letter in "abcdefg"}).endswith("; and 2 more")


@pytest.mark.parametrize(
    ("changes", "key", "numbers"),
    [
        (
            {"train__micro_batch_size": 3},
            "train.batch_size: found 8",
            "train.micro_batch_size 3, such as 6 or 9",
        ),
        ({"mesh": {"fsdp": 3}}, "train.batch_size: found 8", "multiple of 3"),
        ({"mesh": {"data": 2, "fsdp": 3}}, "train.batch_size: found 8", "such as 6 or 12"),
        ({"mesh": {"expert": 3}}, "train.batch_size: found 8", "such as 6 or 9"),
        ({"train__micro_batch_size": 4, "mesh": {"data": 8}}, "train.micro_batch_size: found 4", "such as 8"),
    ],
)
def test_batches_must_divide(changes, key, numbers):
    told = message(**changes)
    assert told.startswith(key)
    assert numbers in told


def test_batches_that_divide_and_the_tensor_axis_which_splits_none():
    assert run(train__micro_batch_size=4, mesh={"data": 2, "fsdp": 2, "tensor": 7}).mesh.batch_shards == 4


def test_contradictions_between_sections():
    assert message(optimizer__warmup_steps=11) == (
        "optimizer.warmup_steps: found 11, expected at most train.steps, which is 10"
    )
    assert run(optimizer__warmup_steps=10).optimizer.warmup_steps == 10
    assert message(train__eval_every=5).startswith("train.eval_every: found 5, but nothing to evaluate on")
    assert run(train__eval_every=5, data__eval_fraction=0.1).train.eval_every == 5


@pytest.mark.parametrize(
    "key", ["data__path", "data__eval_path", "data__tokenizer", "model__path", "output_dir"]
)
def test_paths_at_which_nothing_can_be(key, tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path, reason in (
        ("a\0b", "it has a character that no path can have"),
        ("a" * 5000, "File name too long"),
        (str(tmp_path / "loop"), "Too many levels of symbolic links"),
        (str(tmp_path / "loop" / "x"), "Too many levels of symbolic links"),
        ("~no-such-user/x", "Could not determine home directory"),
    ):
        told = message(**{key: path})
        assert told.startswith(f"{key.replace('__', '.')}: found '")
        assert told.endswith(f"which is no usable path ({reason}), expected another one")
        assert len(told) < 500


def test_the_largest_values_that_are_allowed():
    config = run(
        train__steps=2**31 - 1, train__seed=2**32 - 1, train__batch_size=2**8, data__sequence_length=2**20
    )
    assert config.train.batch_size * config.data.sequence_length == 2**28
    assert schedule(config.optimizer, config.train.steps)(2**31 - 2) > 0


def test_home_is_expanded():
    assert run(output_dir="~/runs/x").output_dir == str(Path.home() / "runs/x")


def test_overrides(tmp_path):
    path = write(tmp_path, yaml.safe_dump(SMALLEST))
    config = load_config(
        path,
        [
            "train.steps=20",
            "train.steps=30",
            "optimizer.learning_rate=3e-4",
            "data.exclude=[a, b]",
            "data.tokenizer.train_bpe=400",
            "sample.prompt=a=b",
            "train.peak_tflops=null",
        ],
    )
    assert config.train.steps == 30
    assert config.optimizer.learning_rate == 3e-4
    assert config.data.exclude == ("a", "b")
    assert config.data.tokenizer is not None
    assert config.data.tokenizer.train_bpe == 400
    assert config.sample is not None
    assert config.sample.prompt == "a=b"


@pytest.mark.parametrize(
    ("override", "want"),
    [
        ("train.steps", "override 'train.steps': expected key.path=value, such as train.steps=100"),
        ("=3", "override '=3': expected key.path=value"),
        ("train..steps=3", "override 'train..steps=3': expected key.path=value"),
        ("train.steps=[1", "override 'train.steps=[1': not valid YAML in line 1"),
        ("output_dir.x=1", "override 'output_dir.x=1': output_dir is 'runs/x' and has no keys"),
        ("data.exclude.0=b", "override 'data.exclude.0=b': data.exclude is ['a'] and has no keys"),
        (f"{'a' * 5000}", "aaa...: expected key.path=value"),
        ("train.stepz=3", "train.stepz: unknown key, did you mean train.steps?"),
        ("train.steps='3'", "train.steps: found the string '3', expected an integer"),
    ],
)
def test_overrides_that_are_none(tmp_path, override, want):
    path = write(tmp_path, yaml.safe_dump(SMALLEST | {"data": SMALLEST["data"] | {"exclude": ["a"]}}))
    with pytest.raises(UserError) as caught:
        load_config(path, [override])
    assert want in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("train:\n  steps: 1\n  steps: 2\n", "not valid YAML in line 3, column 3: duplicate key 'steps'"),
        ("a: [1\n", "not valid YAML in line 2, column 1"),
        (
            "a: !!python/object:os.system {}\n",
            "not valid YAML in line 1, column 4: could not determine a constructor",
        ),
        ("a: 2024-99-99\n", "in line 1, column 4: '2024-99-99' cannot be read as timestamp"),
        ("a: !!timestamp b\n", "in line 1, column 4: 'b' cannot be read as timestamp"),
        ("a: !!bool b\n", "in line 1, column 4: 'b' cannot be read as bool"),
        ("a: !!int ''\n", "in line 1, column 4: '' cannot be read as int"),
        ("a: !!float b\n", "in line 1, column 4: 'b' cannot be read as float"),
        (f"a: 0x{'f' * 5000}\n", "in line 1, column 4: '0xfff"),
        ('a: "\\ud800"\n', "in line 1, column 4: '\\ud800' cannot be read as str"),
        ("a: &a [{b: *a}]\n", "not valid YAML in line 1, column 4: found unconstructable recursive node"),
        ("", "found nothing, expected a mapping"),
        ("- a\n", "found list, expected a mapping"),
        ("3: 4\n", "3: found a key that is no string"),
        ("? [a]\n: 4\n", "not valid YAML in line 1, column 3: found unhashable key"),
        ("a: \x00\n", "not valid YAML: "),
    ],
)
def test_files_that_are_no_configuration(tmp_path, text, want):
    with pytest.raises(UserError) as caught:
        load_config(write(tmp_path, text))
    assert str(caught.value).startswith(f"{tmp_path}/run.yaml: ")
    assert want in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"absent\.yaml: no such file, expected a YAML configuration"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(UserError, match=r"found a folder, expected a YAML configuration file"):
        load_config(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"abc\xff")
    with pytest.raises(UserError, match="byte 3 is not UTF-8"):
        load_config(tmp_path / "binary.yaml")


def test_merge_keys_of_yaml_are_no_duplicates(tmp_path):
    text = (
        yaml.safe_dump(SMALLEST).replace("model:\n", "model: &m\n")
        + "balance: {<<: {aux_loss: 0.5}, aux_loss: 0.25}\n"
    )
    assert load_config(write(tmp_path, text)).balance.aux_loss == 0.25


def test_without_a_path_the_quickstart_of_the_package_is_read(tmp_path, monkeypatch):
    (tmp_path / "quickstart.yaml").write_text(yaml.safe_dump(SMALLEST))
    monkeypatch.setattr("jaxmoe.config.run.resources.files", {"jaxmoe.configs": tmp_path}.__getitem__)
    assert load_config(None, ["train.steps=12"]).train.steps == 12
    with pytest.raises(UserError, match=r"^quickstart\.yaml with overrides: train\.step: unknown key"):
        load_config(None, ["train.step=12"])


def test_the_second_run_of_the_quickstart_fine_tunes_what_the_first_exports():
    first = load_config(None)
    second = load_config(Path(str(resources.files("jaxmoe.configs") / "quickstart-finetune.yaml")))
    assert first.train.export
    assert second.model.path == f"{first.output_dir}/export"
    assert second.data.tokenizer is None  # the one that the first run made and exported
    assert second.output_dir != first.output_dir


def test_a_folder_of_an_earlier_version_is_read(tmp_path, capsys):
    config = run()
    text = config.to_yaml().replace("you_jiacheng", "quintic")
    for then in ("[]", "\n- output_dir: runs/y"):
        (tmp_path / "config.yaml").write_text(f"{text}then: {then}\n")
        assert recorded_config(tmp_path / "config.yaml") == config
    assert capsys.readouterr().err == ""


def test_the_earlier_name_of_a_set_of_coefficients_is_read_and_told(tmp_path, caplog):
    path = write(tmp_path, yaml.safe_dump(SMALLEST))
    assert load_config(path, ["optimizer.coefficients=quintic"]) == load_config(path)
    note = "optimizer.coefficients: quintic is called you_jiacheng here, the numbers are the same"
    assert caplog.messages == [f"{path}: {note}"]
    assert message(optimizer__coefficients="cubic").endswith("'you_jiacheng', 'jordan' or 'polar_express'")


def test_the_reference_names_every_key_with_its_default(capsys):
    reference = yaml.safe_load(reference_yaml())
    full = yaml.safe_load(run(sample={"prompt": "x"}).to_yaml())
    assert list(reference) == list(full)
    for section, keys in full.items():
        if isinstance(keys, dict):
            assert list(reference[section]) == list(keys)
    for section in ("balance", "mesh"):
        assert reference[section] == full[section]
    assert reference["train"]["checkpoint_every"] == full["train"]["checkpoint_every"]
    assert all(line.split("#")[1].strip() for line in reference_yaml().splitlines() if "#" in line)
    assert cli(["train", "--keys"]) == 0
    assert capsys.readouterr().out == reference_yaml()


def nines():
    lists = ["&a [x, x, x, x, x, x, x, x, x]"]
    for name, of in zip("bcdefghijk", "abcdefghij", strict=True):
        lists.append(f"&{name} [{', '.join([f'*{of}'] * 9)}]")
    return f"[{', '.join(lists)}]"


@pytest.mark.parametrize("key", ["train.steps", "model.config", "sample", "trainable", "nonsense"])
def test_aliases_in_aliases_are_refused_wherever_they_are(tmp_path, key):
    """A few hundred bytes that stand for billions of values, which whoever looks at the values would walk through."""
    section, _, name = key.partition(".")
    content = yaml.safe_dump({k: v for k, v in SMALLEST.items() if k != section})
    inner = f"{{{name}: {nines()}}}" if name else nines()
    path = write(tmp_path, f"{content}\n{section}: {inner}\n")
    with pytest.raises(
        UserError, match=r"run\.yaml: its aliases \(\*name\) stand for more than 10,000 values"
    ):
        load_config(path)
    path = write(tmp_path, yaml.safe_dump(SMALLEST))
    with pytest.raises(UserError, match=r"its aliases \(\*name\) stand for more than 10,000 values"):
        load_config(path, [f"{key}={nines()}"])


def test_ordinary_aliases_are_what_they_stand_for(tmp_path):
    text = yaml.safe_dump({k: v for k, v in SMALLEST.items() if k != "data"})
    plain = load_config(write(tmp_path, f"{text}data: {{path: words, field: words, sequence_length: 16}}\n"))
    for data in (
        "{path: &w words, field: *w, sequence_length: 16}",
        "{<<: {path: &w words, field: *w}, sequence_length: 16}",
    ):
        assert load_config(write(tmp_path, f"{text}data: {data}\n")) == plain


def test_a_file_that_is_none_or_too_large(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "comments.yaml").write_text("# of fifty megabytes\n" * 2_500_000)
    expected = {
        tmp_path / "pipe": "it is a named pipe, expected a regular file",
        "/dev/zero": "it is a character device, expected a regular file",
        tmp_path / "comments.yaml": "it has 52,500,000 bytes, expected at most 262,144",
        "run\0.yaml": "no usable path \\(it has a character that no path can have\\); expected a YAML",
        "run" * 2000: "no usable path \\(File name too long\\)",
    }
    for path, words in expected.items():
        with pytest.raises(UserError, match=words):
            load_config(Path(path))


@pytest.mark.parametrize("key", ["optimizer.learning_rate", "optimizer.eps", "balance.aux_loss"])
@pytest.mark.parametrize("value", ["1e300", "1e-60", "3.5e38"])
def test_numbers_that_float32_has_not(tmp_path, key, value):
    with pytest.raises(UserError, match=f"{key}: found .*expected a number that float32 holds"):
        load_config(write(tmp_path, yaml.safe_dump(SMALLEST)), [f"{key}={value}"])
    assert load_config(write(tmp_path, yaml.safe_dump(SMALLEST)), [f"{key}=3.4e38"])
