"""The ways to stretch a rotation, against transformers' own models on torch. For families see test_families.py."""

import families
import numpy as np
import pytest
from helpers import parity

pytestmark = pytest.mark.torch

ROPES = {
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.5},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn, untruncated, mscale": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "truncate": False,
        "mscale": 1.0,
        "mscale_all_dim": 0.8,
        "beta_fast": 20.0,
        "beta_slow": 2.0,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": [2.0 + 0.3 * i for i in range(8)],
    },
}


@pytest.mark.parametrize("name", ROPES)
def test_rope(name):
    variant = {
        "num_hidden_layers": 1,
        "decoder_sparse_step": 1,
        "max_position_embeddings": 40,
        "rope_parameters": ROPES[name],
    }
    segments = np.ones((2, parity.LENGTH), np.int32)
    positions = np.tile(np.arange(parity.LENGTH), (2, 1))
    model = families.torch_model("qwen3_moe", variant)
    parity.compare(model, families.case_of("qwen3_moe"), segments, positions, masked=True)
