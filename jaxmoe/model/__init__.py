"""The decoder and its parts: each module holds a frozen spec, its parameters and its function."""
