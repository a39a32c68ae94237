"""Objectives: from hidden states and a batch to a loss."""
