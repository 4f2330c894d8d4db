"""Where `vjepa VERB ...` begins, and `python -m vjepa VERB ...` under torchrun and from a frozen copy of the code."""

import signal
import sys


def main() -> int:
    """Run one verb; Ctrl-C is one line while modules are still imported, too."""
    try:
        from vjepa.cli import main

        return main()
    except KeyboardInterrupt:
        print("vjepa: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
