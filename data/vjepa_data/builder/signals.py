"""Read signals and texts from the sidecar files of a video, check them, and cut them to clips.

    films/a.mp4            the video
    films/a.actions.npy    [rows, columns], or a.actions.csv with the columns' names in its first line
    films/a.caption.txt    UTF-8

The build spec declares them (`signals`, `texts`), and every source must then have them. A source with a bad sidecar is
refused with a reason. Rows are stored on the clock of their clip, as float32. Rows of a signal without `rate_hz` belong
to the frames of the source in order, which assumes a constant frame rate.
"""

import hashlib
import io
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from vjepa_data.builder import hdf5, lerobot
from vjepa_data.media.fetch import FileRef
from vjepa_data.media.tasks import StoredSample
from vjepa_data.media.video import Reason, Refused, VideoInfo
from vjepa_data.poses import pose_differences
from vjepa_data.signal_spec import SNAP_ROWS, SignalSpec, member_of_signal, member_of_text, stored
from vjepa_data.spec import Spec

MAX_SIGNAL_BYTES = 256 << 20
"""Largest sidecar of a signal. An hour of 20 columns at 400 Hz has 115 MB as float32."""

MAX_TEXT_BYTES = 1 << 20
"""Largest sidecar of a text."""


@dataclass(frozen=True)
class SidecarParts:
    """The signals and texts of a clip."""

    members: dict[str, bytes] = field(default_factory=dict)
    """Contents of each tar member, by suffix."""

    facts: dict[str, Any] = field(default_factory=dict)
    """Additions to the sample's JSON: rows and clock of each signal."""

    derived: dict[str, np.ndarray] = field(default_factory=dict)
    """Rows of derived signals, which are measured and not stored."""


def check_sidecars(place: FileRef, info: VideoInfo, spec: Spec) -> dict[str, Any]:
    """Check the signals and texts of a source.

    Args:
        place: where the video is.
        info: its length and rate.
        spec: says which signals and texts it must have.

    Returns:
        Additions to the description of the source: rate and sha256 of each signal, sha256 of each text.

    Raises:
        Refused: a sidecar is missing, too large, malformed, not finite, or does not cover the video.
    """
    signals, texts = {}, {}
    for name, signal in stored(spec.signals).items():
        path = _sidecar(place, name, ("npy", "csv"), spec)
        rows = read_rows(path, signal)
        rate_hz = signal.rate_hz or info.fps
        _check_cover(path.name, signal, info, rows=len(rows), rate_hz=rate_hz)
        hdf5.check_times(place, rate_hz=rate_hz)
        signals[name] = {"rate_hz": rate_hz, "sha256": _sha256(path)}
    for name in spec.texts:
        path = _sidecar(place, name, ("txt",), spec)
        read_text(path)
        texts[name] = {"sha256": _sha256(path)}
    return ({"signals": signals} if signals else {}) | ({"texts": texts} if texts else {})


def _check_cover(name: str, signal: SignalSpec, info: VideoInfo, *, rows: int, rate_hz: float) -> None:
    """Refuse rows that end more than half a row before the video, or that outnumber its frames."""
    frames = info.frames or round(info.duration_s * info.fps)
    end_s = info.duration_s
    if signal.kind == "action":  # no action follows the last frame
        end_s -= 1 / info.fps
    needed = end_s * rate_hz
    if rows < needed - 0.5:
        detail = f"{rows} rows at {rate_hz:g} Hz end after {rows / rate_hz:.3f} s, the video needs {end_s:.3f} s"
        raise Refused(Reason.BAD_SIGNAL, f"{name}: {detail}")
    if signal.rate_hz is None and rows > frames:
        raise Refused(Reason.BAD_SIGNAL, f"{name}: {rows} rows for {frames} frames")


def with_sidecars(
    answer: StoredSample | Refused, place: FileRef, spec: Spec, *, original: str, start_s: float | None, seconds: float
) -> tuple[StoredSample | Refused, SidecarParts]:
    """Add the signals and texts to an encoded clip. A sidecar that has become bad refuses the clip.

    Args:
        answer: the encoded clip.
        place: where the video is.
        spec: says which signals and texts a clip has.
        original: JSON description of the source, with the result of `check_sidecars`.
        start_s, seconds: the time span of the clip in the source.
    """
    if isinstance(answer, Refused) or not (spec.signals or spec.texts):
        return answer, SidecarParts()
    try:
        stored_fps = answer.clip.stored.fps
        return answer, clip_parts(
            place, spec, json.loads(original), begin_s=start_s or 0.0, seconds=seconds, stored_fps=stored_fps
        )
    except Refused as refusal:
        return refusal, SidecarParts()


