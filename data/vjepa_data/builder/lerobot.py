"""LeRobot folders, versions 2.0 to 3.0, as sources: an episode is a part of a video, and its rows are signals.

    v2.x   data/chunk-000/episode_000000.parquet     videos/chunk-000/CAMERA/episode_000000.mp4
    v3.0   data/chunk-000/file-000.parquet           videos/CAMERA/chunk-000/file-000.mp4      many episodes in a file
           meta/episodes/chunk-000/file-000.parquet  where the rows and frames of each episode are

The folder is read with pyarrow and json, without the package `lerobot`. A signal `action` of the spec is the column
`action`, and `state` is `state` or `observation.state`. Row `t` of an episode belongs to its frame `t`. Each episode is
a group, so its clips stay in the same split. An episode with bad rows is refused alone, and the others of its video
stay.

Source of the layout: huggingface/lerobot, `lerobot/datasets` (Apache-2.0).
"""

import functools
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float

from vjepa_data.builder.row_cache import cache_rows
from vjepa_data.errors import BadInput
from vjepa_data.media.video import Reason, Refused
from vjepa_data.signal_spec import SignalSpec

VERSIONS = ("v2.0", "v2.1", "v3.0")


@dataclass(frozen=True)
class Episode:
    """Locations of the frames and rows of an episode."""

    number: int
    length: int
    tasks: tuple[str, ...]
    video: Path
    start_s: float
    """Time of its first frame in the video."""

    data: Path
    first_row: int
    """Row of its first frame in the data file."""


@dataclass(frozen=True)
class LeRobotFolder:
    """An opened folder."""

    folder: Path
    fps: float
    camera: str
    episodes: tuple[Episode, ...]

    def first_frame(self, episode: Episode) -> int:
        """Return the number of an episode's first frame in its video."""
        return round(episode.start_s * self.fps)

    def end_s(self, episode: Episode) -> float:
        """Return the time of the end of an episode in its video."""
        return round(episode.start_s + episode.length / self.fps, 6)


def is_lerobot(folder: Path) -> bool:
    """Return whether a folder has the layout of LeRobot."""
    return (folder / "meta" / "info.json").is_file() and (folder / "data").is_dir()


def find_folder(video: Path) -> Path | None:
    """Return the LeRobot folder that holds a video, or None."""
    return next((parent for parent in video.parents if is_lerobot(parent)), None)


