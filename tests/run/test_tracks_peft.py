"""Training on a base in few bits beside transformers with PEFT on the values that the codes stand for: the losses."""

import families
import jax
import numpy as np
import pytest
from helpers import adapters

from jaxmoe.config import RunConfig
from jaxmoe.interop.quantizing import Recorded
from jaxmoe.model.batch import learning_batch
from jaxmoe.parallel.sharding import make_mesh
from jaxmoe.params import split
from jaxmoe.run.assemble import assemble
from jaxmoe.run.model import export_adapter
from jaxmoe.training.step import TrainStep

STEPS, ROWS, LENGTH = 50, 3, 14
RATE, BETAS, EPS, CLIP = 3e-3, (0.9, 0.95), 1e-8, 1.0


def assembled_for(folder, quantization):
    config = RunConfig.from_mapping(
        {
            "model": {"path": str(folder), "dtype": "float32", "quantization": quantization},
            "data": {"path": "nothing.txt", "sequence_length": LENGTH},
            "optimizer": {
                "name": "adamw",
                "learning_rate": RATE,
                "weight_decay": 0.0,
                "schedule": "constant",
                "warmup_steps": 0,
                "betas": list(BETAS),
                "eps": EPS,
                "clip_norm": CLIP,
            },
            "train": {"steps": STEPS, "batch_size": ROWS},
            "adapter": {
                "rank": 5,
                "alpha": 7.0,
                "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
                "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            },
            "output_dir": "nowhere",
        }
    )
    return assemble(config, make_mesh(devices=jax.devices()[:1]))


def our_losses(assembled, batches, folder):
    """And the adapter that training began with, in a folder."""
    with jax.set_mesh(assembled.mesh):
        weights = assembled.initial_weights.make()
        trained, _ = split(weights, assembled.adapted.mask)
        export_adapter(assembled.adapted, trained, folder, base=None, dtype=assembled.dtype)
        state = assembled.begin(weights)
        step = TrainStep(assembled.lower().compile())
        # What is frozen is not given back: on a CPU it would be copied.
        given = jax.tree.structure(
            step.function.out_tree.unflatten([0] * step.function.out_tree.num_leaves)[0]
        )
        assert given == jax.tree.structure(state.saved)
        losses = []
        for tokens in batches:
            positions = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
            batch = learning_batch(tokens, positions, np.ones_like(positions))
            state, metrics = step(state, jax.tree.map(lambda array: array[None], batch))
            losses.append(float(metrics["loss"]))
    return losses


def quantised(model, folder):
    """The model with the values of what a run held in few bits, by the record in the adapter's folder."""
    import torch

    from jaxmoe.codecs import four_bit, int8_rows

    recorded = Recorded.read(folder)
    kind, block = recorded.quantization.kind, recorded.quantization.block_size

    def values(matrix):
        if kind == "int8":
            return int8_rows.dequantize(int8_rows.quantize(matrix), np.float32)
        packed = four_bit.quantize(matrix, kind, block, recorded.quantization.double_quant)
        return four_bit.dequantize(packed, np.float32)

    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in recorded.parameters:
            whole = parameters[name].numpy()
            made = np.stack([values(one) for one in whole]) if whole.ndim == 3 else values(whole)
            assert np.abs(made - whole).max() > 0
            parameters[name].copy_(torch.from_numpy(made))
    return model


def their_losses(model, folder, batches):
    """Of transformers with PEFT and torch's AdamW."""
    import peft
    import torch

    with adapters.quiet():
        wrapped = peft.PeftModel.from_pretrained(model, folder, is_trainable=True)
    wrapped.eval()
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=BETAS, eps=EPS, weight_decay=0.0)
    losses = []
    for tokens in batches:
        given = torch.from_numpy(np.int64(tokens))
        loss = wrapped(input_ids=given, labels=given, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.torch
@pytest.mark.parametrize("quantization", [{"kind": "nf4", "block_size": 32, "double_quant": True}, "int8"])
def test_fifty_losses_are_those_of_transformers_and_peft(quantization, tmp_path):
    model = families.torch_model("qwen3_moe")
    model.save_pretrained(tmp_path / "base")
    assembled = assembled_for(tmp_path / "base", quantization)
    rng = np.random.default_rng(4)
    batches = rng.integers(0, assembled.spec.vocab_size, (4, ROWS, LENGTH)).astype(np.int32)
    batches = [batches[step % len(batches)] for step in range(STEPS)]
    ours = our_losses(assembled, batches, tmp_path / "adapter")
    theirs = their_losses(quantised(model, tmp_path / "adapter"), tmp_path / "adapter", batches)
    np.testing.assert_allclose(ours, theirs, atol=1e-3, rtol=0)
    assert np.mean(ours[-4:]) < np.mean(ours[:4]) - 0.5
