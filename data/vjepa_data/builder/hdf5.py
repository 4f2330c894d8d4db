"""Episodes in HDF5 files as sources: DROID, robomimic and Minari.

    DROID       EPISODE/trajectory.h5, EPISODE/recordings/MP4/SERIAL.mp4, EPISODE/metadata_*.json
    robomimic   FILE.hdf5: data/demo_0/{actions, obs/CAMERA_image, ...}, mask/{train, valid}
    Minari      FOLDER/data/main_data.hdf5: episode_0/{actions, observations, ...}, one observation more than actions

A signal is the dataset of its name, or the datasets of its `source`. Row `t` belongs to frame `t`. Each episode is a
group, so its clips stay in the same split. Pictures inside a file are read by `vjepa_data.media.hdf5_frames`.

Sources of the layouts: droid-dataset/droid (`trajectory_utils`), ARISE-Initiative/robomimic (`docs/datasets`),
Farama-Foundation/Minari (`storages/hdf5_storage.py`).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vjepa_data.builder.row_cache import cache_rows
from vjepa_data.builder.source import InputFile
from vjepa_data.errors import BadInput
from vjepa_data.media.fetch import FileRef
from vjepa_data.media.hdf5_frames import open_hdf5
from vjepa_data.media.video import Reason, Refused
from vjepa_data.signal_spec import SignalSpec
from vjepa_data.spec import Spec

SUFFIXES = (".hdf5", ".h5")
TRAJECTORY = "trajectory.h5"
ROOTS = (("data", "demo_"), ("", "episode_"))
"""Group and prefix of the episodes of robomimic and of Minari."""


def episodes(path: Path, name: str, spec: Spec) -> Iterator[InputFile]:
    """Yield the episodes of an HDF5 file.

    Args:
        path, name: location and permanent name of the file.
        spec: names the camera, and the rate of pictures that do not state it.

    Raises:
        BadInput: the file cannot be read, has another layout, or the camera is missing.
    """
    if path.name == TRAJECTORY:
        yield _droid_episode(path, name, spec)
        return
    try:
        with open_hdf5(str(path)) as file:
            root, prefix = next(
                ((r, p) for r, p in ROOTS if any(k.startswith(p) for k in (file.get(r or "/") or ()))), (None, "")
            )
            if root is None:
                raise BadInput(
                    f"{path} has neither data/demo_0 (robomimic) nor episode_0 (Minari), only "
                    f"{', '.join(list(file)[:6]) or 'nothing'}. Convert it, for example to a LeRobot folder."
                )
            splits = _splits(file)
            rate = spec.frames_hz or _frames_hz(file, path)
            keys = [key for key in file[root or "/"] if key.startswith(prefix)]
            for key in sorted(keys, key=lambda key: (len(key), key)):
                group = f"{root}/{key}".lstrip("/")
                camera = _find_camera(file[group], f"{path}: {group}", spec.camera)
                yield InputFile(
                    name=f"{name}/{group}/{camera}",
                    file=FileRef(str(path), column=f"{group}/{camera}", frames_hz=rate),
                    labels={"episode": key} | _task(file[group]),
                    group=f"{name}/{key}",
                    split=splits.get(key),
                )
    except (OSError, RuntimeError) as error:
        raise BadInput(f"{path} cannot be read ({str(error).splitlines()[0]}); copy it again") from None


def _splits(file: Any) -> dict[str, str]:
    """Return the split of each episode that robomimic's masks name."""
    found = {}
    for mask, split in (("valid", "val"), ("train", "train")):
        for value in file[f"mask/{mask}"][:].tolist() if f"mask/{mask}" in file else ():
            found.setdefault(value.decode() if isinstance(value, bytes) else str(value), split)
    return found


