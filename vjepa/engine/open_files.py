"""Make sure that a rank may open enough files. Loader workers, sockets and checkpoints fail in odd places otherwise."""

import resource

from vjepa_data.settings import BadInput

FILES, FILES_PER_WORKER = 96, 32
"""Measured on a CPU: 36 open files are too few with one worker and 40 are enough; 40 are too few with 3 workers. The
rest is for devices and W&B."""

SOCKETS_PER_RANK = 4
"""A rank has a socket for each other rank in each gloo group, of which there are two, or three with offloading, and
rank 0 one more for its store."""

AMPLE = 65536
"""More is not asked for, since some programs close every possible file, one after the other, when they start others."""


def allow_open_files(workers: int, *, ranks: int = 1) -> None:
    """Raise the soft limit of open files to what a rank may need, as far as the hard limit allows.

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
            f"a rank with {workers} loader workers{others} needs up to {needed} open files, and the limit is {hard}; "
            f"run `ulimit -n {max(4096, needed)}` first, or add it to the profile's setup"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (ample if hard == resource.RLIM_INFINITY else min(ample, hard), hard))
