"""Give run folders with unusual names a path that SLURM, submitit and PYTHONPATH can take.

`:` separates the entries of PYTHONPATH, `%` and `\\` start patterns in the output paths of SLURM and submitit, and a
line of a batch script has neither line breaks nor bytes that are not UTF-8. A folder with such a path is reached
through a symbolic link.
"""

import hashlib
import os
from pathlib import Path

from vjepa_launch.settings import BadLaunch

LINK = ".vjepa-"
"""Start of the name of a link."""

UNUSABLE = ":%\\\n\r"


def is_plain(path: Path) -> bool:
    """Return whether a path can be used as it is."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return not set(UNUSABLE) & set(str(path))


def is_link_to_run(path: Path) -> bool:
    """Return whether a path is a link that `plain_path` has made, or lies below one."""
    return any(part.startswith(LINK) for part in path.parts)


def plain_path(folder: Path, *, create: bool) -> Path:
    """Return the folder itself, or the path of a link to it in the nearest folder with a plain path.

    Args:
        folder: absolute path.
        create: create the link if it is missing.

    Raises:
        BadLaunch: the link cannot be created.
    """
    if is_plain(folder):
        return folder
    home = next(parent for parent in folder.parents if is_plain(parent))
    link = home / f"{LINK}{hashlib.sha256(os.fsencode(folder)).hexdigest()[:12]}"
    if create and not link.is_symlink():
        try:
            link.symlink_to(folder.relative_to(home))
        except OSError as error:
            raise BadLaunch(
                f"the path of {str(folder)!r} has characters that SLURM or PYTHONPATH cannot take, and a link to it "
                f"cannot be created in {home} ({error.strerror}). Choose a run folder without : % \\ in its path."
            ) from None
    return link
