"""The seam of token mixers: one that nothing else knows of trains, shards, exports and resumes."""

import dataclasses
import json

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import parity, reading, tiny
from helpers.runs import run_config, run_until, write_workspace

import jaxmoe
from jaxmoe.config import RunConfig
from jaxmoe.interop.families import FAMILIES
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.pretrained import from_config
from jaxmoe.interop.rules import Rule
from jaxmoe.model.batch import Batch
from jaxmoe.model.blocks import Mixer
from jaxmoe.model.linear import linear
from jaxmoe.model.mixers.context import make_context
from jaxmoe.model.sampling import Generator
from jaxmoe.model.spec import group_layers
from jaxmoe.params import named, param
from jaxmoe.run import loop


@dataclasses.dataclass(frozen=True)
class MovingAverage(Mixer):
    """sigmoid(gate · x) · s, with s ← λ s + (1 − λ) x from the start of each document, λ = sigmoid(decay).

    What it keeps of a text is s: it goes on after the last token alone.
    """

    width: int

    rewinds = False

    def params(self, width):
        sizes = {"D": width, "X": width}
        return {
            "average": {"gate": param("XD", sizes), "decay": param("X", sizes, role="decay", init="ones")}
        }

    def apply(self, params, x_BTD, context):
        return self._mix(params["average"], x_BTD, context.starts[..., None])[0]

    def init_cache(self, repeats, batch, length, dtype):
        return jnp.zeros((repeats, batch, self.width), jnp.float32)

    def decode(self, params, x_BTD, context, cache, repeat):
        first_BT = jnp.full(x_BTD.shape[:2], False)
        before = None if context.fresh else cache[repeat]
        out_BTD, state_BTD = self._mix(params["average"], x_BTD, first_BT[..., None], before)
        # Padding comes last, and is not to count.
        last_B = jnp.sum(context.valid, axis=1) - 1
        return out_BTD, cache.at[repeat].set(state_BTD[jnp.arange(last_B.size), last_B])

    def _mix(self, own, x_BTD, starts_BTJ, before_BD=None):
        share_D = jax.nn.sigmoid(own["decay"].astype(jnp.float32))[None, None]
        kept_BTD = jnp.where(starts_BTJ, 0.0, share_D)
        added_BTD = (1 - share_D) * x_BTD.astype(jnp.float32)
        if before_BD is not None:
            added_BTD = added_BTD.at[:, 0].add(share_D[:, 0] * before_BD)

        def after(first, then):
            return first[0] * then[0], first[1] * then[0] + then[1]

        _, state_BTD = jax.lax.associative_scan(after, (kept_BTD, added_BTD), axis=1)
        return jax.nn.sigmoid(linear(x_BTD, own["gate"])) * state_BTD.astype(x_BTD.dtype), state_BTD

    def describe(self):
        return "gated moving average"


TIMES = {"seconds", "data_seconds", "tokens_per_second", "mfu"}


def every_other(spec):
    layers = [
        dataclasses.replace(layer, mixer=MovingAverage(spec.width)) if index % 2 else layer
        for index, layer in enumerate(spec.layers)
    ]
    return dataclasses.replace(spec, groups=group_layers(layers))


@pytest.fixture
def family(monkeypatch):
    base, module = FAMILIES["qwen3_moe"], "model.layers.{L}.average."
    rules = (
        Rule("layers.{L}.average.gate", module + "gate.weight", "X D"),
        Rule("layers.{L}.average.decay", module + "decay", "X"),
    )
    mixed = Family(
        base.model_type,
        lambda config: every_other(base.read_spec(config)),
        lambda spec: (*base.named_rules(spec), *rules),
        unused_fields=base.unused_fields,
    )
    monkeypatch.setitem(FAMILIES, base.model_type, mixed)
    return mixed


