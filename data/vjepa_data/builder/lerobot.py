"""LeRobot folders, versions 2.0 to 3.0, as sources: an episode is a part of a video, and its rows are signals.

    v2.x   data/chunk-000/episode_000000.parquet     videos/chunk-000/CAMERA/episode_000000.mp4
    v3.0   data/chunk-000/file-000.parquet           videos/CAMERA/chunk-000/file-000.mp4      many episodes in a file
           meta/episodes/chunk-000/file-000.parquet  where the rows and frames of each episode are

The folder is read with pyarrow and json, without the package `lerobot`. A signal `action` of the spec is the column
`action`, and `state` is `state` or `observation.state`. Row `t` of an episode belongs to its frame `t`. Each episode is
a group, so its clips stay in the same split.

Source of the layout: huggingface/lerobot, `lerobot/datasets` (Apache-2.0).
"""

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vjepa_data.builder.row_cache import cache_rows
from vjepa_data.errors import BadInput
from vjepa_data.media.video import Reason, Refused

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


def write_rows(video: Path, name: str, camera: str | None) -> Path:
    """Write the rows of a signal for all frames of a video to the user's cache, and return the file.

    Args:
        video: a video of a LeRobot folder.
        name: name of the signal.
        camera: camera of the spec.

    Raises:
        Refused: the column is missing, times and frames differ by more than half a frame, or episodes overlap.
    """
    folder = find_folder(video)
    assert folder is not None, f"{video} is not in a LeRobot folder"
    opened = open_folder(folder, camera)
    own = sorted((e for e in opened.episodes if e.video == video), key=lambda episode: episode.start_s)
    parts, frames = [], 0
    for episode in own:
        first = round(episode.start_s * opened.fps)
        if first < frames:
            detail = f"episode {episode.number} begins at frame {first} of {video.name}, expected {frames} or later"
            raise Refused(Reason.BAD_SIGNAL, detail)
        rows = _read_rows(episode, name, opened.fps)
        parts += [np.zeros((first - frames, rows.shape[1]), rows.dtype), rows]  # frames of no episode come before it
        frames = first + episode.length
    return cache_rows("lerobot", (video, name, camera), np.concatenate(parts))


def _read_rows(episode: Episode, name: str, fps: float) -> np.ndarray:
    """Return the rows of an episode, [length, columns]."""
    try:
        table = pq.read_table(episode.data)
    except (OSError, pa.ArrowException) as error:
        raise Refused(Reason.BAD_SIGNAL, f"{episode.data.name}: {str(error).splitlines()[0]}") from None
    column = next((c for c in (name, f"observation.{name}") if c in table.column_names), None)
    if column is None:
        have = ", ".join(table.column_names)
        raise Refused(Reason.BAD_SIGNAL, f"{episode.data.name}: no column {name} or observation.{name} among {have}")
    part = table.slice(episode.first_row, episode.length)
    if len(part) != episode.length:
        detail = f"{len(part)} rows for {episode.length} frames of episode {episode.number}"
        raise Refused(Reason.BAD_SIGNAL, f"{episode.data.name}: {detail}")
    if "episode_index" in table.column_names and set(part["episode_index"].to_pylist()) != {episode.number}:
        raise Refused(
            Reason.BAD_SIGNAL, f"{episode.data.name}: rows of episode {episode.number} belong to other episodes"
        )
    if "timestamp" in table.column_names:
        apart = np.abs(part["timestamp"].to_numpy() - np.arange(episode.length) / fps)
        if not (apart <= 0.5 / fps).all():
            late = int(np.argmax(~(apart <= 0.5 / fps)))
            detail = f"row {late} of episode {episode.number} is {apart[late]:.3f} s from its frame at {fps:g} fps"
            raise Refused(Reason.BAD_SIGNAL, f"{episode.data.name}: {detail}")
    try:
        rows = np.array(part[column].to_pylist(), dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise Refused(Reason.BAD_SIGNAL, f"{episode.data.name}: column {column} has no numbers ({error})") from None
    return rows.reshape(episode.length, -1)
