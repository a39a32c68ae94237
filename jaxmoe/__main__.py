"""``python -m jaxmoe`` is the console script ``jaxmoe``."""

import sys

from jaxmoe.cli import main

if __name__ == "__main__":
    sys.exit(main())
