"""Objectives: from hidden states and a batch to a loss and metrics."""

from typing import Any, Protocol

import jax

from jaxmoe.model.batch import Batch
from jaxmoe.model.head import Head


class Objective(Protocol):
    """What is minimised, as a frozen dataclass. All of its sums add up over micro-batches and devices."""

    def size(self, batch: Batch) -> jax.Array:
        """What the summed loss of a whole batch is divided by, a float32 number above 0 where there is anything to
        learn.

        Args:
            batch: (…, B, T), with all micro-batches.
        """

    def loss(self, hidden_BTD: jax.Array, head: Head, batch: Batch) -> tuple[jax.Array, dict[str, Any]]:
        """The summed loss of a micro-batch (), and further sums for the log by name.

        Args:
            hidden_BTD: (B, T, D), after the final norm.
            head: the output head.
            batch: (B, T).
        """
