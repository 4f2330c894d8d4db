"""The command line: `vjepa VERB THING [--options] [name=value ...]`.

Each kind of user has a file of verbs: `datasets` for dataset builders, `runs` for people who train, `models`,
`evals` and `planning` for users of trained models. `app` declares verbs and reads command lines. To add a verb, add a
function to any of these files, or a file of its own to `VERB_FILES`.

Each verb imports heavy modules only when it is called, so `vjepa show` answers at once and `vjepa launch` works on a
login node. Exit codes: 0 done, 1 failed, 2 bad settings or input, 75 saved and stopped (requeue to resume).
"""

import errno
import importlib
import io
import logging
import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence

from vjepa.cli.app import APP, CommandLineError, read_command
from vjepa.distributed import failure

VERB_FILES = ("runs", "datasets", "models", "evals", "planning")
"""Modules of this package that declare verbs, in the order of `vjepa --help`."""

LITTLE_BYTES = 1 << 20
"""A disk with less free space counts as full."""

DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REMEDIES = {
    **dict.fromkeys(DISK_IS_FULL, "make room, then run the command again"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "choose another path, or ask for write permission"),
    **dict.fromkeys((errno.ENOTDIR, errno.ENAMETOOLONG), "choose another path"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit with `ulimit -n 4096`"),
}
"""Errors of the file system that a user can fix, and how."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb and return its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # file names that are not UTF-8 are printed as they are
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        os.getcwd()
    except FileNotFoundError:
        print("vjepa: the working folder does not exist any more; change to another folder", file=sys.stderr)
        return 2
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
        code = _run_verb(prog, run, words)
    except Exception as error:
        failure.tell_launcher(f"{type(error).__name__}: {error}", is_consequence=failure.is_consequence(error))
        if not failure.is_in_group():
            raise
        traceback.print_exc()
        code = 1
    if failure.is_in_group():
        failure.leave(code)  # a rank that failed: other ranks may wait for it
    return code


def _run_verb(prog: str, run: Callable[[], int | None], words: Sequence[str]) -> int:
    """Run a verb, and turn errors that a user can fix into a line and an exit code."""
    try:
        code = run() or 0
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except user_errors() as error:
        print(f"{prog}: {error}", file=sys.stderr)
        failure.tell_launcher(f"{prog}: {error}")
        return 2
    except BrokenPipeError:  # the reader of our output is gone: `vjepa show demo | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        place = error.filename or (full_disk(words) if error.errno in DISK_IS_FULL else "")
        where = f"{place}: " if place else ""
        text = f"{prog}: {where}{error.strerror}; {REMEDIES[error.errno]}"
        print(text, file=sys.stderr)
        failure.tell_launcher(text)
        return 1 if error.errno in DISK_IS_FULL else 2


def full_disk(words: Sequence[str]) -> str:
    """Return the mount point of a full disk that a command line names, or an empty string.

    A failed write does not tell which file it was meant for.
    """
    named = [word.partition("=")[2] or word for word in words if not word.startswith("-")]
    for place in map(os.path.realpath, [*named, os.curdir, tempfile.gettempdir(), os.path.expanduser("~")]):
        if os.path.exists(place) and shutil.disk_usage(place).free < LITTLE_BYTES:
            while not os.path.ismount(place):
                place = os.path.dirname(place)
            return place
    return ""


def user_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions that mean bad settings or input. Imported late: both packages load pydantic."""
    from vjepa_data.errors import BadInput
    from vjepa_launch.settings import BadLaunch

    return BadInput, BadLaunch
