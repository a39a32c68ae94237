"""``python -m jaxmoe`` is the console script ``jaxmoe``."""

from jaxmoe.cli import script

if __name__ == "__main__":
    script()
