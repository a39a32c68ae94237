"""What a token costs, counted from the spec."""

from jaxmoe.model.spec import LayerSpec, ModelSpec
from jaxmoe.params import count


def active_params(spec: ModelSpec) -> int:
    """Parameters that one token is multiplied with: K of E experts, the output head, no embedding lookup."""

    def of_layer(layer: LayerSpec) -> int:
        return count(layer.params(spec.width)) - sum(block.idle_params(spec.width) for block in layer.blocks)

    layers = sum(of_layer(layer) * group.repeats for group in spec.groups for layer in group.pattern)
    return layers + spec.vocab_size * spec.width


def train_flops_per_token(spec: ModelSpec, sequence_length: int, *, base_trains: bool = True) -> float:
    """FLOPs of forward and backward for one token: 6 per active parameter, and three times what mixers add forward.

    Recomputation is not counted (PaLM, arXiv 2204.02311, appendix B), nor are the products of low-rank pairs.

    Args:
        spec: the model.
        sequence_length: of one document.
        base_trains: weights have gradients. If they do not, as under adapters, it is 4 per active parameter.
    """
    mixers = (layer.mixer for layer in spec.layers if layer.mixer is not None)
    mixing = sum(3 * mixer.mixing_flops(sequence_length) for mixer in mixers)
    return (6.0 if base_trains else 4.0) * active_params(spec) + mixing