def test_value():
    """Against the definition, token by token in float64; documents begin anew, padding too."""
    rng = np.random.default_rng(0)
    gate, decay, x = (rng.standard_normal(shape) for shape in ((5, 5), (5,), (2, 9, 5)))
    segments = np.asarray([[1, 1, 1, 2, 2, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1, 2, 2, 3]], np.int32)
    want, share = np.zeros_like(x), 1 / (1 + np.exp(-decay))
    for row in range(2):
        state = np.zeros(5)
        for t in range(9):
            if t and segments[row, t] != segments[row, t - 1]:
                state = np.zeros(5)
            state = share * state + (1 - share) * x[row, t]
            want[row, t] = state / (1 + np.exp(-gate @ x[row, t]))
    mixer, params = MovingAverage(5), {"gate": jnp.float32(gate), "decay": jnp.float32(decay)}
    for packed in (True, False):  # borders are known also where attention has no mask
        context = make_context((), Batch(None, jnp.zeros((2, 9), int), segments), jnp.float32, packed=packed)
        begins = [[0, 3, 7], [0, 6, 8]]
        assert [np.flatnonzero(row).tolist() for row in context.starts] == begins
        got = mixer.apply({"average": params}, jnp.float32(x), context)
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_it_continues_a_text():
    spec = every_other(reading.model_of("qwen3_moe")[1])
    params, prompt = reading.weights_of(spec), reading.prompt_of(spec, 37)
    one = Generator(params, spec, dtype=jnp.float32)
    for text in (prompt, [*prompt, 5], [*prompt, 5, *prompt], prompt[:30]):  # the last one is read anew
        want = reading.whole(params, spec, text)[-1]
        parity.assert_close(one.feed(text), want, 1e-5, f"logits after {len(text)} tokens")


def metrics_of(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]


def close(one, other, tolerance):
    assert [record.keys() for record in one] == [record.keys() for record in other]
    for ours, theirs in zip(one, other, strict=True):
        for key in ("loss", "grad_norm", "eval/bits_per_byte"):
            if key in ours:
                assert ours[key] == pytest.approx(theirs[key], rel=tolerance), (ours["step"], key)


def test_it_trains_shards_resumes_and_exports(family, tmp_path, monkeypatch):
    workspace = write_workspace(tmp_path / "work")
    raw = families.config_json("qwen3_moe", initializer_range=0.02)
    model = from_config(raw, "float32", seed=2)
    (workspace / "model").rename(workspace / "tokenizer")
    jaxmoe.save_pretrained(model, workspace / "model")
    tiny.write_tokenizer(workspace / "model", raw["vocab_size"])

    again = jaxmoe.from_pretrained(workspace / "model", "float32")
    jaxmoe.save_pretrained(again, tmp_path / "untouched")
    for path in (workspace / "model").iterdir():
        assert path.read_bytes() == (tmp_path / "untouched" / path.name).read_bytes(), path.name

    def config(name, **changes):
        changes = {
            "mesh": {"data": 8},
            "train__steps": 6,
            "train__checkpoint_every": 2,
            "train__micro_batch_size": 8,
        } | changes
        return RunConfig.from_mapping(run_config(workspace, tmp_path / name, **changes))

    whole = loop.run(config("whole"))
    sharded = loop.run(config("sharded", mesh={"fsdp": 2, "expert": 2, "tensor": 2}))
    close(metrics_of(tmp_path / "sharded"), metrics_of(tmp_path / "whole"), 1e-4)

    run_until(config("resumed"), 5, monkeypatch)
    loop.run(config("resumed"))
    assert metrics_of(tmp_path / "resumed") == metrics_of(tmp_path / "whole")
    assert sharded.loss == pytest.approx(whole.loss, rel=1e-4)

    exported = jaxmoe.from_pretrained(tmp_path / "whole" / "export", "float32").pure_params()
    before = again.pure_params()
    for (name, new), (_, old) in zip(*(named(tree) for tree in (exported, before)), strict=True):
        assert (np.asarray(new) != np.asarray(old)).any(), f"{name} was not trained"
