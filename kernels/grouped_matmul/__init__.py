"""Matrix product of rows sorted by group with their group's matrix, and the gradient of the matrices.

Plain XLA, for any device; what is differentiated is the layer made of them (`jaxmoe.kernels.expert_mlp`).
"""

from jaxmoe.kernels.grouped_matmul.xla import matmul, weight_gradient

__all__ = ["matmul", "weight_gradient"]
