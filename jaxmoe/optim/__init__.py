"""Optimisers: Muon on stacks of matrices, AdamW for the rest, and their learning-rate schedule."""

from jaxmoe.optim.build import build_optimizer, schedule
from jaxmoe.optim.muon import muon
from jaxmoe.optim.orthogonalize import orthogonalize

__all__ = ["build_optimizer", "muon", "orthogonalize", "schedule"]
