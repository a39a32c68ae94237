"""Checking the GPU kernels on a device and finding their tile sizes there."""
