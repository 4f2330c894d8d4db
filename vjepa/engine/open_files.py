"""Make sure that a rank may open enough files. Loader workers, sockets and checkpoints fail in odd places otherwise."""

import resource

from vjepa_data.settings import BadInput

FILES, FILES_PER_WORKER = 96, 32
"""Measured on a CPU: with one worker 36 open files are too few and 40 are enough. With 3 workers 40 are too few. The
rest is for devices and W&B."""

SOCKETS_PER_RANK = 4
"""A rank has a socket for each other rank in each gloo group. There are two groups, or three with offloading. Rank 0
serves the store with another socket per rank."""

AMPLE = 65536
"""The limit is not raised further, since some programs close every possible file when they start other programs."""


def allow_open_files(workers: int, *, ranks: int = 1) -> None:
    """Raise the soft limit of open files to the need of a rank, as far as the hard limit allows.

    Args:
        workers: loader workers of the rank.
        ranks: ranks of the run.

    Raises:
        BadInput: the hard limit is lower.
    """
    needed = FILES + FILES_PER_WORKER * workers + SOCKETS_PER_RANK * (ranks - 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    ample = max(needed, AMPLE)
    if soft == resource.RLIM_INFINITY or soft >= ample:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        others = f" and {ranks - 1} other ranks" if ranks > 1 else ""
        raise BadInput(
            f"a rank with {workers} loader workers{others} needs up to {needed} open files, and the limit is {hard}. "
            f"Run `ulimit -n {max(4096, needed)}` first, or add it to the profile's setup."
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (ample if hard == resource.RLIM_INFINITY else min(ample, hard), hard))
