"""Feed-forwards: what happens to each token by itself."""
