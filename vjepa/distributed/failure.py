"""The end of a rank that failed: it writes the reason first, and never waits for other ranks.

The other ranks wait in a collective that this rank will not join. Leaving the group politely would wait for them in
turn (NCCL drains its kernels, a background save expects messages of all ranks) until every rank times out, and the
launcher would see the innocent ranks die first. So a rank that failed reports and exits. The launcher ends the other
ranks.

Never imports torch, so that the command line may use it for every verb.
"""

import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from vjepa_data.errors import BadInput

log = logging.getLogger(__name__)

GRACE_S = 10.0
"""Seconds for closing files, workers and W&B after a failure. Then the process ends, whatever it waits for."""

LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "NCCL")
"""Texts of errors that follow from the end of another rank."""


@contextlib.contextmanager
def reporting_failures(*, ranks: int, agreed: tuple[type[BaseException], ...] = ()) -> Iterator[None]:
    """Report an exception of this rank before anything else is closed, and bound the time until the process ends.

    Args:
        ranks: ranks of the group. A single rank waits for no other rank.
        agreed: exceptions that all ranks raise together, so that waiting for each other is safe.
    """
    try:
        yield
    except BaseException as error:
        if ranks > 1 and not isinstance(error, (*agreed, GeneratorExit)):
            report(error)
            deadline = threading.Timer(GRACE_S, os._exit, (code_of(error),))
            deadline.daemon = True
            deadline.start()
        raise


def report(error: BaseException) -> None:
    """Write the reason of a failure to the log, and to the file that the launcher reads."""
    if isinstance(error, BadInput):
        tell_launcher(str(error))  # the command line prints it
        return
    log.error("%s", "".join(traceback.format_exception(error)).rstrip())
    tell_launcher(f"{type(error).__name__}: {error}", is_consequence=is_consequence(error))


def tell_launcher(text: str, *, is_consequence: bool = False) -> None:
    """Give the launcher the reason of a failure. The first reason stays.

    The form is torchrun's, which prints it at the end of its own report on the ranks.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file and not os.path.exists(file):
        extra = {"py_callstack": text, "timestamp": str(int(time.time())), "is_consequence": is_consequence}
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps({"message": {"message": text, "extraInfo": extra}}))


def is_consequence(error: BaseException) -> bool:
    """Return whether an error of communication says that another rank has ended."""
    is_of_communication = isinstance(error, RuntimeError) and type(error).__module__.startswith(("torch", "builtins"))
    return is_of_communication and any(text in str(error) for text in LOST_PEER)


def code_of(error: BaseException) -> int:
    """Return the exit code of a process that an exception ends."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    return 2 if isinstance(error, BadInput) else 1


def is_in_group() -> bool:
    """Return whether this process still belongs to a group of several ranks."""
    dist = sys.modules.get("torch.distributed")
    return bool(dist and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)


def leave(code: int) -> NoReturn:
    """Exit at once: no destructor of a process group and no thread that waits for another rank may hold it up."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