def _frames_hz(file: Any, path: Path) -> float:
    """Return the rate that robomimic's or Minari's description of the environment states."""
    attributes = dict(file["data"].attrs) if "data" in file else dict(file.attrs)
    beside = path.with_name("metadata.json")
    try:
        facts = json.loads(attributes.get("env_args", "{}"))
        facts |= json.loads(beside.read_text()) if beside.is_file() else {}
        spec = facts.get("env_spec", {})
        kwargs = facts.get("env_kwargs", {}) | (json.loads(spec) if isinstance(spec, str) else spec).get("kwargs", {})
        rates = [kwargs.get("control_freq"), kwargs.get("render_fps"), facts.get("render_fps")]
        rate = next((float(rate) for rate in rates if rate), None)
    except (ValueError, TypeError, AttributeError):
        rate = None
    if rate is None:
        raise BadInput(f"{path} does not state the rate of its frames; set frames_hz=RATE")
    return rate


def _task(group: Any) -> dict[str, str]:
    task = group.attrs.get("task", group.attrs.get("language_instruction"))
    return {} if task is None else {"task": task.decode() if isinstance(task, bytes) else str(task)}


def _datasets(group: Any) -> dict[str, Any]:
    """Return all datasets below a group, by path."""
    found: dict[str, Any] = {}
    group.visititems(lambda name, item: found.update({name: item}) if hasattr(item, "dtype") else None)
    return found


def _find_camera(group: Any, place: str, camera: str | None) -> str:
    """Return the path of the frames in an episode."""
    found = _datasets(group)
    cameras = [name for name, item in found.items() if _is_frames(item) and not name.startswith("next_obs/")]
    wanted = [
        name
        for name in cameras
        if camera is None or camera in (name, name.rpartition("/")[2], name.rpartition("/")[2].removesuffix("_image"))
    ]
    if len(wanted) == 1:
        return wanted[0]
    problem = "no frames" if not cameras else "several cameras" if camera is None else f"no camera {camera!r}"
    have = f"it has the cameras {', '.join(cameras)}" if cameras else f"it has {', '.join(found) or 'nothing'}"
    remedy = "set camera=NAME" if cameras else "record the dataset with pictures"
    raise BadInput(f"{place}: {problem}; {have}; {remedy}")


def _is_frames(item: Any) -> bool:
    is_pictures = item.ndim == 4 and item.dtype == np.uint8 and item.shape[3] == 3
    is_compressed = item.ndim == 2 and item.dtype == np.uint8 and bytes(item[0, :2]) in (b"\xff\xd8", b"\x89P")
    return is_pictures or (is_compressed if item.ndim == 2 and len(item) else False)


def _droid_episode(path: Path, name: str, spec: Spec) -> InputFile:
    """Return a trajectory of DROID. A camera is a serial number, or `ext1`, `ext2` or `wrist` of its metadata."""
    folder = path.parent
    facts: dict[str, Any] = {}
    for file in sorted(folder.glob("metadata_*.json")):
        try:
            facts |= json.loads(file.read_text())
        except ValueError as error:
            raise BadInput(f"{file} cannot be read ({error}); copy the episode again") from None
    videos = {p.stem: p for p in sorted((folder / "recordings" / "MP4").glob("*.mp4")) if "-stereo" not in p.stem}
    wanted = spec.camera and str(facts.get(f"{spec.camera}_cam_serial", spec.camera))
    serials = [serial for serial in videos if wanted in (None, serial)]
    below = name.removesuffix(TRAJECTORY)
    if len(serials) != 1:
        problem = "several cameras" if spec.camera is None and videos else f"no camera {spec.camera or ''}".rstrip()
        have = ", ".join(videos) or "none"
        if spec.camera is None:
            raise BadInput(f"{folder}: {problem}; it has the cameras {have}; set camera=NAME, such as ext1")
        detail = f"{problem}; it has the cameras {have}"
        return InputFile(name, FileRef(str(path)), refused=(Reason.MISSING, detail))
    labels = {"episode": str(facts.get("uuid", folder.name))}
    labels |= {"task": str(facts["current_task"])} if "current_task" in facts else {}
    video = videos[serials[0]]
    return InputFile(f"{below}recordings/MP4/{video.name}", FileRef(str(video)), labels, group=below or folder.name)


def holds_rows(place: FileRef) -> bool:
    """Return whether the signals of a video are read from an HDF5 file."""
    return place.frames_hz is not None or _trajectory(place) is not None


