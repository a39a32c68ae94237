"""Every family token by token, by what is cached, beside whole texts without a cache."""

import pytest
from helpers import parity, reading

from jaxmoe.interop.families import FAMILIES

PROMPT, NEW = 43, 21


@pytest.mark.once
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_of_a_greedy_continuation(name, monkeypatch):
    params, spec = reading.model_of(name)
    windows = [getattr(layer.mixer, "window", None) or 0 for layer in spec.layers]
    assert max(windows) < PROMPT, "the prompt does not outgrow the window"
    prompt = reading.prompt_of(spec, PROMPT)
    new, logits = reading.greedy(params, spec, prompt, NEW, monkeypatch)
    want = reading.whole(params, spec, prompt + new)
    assert len(new) == NEW
    parity.assert_close(logits, want[PROMPT - 1 : -1], 1e-5, "logits")
