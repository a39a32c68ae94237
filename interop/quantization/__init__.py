"""Folders whose weights are quantised, seen as if they were not."""
