"""What one step computes: state, losses, update."""
