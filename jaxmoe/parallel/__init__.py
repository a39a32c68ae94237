"""Meshes of devices, and processes that make one run."""
