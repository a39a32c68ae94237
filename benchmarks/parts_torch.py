"""transformers' side of `step_parts.py`: the modules and functions of its Qwen3-MoE, part by part."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from train_step import RATE
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.qwen3_moe.modeling_qwen3_moe import apply_rotary_pos_emb

Call = Callable[[], Any]


def calls(model: Any, tokens: np.ndarray) -> tuple[dict[str, Call], str]:
    """A function per part that computes it, of a layer for the first one; and the experts' implementation, the faster.

    Args:
        model: in transformers, float32; the optimiser changes its weights.
        tokens: (B, T).
    """
    ids = torch.from_numpy(tokens)
    implementation = _faster_experts(model, tokens.size)
    of_layer = _attention(model, ids) | _expert_path(model, tokens.size)
    return of_layer | _ends(model, ids) | _optimizer(model), implementation


def _both(function: Callable[[], Any], operands: Sequence[Any]) -> Call:
    """`function`, and the gradients of `operands`, for random gradients of what it gives."""
    given = [torch.randn_like(out) for out in _several(function())]
    return lambda: torch.autograd.grad(_several(function()), operands, given)


def _backward(outs: Sequence[Any], operands: Sequence[Any]) -> Call:
    """The gradients alone, of what was computed once."""
    given = [torch.randn_like(out) for out in outs]
    return lambda: torch.autograd.grad(outs, operands, given, retain_graph=True)


def _several(out: Any) -> tuple[Any, ...]:
    return out if isinstance(out, tuple) else (out,)


def _leaf(*shape: int) -> Any:
    return torch.randn(*shape).requires_grad_()


def _attention(model: Any, ids: Any) -> dict[str, Call]:
    """Attention forward and backward, its projections, and the norms and rotations of a layer."""
    config, layer = model.config, model.model.layers[0]
    attention = layer.self_attn
    batch, length = ids.shape
    # (B, heads, T, H) is how the model sees its (B, T, heads, H).
    of_heads = [
        _leaf(batch, length, count, config.head_dim)
        for count in (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    ]
    qkv = [heads.transpose(1, 2) for heads in of_heads]

    def attend() -> Any:
        return sdpa_attention_forward(attention, *qkv, None, scaling=attention.scaling)[0]

    x, after = _leaf(batch, length, config.hidden_size), _leaf(batch, length, config.hidden_size)
    attended = _leaf(batch, length, attention.o_proj.in_features)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    tables = model.model.rotary_emb(x, torch.arange(length)[None])

    def project() -> Any:
        return *(projection(x) for projection in projections[:3]), attention.o_proj(attended)

    def norms() -> Any:
        q, k = attention.q_norm(of_heads[0]), attention.k_norm(of_heads[1])
        turned = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), *tables)
        return *turned, layer.input_layernorm(x), layer.post_attention_layernorm(after)

    normed = (layer.input_layernorm, layer.post_attention_layernorm, attention.q_norm, attention.k_norm)
    return {
        "attention, forward": attend,
        "attention, backward": _backward([attend()], of_heads),
        "attention's projections": _both(project, [x, attended, *(p.weight for p in projections)]),
        "norms and rotation": _both(norms, [x, after, *of_heads[:2], *(n.weight for n in normed)]),
    }


def _routed(model: Any, rows: int) -> tuple[Any, Any, Any]:
    """Rows (R, D), and the first router's weights and choices for them, both (R, K)."""
    x = _leaf(rows, model.config.hidden_size)
    _, weights, chosen = model.model.layers[0].mlp.gate(x)
    return x, weights.detach().requires_grad_(), chosen


def _whole_experts(model: Any, rows: int) -> Call:
    experts = model.model.layers[0].mlp.experts
    x, weights, chosen = _routed(model, rows)
    return _both(lambda: experts(x, chosen, weights), [x, weights, experts.gate_up_proj, experts.down_proj])


def _faster_experts(model: Any, rows: int) -> str:
    """Which implementation the model is set to."""
    seconds = {}
    for implementation in ("grouped_mm", "eager"):
        model.set_experts_implementation(implementation)
        call = _whole_experts(model, rows)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        seconds[implementation] = min(times)
    faster = min(seconds, key=seconds.__getitem__)
    model.set_experts_implementation(faster)
    return faster


def _expert_path(model: Any, rows: int) -> dict[str, Call]:
    """Router, experts as a whole and by passes, their activation and the order of their rows."""
    moe = model.model.layers[0].mlp
    gate, experts = moe.gate, moe.experts
    x, weights, chosen = _routed(model, rows)
    pre_Zf = _leaf(chosen.numel(), 2 * experts.intermediate_dim)

    def forward() -> Any:
        return experts(x, chosen, weights)

    def dispatch() -> Any:
        order = torch.argsort(chosen.reshape(-1))
        return order, torch.argsort(order)

    def activate() -> Any:
        first, second = pre_Zf.chunk(2, dim=-1)
        return experts.act_fn(first) * second

    return {
        "router": _both(lambda: gate(x)[1], [x, gate.weight]),
        "experts": _whole_experts(model, rows),
        "· forward": forward,
        "· backward, dX": _backward([forward()], [x, weights]),
        "· dispatch": dispatch,
        "· activation": _both(activate, [pre_Zf]),
    }


def _ends(model: Any, ids: Any) -> dict[str, Call]:
    """Embedding and output head, each with its gradients."""
    embedding, head, vocabulary = model.model.embed_tokens, model.lm_head, model.config.vocab_size
    hidden = _leaf(*ids.shape, model.config.hidden_size)

    def loss() -> Any:
        value = model.loss_function(logits=head(hidden), labels=ids, vocab_size=vocabulary)
        return torch.autograd.grad(value, [hidden, head.weight])

    return {
        "embedding": _both(lambda: embedding(ids), [embedding.weight]),
        "head and cross-entropy": loss,
    }


def _optimizer(model: Any) -> dict[str, Call]:
    """AdamW alone, and with clipping."""
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.95), weight_decay=0.1, foreach=True)

    def clipped() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return {"clipping and AdamW": clipped, "· AdamW": optimizer.step}
