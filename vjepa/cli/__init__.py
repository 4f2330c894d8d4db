"""The command line: `vjepa VERB THING [--options] [name=value ...]`.

Each kind of user has a file of verbs: `datasets` for dataset builders, `runs` for people who train, `models` and
`evals` for users of trained models. `app` declares verbs and reads command lines. To add a verb, add a function to any
of these files, or a file of its own to `VERB_FILES`.

Each verb imports heavy modules only when it is called, so `vjepa show` answers at once and `vjepa launch` works on a
login node. Exit codes: 0 done, 1 failed, 2 bad settings or input, 75 saved and stopped; requeue to resume.
"""

import errno
import importlib
import logging
import os
import signal
import sys
from collections.abc import Sequence

from vjepa.cli.app import APP, CommandLineError, read_command

VERB_FILES = ("runs", "datasets", "models", "evals")
"""Modules of this package that declare verbs, in the order of `vjepa --help`."""

DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REMEDIES = {
    **dict.fromkeys(DISK_IS_FULL, "make room, then run the command again"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "choose another path, or ask for write permission"),
    **dict.fromkeys((errno.ENOTDIR, errno.ENAMETOOLONG), "choose another path"),
}
"""Errors of the file system that a user can fix, and how."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    for name in VERB_FILES:
        importlib.import_module(f"vjepa.cli.{name}")
        if words and words[0] in APP and not words[0].startswith("-"):
            break  # the other files need not be loaded
    try:
        prog, run = read_command(words)
    except CommandLineError as error:
        print(error, file=sys.stderr)
        return 2
    if run is None:
        from rich.console import Console

        APP.help_print(words, console=Console(stderr=True))
        return 2
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S"
    )
    try:
        code = run() or 0
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except user_errors() as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output is gone: `vjepa show demo | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"{prog}: {where}{error.strerror}; {REMEDIES[error.errno]}", file=sys.stderr)
        return 1 if error.errno in DISK_IS_FULL else 2


def user_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions that mean bad settings or input. Imported late: both packages load pydantic."""
    from vjepa_data.errors import BadInput
    from vjepa_launch.settings import BadLaunch

    return BadInput, BadLaunch
