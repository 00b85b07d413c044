"""`python -m orthrus_converters` is `orthrus-convert`."""

import sys

from orthrus_converters.cli import main

if __name__ == "__main__":
    sys.exit(main())
