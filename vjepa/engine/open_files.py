"""Make sure that a rank may open enough files. Loader workers, sockets and checkpoints fail in odd places otherwise."""

import resource

from vjepa_data.settings import BadInput

FILES, FILES_PER_WORKER = 96, 32
"""Measured on a CPU: 36 open files are too few with one worker and 40 are enough; 40 are too few with 3 workers. The
rest is for devices, sockets of other ranks and W&B."""


def allow_open_files(workers: int) -> None:
    """Raise the soft limit of open files to what a rank needs.

    Args:
        workers: loader workers of the rank.

    Raises:
        BadInput: the hard limit is lower.
    """
    needed = FILES + FILES_PER_WORKER * workers
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise BadInput(
            f"a rank with {workers} loader workers needs up to {needed} open files, and the limit is {hard}; run "
            f"`ulimit -n 4096` first, or add it to the profile's setup"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