def _trajectory(place: FileRef) -> Path | None:
    """Return the `trajectory.h5` of the DROID episode that a video belongs to."""
    if place.is_remote or not place.is_whole:
        return None
    parents = Path(place.path).parents
    file = parents[2] / TRAJECTORY if len(parents) > 2 else None
    return file if file is not None and file.is_file() else None


def _episode_of(place: FileRef) -> tuple[Path, str]:
    """Return the file and the group of an episode."""
    file = _trajectory(place)
    if file is not None:
        return file, "/"
    assert place.column is not None
    parts = place.column.split("/")
    return Path(place.path), "/".join(parts[: 2 if parts[0] == "data" else 1])


def write_rows(place: FileRef, name: str, signal: SignalSpec) -> Path:
    """Write the rows of a signal of an episode to the user's cache, and return the file.

    Raises:
        Refused: a dataset is missing or ambiguous, or holds no rows of numbers.
    """
    path, group = _episode_of(place)
    try:
        with open_hdf5(str(path)) as file:
            found = _datasets(file[group])
            names = signal.source or (_find_dataset(found, name),)
            if missing := [each for each in names if each not in found]:
                raise Refused(Reason.BAD_SIGNAL, f"no dataset {missing[0]} in {group}; it has {', '.join(found)}")
            parts = [np.asarray(found[each][:]) for each in names]
    except (OSError, KeyError, RuntimeError) as error:
        raise Refused(Reason.BAD_SIGNAL, f"{path.name}: {str(error).splitlines()[0]}") from None
    lengths = {len(part) if part.ndim else 0 for part in parts}
    if len(lengths) > 1 or any(part.dtype.kind not in "iufb" for part in parts):
        kinds = ", ".join(f"{each}: {part.dtype} {list(part.shape)}" for each, part in zip(names, parts, strict=True))
        raise Refused(Reason.BAD_SIGNAL, f"{path.name}: rows of numbers of equal length are expected, found {kinds}")
    with np.errstate(over="ignore"):
        rows = np.concatenate([part.reshape(len(part), -1).astype(np.float32) for part in parts], axis=1)
    return cache_rows("hdf5", name, (path, group, signal.source), rows)


def _find_dataset(found: dict[str, Any], name: str) -> str:
    """Return the dataset of a signal without `source`: NAME or NAMEs of the episode, else the only match below."""
    own = [each for each in (name, f"{name}s") if each in found]
    deeper = [
        each for each in found if each.rpartition("/")[2] in (name, f"{name}s") and not each.startswith("next_obs/")
    ]
    if own or len(deeper) == 1:
        return (own or deeper)[0]
    if name == "state" and "observations" in found:
        return "observations"
    problem = "several datasets" if deeper else "no dataset"
    have = ", ".join(deeper or found)
    raise Refused(Reason.BAD_SIGNAL, f"{problem} {name}; choose from {have} with signals.{name}.source")


def check_times(place: FileRef, *, rate_hz: float) -> None:
    """Check that the rows of an episode are at most half a row from a clock of this rate.

    The times are a dataset `timestamp` or `timestamps` in seconds, or `observation/timestamp/control/step_start` of
    DROID in milliseconds. Without such a dataset nothing is checked.

    Raises:
        Refused: a row is further away.
    """
    if not holds_rows(place):
        return
    path, group = _episode_of(place)
    with open_hdf5(str(path)) as file:
        found = _datasets(file[group])
        scales = (("timestamp", 1.0), ("timestamps", 1.0), ("observation/timestamp/control/step_start", 1e-3))
        known = next(((name, scale) for name, scale in scales if name in found), None)
        if known is None:
            return
        times = np.asarray(found[known[0]][:], dtype=np.float64).reshape(-1) * known[1]
    apart = np.abs(times - times[0] - np.arange(len(times)) / rate_hz)
    if not (apart <= 0.5 / rate_hz).all():
        row = int(np.argmax(~(apart <= 0.5 / rate_hz)))
        detail = f"{path.name}: row {row} is {apart[row]:.3f} s from its frame at {rate_hz:g} Hz"
        raise Refused(Reason.BAD_SIGNAL, detail)