@functools.lru_cache(maxsize=8)
def open_folder(folder: Path, camera: str | None) -> LeRobotFolder:
    """Read the description of all episodes.

    Args:
        folder: the folder.
        camera: name of the camera, such as `observation.images.top`, or its last part. None stands for the only camera.

    Raises:
        BadInput: the version is unknown, the camera is missing or not a video, or a table cannot be read.
    """
    try:
        info = json.loads((folder / "meta" / "info.json").read_text())
        version, fps = str(info["codebase_version"]), float(info["fps"])
        features = info["features"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{folder}/meta/info.json cannot be read ({error}); copy the folder again") from None
    if version not in VERSIONS:
        raise BadInput(f"{folder} has version {version}, this reader knows {', '.join(VERSIONS)}; convert it first")
    key = _find_camera(folder, features, camera)
    try:
        read = _episodes_v3 if version == "v3.0" else _episodes_v2
        episodes = tuple(sorted(read(folder, info, key), key=lambda episode: episode.number))
    except (OSError, KeyError, ValueError, TypeError, pa.ArrowException) as error:
        raise BadInput(f"{folder}/meta does not list its episodes ({error}); copy the folder again") from None
    return LeRobotFolder(folder, fps, key, episodes)


def _find_camera(folder: Path, features: dict[str, Any], camera: str | None) -> str:
    videos = [name for name, feature in features.items() if feature.get("dtype") == "video"]
    images = [name for name, feature in features.items() if feature.get("dtype") == "image"]
    wanted = [name for name in videos if camera in (None, name, name.rpartition(".")[2])]
    if len(wanted) == 1:
        return wanted[0]
    stored = f"; {', '.join(images)} are images inside of tables, which are not read" if images else ""
    has = f"has the cameras {', '.join(videos) or 'none'}{stored}"
    asked = "several cameras" if camera is None and videos else f"no camera {camera!r}" if camera else "no video"
    raise BadInput(f"{folder}: {asked}; it {has}; set camera=NAME")


def _episodes_v2(folder: Path, info: dict[str, Any], key: str) -> Iterator[Episode]:
    size = int(info.get("chunks_size", 1000))
    for line in (folder / "meta" / "episodes.jsonl").read_text().splitlines():
        row = json.loads(line)
        number = int(row["episode_index"])
        place = {"episode_chunk": number // size, "episode_index": number, "video_key": key}
        yield Episode(
            number,
            int(row["length"]),
            tuple(row.get("tasks", ())),
            video=folder / info["video_path"].format(**place),
            start_s=0.0,
            data=folder / info["data_path"].format(**place),
            first_row=0,
        )


def _episodes_v3(folder: Path, info: dict[str, Any], key: str) -> Iterator[Episode]:
    rows: list[dict[str, Any]] = []
    for path in sorted((folder / "meta" / "episodes").rglob("*.parquet")):
        rows += pq.read_table(path).to_pylist()
    first_of_file: dict[tuple[int, int], int] = {}
    for row in rows:
        file = int(row["data/chunk_index"]), int(row["data/file_index"])
        first_of_file[file] = min(first_of_file.get(file, 1 << 62), int(row["dataset_from_index"]))
    for row in rows:
        file = int(row["data/chunk_index"]), int(row["data/file_index"])
        place = {
            "video_key": key,
            "chunk_index": int(row[f"videos/{key}/chunk_index"]),
            "file_index": int(row[f"videos/{key}/file_index"]),
        }
        yield Episode(
            int(row["episode_index"]),
            int(row["length"]),
            tuple(row.get("tasks") or ()),
            video=folder / info["video_path"].format(**place),
            start_s=float(row[f"videos/{key}/from_timestamp"]),
            data=folder / info["data_path"].format(chunk_index=file[0], file_index=file[1]),
            first_row=int(row["dataset_from_index"]) - first_of_file[file],
        )


def refusals(opened: LeRobotFolder, signals: Mapping[str, SignalSpec]) -> dict[int, Refused]:
    """Return why episodes cannot be used, by their number: their rows are bad, or two good episodes share frames.

    Args:
        opened: the folder.
        signals: the signals that are stored.
    """
    found = {}
    for episode in opened.episodes:
        try:
            for name, signal in signals.items():
                _read_rows(episode, name, opened.fps, columns=len(signal.columns))
        except Refused as refused:
            found[episode.number] = refused
    good = [episode for episode in opened.episodes if episode.number not in found]
    good.sort(key=lambda episode: (episode.video, opened.first_frame(episode)))
    for one, other in itertools.pairwise(good if signals else ()):
        first, start = opened.first_frame(one), opened.first_frame(other)
        if one.video == other.video and start < first + one.length:
            detail = (
                f"episodes {one.number} and {other.number} share frames of {one.video.name}: {first} to "
                f"{first + one.length - 1}, and {start} to {start + other.length - 1}"
            )
            found |= dict.fromkeys((one.number, other.number), Refused(Reason.BAD_SIGNAL, detail))
    return found


def write_rows(video: Path, name: str, camera: str | None, columns: int) -> Path:
    """Write the rows of a signal for all frames of a video to the user's cache, and return the file.

    Frames of episodes that are refused, or of none, get rows of zeros.

    Args:
        video: a video of a LeRobot folder.
        name: name of the signal.
        camera: camera of the spec.
        columns: number of columns of the signal.
    """
    return cache_rows("lerobot", name, (video, camera), _video_rows(video, name, camera, columns))


@functools.lru_cache(maxsize=4)
def _video_rows(video: Path, name: str, camera: str | None, columns: int) -> Float[np.ndarray, "F A"]:
    folder = find_folder(video)
    assert folder is not None, f"{video} is not in a LeRobot folder"
    opened = open_folder(folder, camera)
    own = [episode for episode in opened.episodes if episode.video == video]
    rows = np.zeros((max(opened.first_frame(e) + max(0, e.length) for e in own), columns), np.float32)
    for episode in own:
        first = opened.first_frame(episode)
        try:
            rows[first : first + episode.length] = _read_rows(episode, name, opened.fps, columns=columns)
        except Refused:  # as `refusals` says, and no clip is cut here
            continue
    return rows


@functools.lru_cache(maxsize=16)
def _read_table(path: Path, name: str) -> tuple[str, pa.Table]:
    """Return the column of a signal, and the table with it and the columns that place its rows."""
    try:
        have = pq.read_schema(path).names
        column = next((c for c in (name, f"observation.{name}") if c in have), None)
        if column is None:
            detail = f"{path.name}: no column {name} or observation.{name} among {', '.join(have)}"
            raise Refused(Reason.BAD_SIGNAL, detail)
        wanted = [column, *(c for c in ("episode_index", "timestamp") if c in have)]
        return column, pq.read_table(path, columns=wanted)
    except (OSError, pa.ArrowException) as error:
        raise Refused(Reason.BAD_SIGNAL, f"{path.name}: {str(error).splitlines()[0]}") from None


def _read_rows(episode: Episode, name: str, fps: float, *, columns: int) -> Float[np.ndarray, "F A"]:
    """Return the rows of an episode.

    Raises:
        Refused: the column is missing, rows and frames differ in number or by more than half a frame, or a row does not
            have `columns` finite numbers.
    """

    def bad(detail: str) -> Refused:
        return Refused(Reason.BAD_SIGNAL, f"{episode.data.name}: {detail}")

    column, table = _read_table(episode.data, name)
    part = table.slice(episode.first_row, max(0, episode.length))
    if len(part) != episode.length:
        raise bad(f"{len(part)} rows for {episode.length} frames of episode {episode.number}")
    if "episode_index" in table.column_names and set(part["episode_index"].to_pylist()) != {episode.number}:
        raise bad(f"rows of episode {episode.number} belong to other episodes")
    if "timestamp" in table.column_names:
        _check_times(part["timestamp"], episode, fps, bad)
    try:
        rows = np.array(part[column].to_pylist(), dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise bad(f"column {column} of episode {episode.number} has no numbers ({error})") from None
    rows = rows.reshape(episode.length, -1)
    if rows.shape[1] != columns:
        raise bad(f"column {column} of episode {episode.number} has {rows.shape[1]} numbers, the spec has {columns}")
    missing = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(missing):
        count = f"{len(missing)} such rows" if len(missing) > 1 else "no other such row"
        raise bad(f"row {missing[0]} of {column} of episode {episode.number} is not finite ({count})")
    return rows


def _check_times(times: pa.ChunkedArray, episode: Episode, fps: float, bad: Callable[[str], Refused]) -> None:
    """Check that each row of an episode is within half a frame of its frame."""
    try:
        seconds = np.array(times.to_pylist(), dtype=np.float64).reshape(episode.length)
    except (TypeError, ValueError) as error:
        raise bad(f"timestamps of episode {episode.number} are not seconds ({error})") from None
    apart = np.abs(seconds - np.arange(episode.length) / fps)
    late = np.flatnonzero(~(apart <= 0.5 / fps))
    if len(late):
        raise bad(f"row {late[0]} of episode {episode.number} is {apart[late[0]]:.3f} s from its frame at {fps:g} fps")
