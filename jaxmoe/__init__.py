"""Fine-tuning mixture-of-experts language models in JAX."""
