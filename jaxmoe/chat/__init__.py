"""Conversations as tokens, and which of them are trained. Nothing here needs jax: workers import it."""
