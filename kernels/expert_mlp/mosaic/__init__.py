"""The backend for NVIDIA Hopper, in Pallas' Mosaic GPU."""
