"""Run `vjepa VERB ...`, or `python -m vjepa VERB ...` under torchrun and from a frozen copy of the code."""

import io
import os
import signal
import sys

from vjepa.threads import configure_threads


def main() -> int:
    """Run one verb. Ctrl-C prints a single line, even while modules are imported."""
    try:
        for stream in (sys.stdout, sys.stderr):  # paths may hold bytes that are not UTF-8
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="surrogateescape")
        configure_threads()
        os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # spares a search of all installed packages
        hide_leaks_of_killed_processes()
        from vjepa.cli import main

        return main()
    except KeyboardInterrupt:
        print("vjepa: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


def hide_leaks_of_killed_processes() -> None:
    """Keep Python's resource tracker, a child process, from reporting semaphores of loader workers after a kill -9.

    It removes them, so that there is nothing for a user to do.
    """
    given = os.environ.get("PYTHONWARNINGS", "")
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [given, "ignore:resource_tracker:UserWarning"]))


if __name__ == "__main__":
    sys.exit(main())
