"""Matrix product of sorted token rows with their experts' weights, and its gradients."""

from jaxmoe.kernels.grouped_matmul.api import grouped_matmul

__all__ = ["grouped_matmul"]
