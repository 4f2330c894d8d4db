"""Work that is done in part files, so that it can be shared among ranks and continued after an interruption."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy import ndarray

from vjepa.atomic import new_file
from vjepa.distributed.world import World
from vjepa.progress import progress

PART_VIDEOS = 64  # at most so many videos are repeated after an interruption

Advance = Callable[[int], None]


def write_parts(
    world: World, folder: Path, count: int, suffix: str, write: Callable[[range, Path, Advance], None], *, text: str
) -> list[Path]:
    """Write a file for every 64 videos, shared among the ranks. Files that exist are kept.

    Args:
        world: all ranks. Each writes every `world.size`-th file.
        folder: where the files are, which all ranks can read.
        count: number of videos.
        suffix: of the file names.
        write: writes the part of some videos to a path, and calls its third argument with the number of videos done.
        text: the work, for the progress bar.

    Returns:
        All files, in the order of the videos. They exist when the function returns.
    """
    starts = range(0, count, PART_VIDEOS)
    files = {start: folder / f"{start:09d}{suffix}" for start in starts}
    missing = [start for start in starts[world.rank :: world.size] if not files[start].exists()]
    videos = {start: range(start, min(count, start + PART_VIDEOS)) for start in missing}
    with progress(text, sum(map(len, videos.values())), show=world.is_first) as bar:
        for start in missing:
            with new_file(files[start], overwrite=True) as partial:
                write(videos[start], partial, bar.advance)
    world.gather(None)
    return list(files.values())


def write_arrays(file: Path, parts: Mapping[str, Sequence[ndarray]]) -> None:
    """Write a part file of arrays: the parts of each name, one after another. Names without parts are left out."""
    with file.open("wb") as sink:
        np.savez(sink, **{name: np.concatenate(part) for name, part in parts.items() if part})  # pyright: ignore[reportArgumentType]


def read_arrays(files: Iterable[Path]) -> dict[str, ndarray]:
    """Read part files of arrays, and join the arrays of each name in the order of the files."""
    parts: dict[str, list[ndarray]] = {}
    for file in files:
        with np.load(file) as arrays:
            for name in arrays.files:
                parts.setdefault(name, []).append(arrays[name])
    return {name: np.concatenate(part) for name, part in parts.items()}
