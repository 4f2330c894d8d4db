"""Run `vjepa VERB ...`, or `python -m vjepa VERB ...` under torchrun and from a frozen copy of the code."""

import io
import os
import signal
import sys

from vjepa.threads import configure_threads


def main() -> int:
    """Run one verb. Ctrl-C prints one line, also while modules are imported."""
    try:
        for stream in (sys.stdout, sys.stderr):  # paths may hold bytes that are not UTF-8
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="surrogateescape")
        configure_threads()
        os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # spares a search of all installed packages
        from vjepa.cli import main

        return main()
    except KeyboardInterrupt:
        print("vjepa: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