def clip_parts(
    place: FileRef, spec: Spec, known: dict[str, Any], *, begin_s: float, seconds: float, stored_fps: float
) -> SidecarParts:
    """Cut the signals of a source to the time span of a clip.

    The first frame of a clip is the source frame that begins at or before `begin_s`, with a quarter of a stored frame
    of slack (`media.transcode`). Rows that belong to frames are counted from that frame.

    Raises:
        Refused: a sidecar changed since the plan was made, or has no row in the span.
    """
    members, clocks, derived = {}, {}, {}
    for name, signal in sorted(stored(spec.signals).items()):
        path = _sidecar(place, name, ("npy", "csv"), spec)
        _check_unchanged(path, known["signals"][name]["sha256"])
        rows, rate_hz = read_rows(path, signal), known["signals"][name]["rate_hz"]
        zero_s = begin_s
        if signal.rate_hz is None:
            zero_s = math.floor(begin_s * rate_hz + 0.25 * rate_hz / stored_fps + SNAP_ROWS) / rate_hz
        span = signal.span(zero_s, zero_s + seconds, rate_hz=rate_hz, rows=len(rows))
        if not span:
            raise Refused(Reason.BAD_SIGNAL, f"{path.name}: no rows in {begin_s:g} to {begin_s + seconds:g} s")
        rows = rows[span.start : span.stop]
        members[member_of_signal(name)] = _npy(rows)
        derived |= {
            other: pose_differences(rows, signal.rotation_columns)
            for other, one in spec.signals.items()
            if one.difference_of == name and len(rows) > 1
        }
        start_s = signal.first_row_s(rate_hz) + span.start / rate_hz - zero_s
        clocks[name] = {"rows": len(span), "rate_hz": rate_hz, "start_s": start_s}
    for name in sorted(spec.texts):
        path = _sidecar(place, name, ("txt",), spec)
        _check_unchanged(path, known["texts"][name]["sha256"])
        members[member_of_text(name)] = read_text(path)
    return SidecarParts(members, {"signals": clocks} if clocks else {}, derived)


def _sidecar(place: FileRef, name: str, kinds: tuple[str, ...], spec: Spec) -> Path:
    """Find the sidecar of a video.

    Raises:
        Refused: it is missing, or two files claim to be it, or the video is not a local file.
    """
    if "npy" in kinds and hdf5.holds_rows(place):
        return hdf5.write_rows(place, name, spec.signals[name])
    if place.is_remote or not place.is_whole:
        raise Refused(Reason.BAD_SIGNAL, f"{name} is read from a sidecar file of a local video, not from a tar or URL")
    if "npy" in kinds and lerobot.find_folder(Path(place.path)) is not None:
        return lerobot.write_rows(Path(place.path), name, spec.camera, len(spec.signals[name].columns))
    stem = Path(place.path).with_suffix("")
    found = [path for kind in kinds if (path := stem.with_name(f"{stem.name}.{name}.{kind}")).is_file()]
    if len(found) != 1:
        wanted = " or ".join(f"{stem.name}.{name}.{kind}" for kind in kinds)
        raise Refused(Reason.BAD_SIGNAL, f"{'both' if found else 'no'} {wanted} next to the video")
    return found[0]


def read_rows(path: Path, signal: SignalSpec) -> np.ndarray:
    """Read the rows of a sidecar as float32 [rows, columns].

    Raises:
        Refused: the file is too large, malformed or not finite, or its columns differ from the spec.
    """
    if path.stat().st_size > MAX_SIGNAL_BYTES:
        raise Refused(Reason.BAD_SIGNAL, f"{path.name}: larger than {MAX_SIGNAL_BYTES >> 20} MiB")
    try:
        rows = _read_npy(path) if path.suffix == ".npy" else _read_csv(path, signal.columns)
    except (ValueError, EOFError, OSError, pa.ArrowException) as error:
        raise Refused(Reason.BAD_SIGNAL, f"{path.name}: {str(error).splitlines()[0]}") from None
    if rows.ndim != 2 or rows.shape[1] != len(signal.columns) or rows.dtype.kind not in "iufb" or not len(rows):
        wanted = f"expected numbers [rows, {len(signal.columns)}]"
        raise Refused(Reason.BAD_SIGNAL, f"{path.name}: {rows.dtype} {list(rows.shape)}, {wanted}")
    with np.errstate(over="ignore"):
        rows = np.ascontiguousarray(rows, dtype="<f4")
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(bad):
        raise Refused(Reason.BAD_SIGNAL, f"{path.name}: row {bad[0]} is not finite ({len(bad)} such rows)")
    return rows


def _read_npy(path: Path) -> np.ndarray:
    rows = np.load(path, mmap_mode="r", allow_pickle=False)  # mapped: a false header cannot allocate memory
    if not isinstance(rows, np.ndarray):
        raise ValueError("an archive, expected one array")
    return rows


def _read_csv(path: Path, columns: tuple[str, ...]) -> np.ndarray:
    table = pa_csv.read_csv(
        path,
        read_options=pa_csv.ReadOptions(use_threads=False),
        convert_options=pa_csv.ConvertOptions(
            column_types=dict.fromkeys(columns, pa.float64()), include_columns=list(columns)
        ),
    )
    return np.stack([table[name].to_numpy() for name in columns], axis=1)


def read_text(path: Path) -> bytes:
    """Read a text as UTF-8 bytes without a byte order mark.

    Raises:
        Refused: it is longer than 1 MiB or not UTF-8.
    """
    if path.stat().st_size > MAX_TEXT_BYTES:
        raise Refused(Reason.BAD_SIGNAL, f"{path.name}: larger than {MAX_TEXT_BYTES >> 20} MiB")
    try:
        return path.read_bytes().decode("utf-8-sig").encode()
    except UnicodeDecodeError as error:
        raise Refused(Reason.BAD_SIGNAL, f"{path.name}: not UTF-8 at byte {error.start}") from None


def _npy(rows: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array(out, np.ascontiguousarray(rows), version=(1, 0), allow_pickle=False)
    return out.getvalue()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_unchanged(path: Path, sha256: str) -> None:
    if _sha256(path) != sha256:
        raise Refused(Reason.CHANGED, f"{path.name} changed since the plan was made")
