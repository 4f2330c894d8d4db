"""So that `python -m vjepa VERB ...` works under torchrun and from a frozen copy of the code."""

import sys

from vjepa.cli import main

if __name__ == "__main__":
    sys.exit(main())
