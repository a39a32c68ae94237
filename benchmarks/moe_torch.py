"""The expert layer on torch's grouped_mm, eager, as transformers' grouped_mm experts are written."""

from collections.abc import Callable
from typing import Any

import jax
import torch
from moe_peers import Inputs

from jaxmoe.kernels.expert_mlp import Activation, Lora


def make(inputs: Inputs, activation: Activation, scale: float, weights: str, backward: bool) -> "TorchLayer":
    """A contestant that shares the arrays of `inputs`, without a copy on a GPU."""
    lora = inputs.experts.lora if weights == "lora" else Lora()
    shared = jax.tree.map(torch.from_dlpack, inputs.experts._asdict() | lora._asdict() | {"lora": None})
    layer = TorchLayer()
    layer.activation, layer.scale, layer.backward = activation, scale, backward
    layer.arrays = {name: None if tensor is None else tensor.detach() for name, tensor in shared.items()}
    layer.x, layer.weights, layer.chosen, layer.dout = (
        torch.from_dlpack(array).detach() for array in (inputs.x, inputs.weights, inputs.chosen, inputs.dout)
    )
    trained = Lora._fields if weights == "lora" else ("gate_up", "down", "gate_up_bias", "down_bias")
    if backward:
        tensors = [layer.x, layer.weights, *(layer.arrays[name] for name in trained)]
        layer.trained = [tensor.requires_grad_() for tensor in tensors if tensor is not None]
    return layer


class TorchLayer:
    """One layer, ready to run."""

    activation: Activation
    scale: float
    backward: bool
    arrays: dict[str, Any]
    x: Any
    weights: Any
    chosen: Any
    dout: Any
    trained: list[Any]

    def __call__(self) -> Any:
        """Forward, and the gradients of what is trained if asked for."""
        if not self.backward:
            with torch.no_grad():
                return self.forward()
        return torch.autograd.grad(self.forward(), self.trained, self.dout)

    def sample(self, count: int) -> float:
        """Seconds of one of `count` calls, by the device's clock."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(count):
            out = self()
        end.record()
        torch.cuda.synchronize()
        del out
        return begin.elapsed_time(end) / 1e3 / count

    def peak_bytes(self) -> int:
        """Most memory of a call, beyond its operands."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = self()
        torch.cuda.synchronize()
        del out
        return torch.cuda.max_memory_allocated() - before

    def forward(self) -> Any:
        arrays, (tokens, top_k) = self.arrays, self.chosen.shape
        flat = self.chosen.reshape(-1).long()
        order = torch.argsort(flat, stable=True)
        inverse = torch.argsort(order)
        expert = flat[order]
        experts = torch.arange(arrays["down"].shape[0], device=flat.device)
        ends = torch.searchsorted(expert, experts, right=True).to(torch.int32)
        x = self.x.index_select(0, order // top_k)
        gate_up, bias = arrays["gate_up"].flatten(1, 2), arrays["gate_up_bias"]
        up_b = arrays["gate_up_b"]
        h = self._linear(
            x,
            gate_up,
            None if bias is None else bias.flatten(1, 2)[expert],
            arrays["gate_up_a"],
            None if up_b is None else up_b.flatten(1, 2),
            ends,
        )
        gate, up = h.chunk(2, dim=-1)
        a = _activate(self.activation, gate, up)
        bias = None if arrays["down_bias"] is None else arrays["down_bias"][expert]
        y = self._linear(a, arrays["down"], bias, arrays["down_a"], arrays["down_b"], ends)
        y = y.index_select(0, inverse).view(tokens, top_k, -1)
        return (y * self.weights.to(y.dtype).unsqueeze(-1)).sum(dim=1)

    def _linear(self, rows: Any, matrix: Any, bias: Any, a: Any, b: Any, ends: Any) -> Any:
        out = _product(rows, matrix, ends)
        if a is not None:
            out = out + self.scale * _product(_product(rows, a, ends), b, ends)
        return out if bias is None else out + bias


def _product(rows: Any, weights: Any, ends: Any) -> Any:
    """rows (Z, in) times weights (E, out, in), by group."""
    grouped: Callable[..., Any] = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    return grouped(rows, weights.transpose(-2, -1), offs=ends)


def _activate(activation: Activation, gate: Any, up: Any) -> Any:
    if activation.name == "silu":
        return torch.nn.functional.silu(gate) * up
    if activation.name == "gelu_tanh":
        return torch.nn.functional.gelu(gate, approximate="tanh") * up
    gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)
