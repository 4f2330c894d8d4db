"""Stage 2 of a build: analyze every source, then filter, deduplicate, cut into clips and assign splits.

Analysis reads each file once, and decodes it where scenes are wanted. Results are therefore stored in chunks as
OUT/plan/seen-000000.json, which other builders and later runs reuse. Selection is cheap and is repeated every time.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vjepa_data.atomic import atomic_write
from vjepa_data.builder.ingest import InputFile
from vjepa_data.builder.signals import check_sidecars
from vjepa_data.corpus.format import RejectRecord, canonical_json
from vjepa_data.media.pool import WorkerPool
from vjepa_data.media.tasks import Analysis, AnalyzeTask
from vjepa_data.media.transcode import PictureBox
from vjepa_data.media.video import Reason, Refused, SeekPoint, VideoInfo
from vjepa_data.settings import BadInput
from vjepa_data.spec import Filter, Spec

CHUNK = 512
"""Sources per stored chunk of analyses. A killed builder repeats at most this many."""

SEEK_POINTS = 3
"""Seek points kept for each clip: the nearest, and earlier points in case its frames are late."""

SAME_LENGTH_S = 0.5
"""Largest difference in length between near duplicates, in seconds, or 2 % of the length if that is more."""


@dataclass(frozen=True)
class PlannedClip:
    """A clip to store: a part of a source, its key, and everything known before encoding."""

    key: str
    source: str
    start_s: float | None
    end_s: float | None
    seconds: float
    group: str
    split: str
    labels: str
    """JSON object."""
    original: str
    """JSON object that describes the source file."""
    probe: str = ""
    """JSON object of the `VideoInfo` of the source, with the seek points that this clip may need. Empty for images."""


def analyze_sources(
    sources: Sequence[InputFile],
    out: Path | None,
    *,
    spec: Spec,
    pool: WorkerPool[AnalyzeTask, Analysis],
    start: float,
    advance: Callable[[int], None],
) -> list[Analysis | Refused]:
    """Analyze every source, or load its stored analysis.

    Args:
        sources: in order of name.
        out: folder of the corpus, where analyses are stored, or None to store nothing.
        spec: decides which properties are needed.
        pool: processes that open the files.
        start: fraction of the chunks at which to begin, so that concurrent builders begin at different chunks.
        advance: called with the number of sources that were just analyzed or loaded.

    Returns:
        For each source its analysis, or the reason why it cannot be used.
    """
    analyses = _Analyses(sources, out, spec, advance)
    for task, answer in pool.map(analyses.missing(start)):
        analyses.record(task.number, answer)
    return [analyses.known[number] for number in range(len(sources))]


class _Analyses:
    """Analyses of all sources, in chunks. A chunk is stored as soon as its last source is known."""

    def __init__(
        self, sources: Sequence[InputFile], out: Path | None, spec: Spec, advance: Callable[[int], None]
    ) -> None:
        self.known: dict[int, Analysis | Refused] = {}
        self._sources, self._out, self._spec, self._advance = sources, out, spec, advance
        self._purpose = _purpose(sources, spec)
        self._chunks = [range(at, min(at + CHUNK, len(sources))) for at in range(0, len(sources), CHUNK)]

    def missing(self, start: float) -> Iterator[AnalyzeTask]:
        """Yield a task for every source that is still unknown, from a fraction `start` of the chunks onwards."""
        first = int(start * len(self._chunks))
        for chunk in [*self._chunks[first:], *self._chunks[:first]]:
            stored = self._load(chunk)  # only now: another builder may just have stored it
            if stored is not None:
                self.known.update(zip(chunk, stored, strict=True))
                self._advance(len(chunk))
                continue
            for number in chunk:
                refusal = self._sources[number].as_refusal()
                if refusal is None:
                    yield self._task(number)
                else:
                    self.record(number, refusal)

    def record(self, number: int, result: Analysis | Refused) -> None:
        """Add the result for one source, and store its chunk if that is now complete."""
        self.known[number] = result
        self._advance(1)
        chunk = self._chunks[number // CHUNK]
        path = self._path(chunk)
        if path is not None and all(other in self.known for other in chunk):
            path.parent.mkdir(exist_ok=True)
            rows = [_to_json(self.known[other]) for other in chunk]
            atomic_write(path, canonical_json({"of": self._purpose, "seen": rows}) + b"\n")

    def _task(self, number: int) -> AnalyzeTask:
        spec = self._spec
        return AnalyzeTask(
            number=number,
            file=self._sources[number].file,
            media=spec.media,
            scene_threshold=spec.cut.threshold if spec.cut.kind == "scene" else None,
            wants_hashes=spec.dedupe.perceptual_bits is not None,
            wants_box=spec.encode.crop_bars,
        )

    def _path(self, chunk: range) -> Path | None:
        return self._out / "plan" / f"seen-{chunk.start // CHUNK:06d}.json" if self._out else None

    def _load(self, chunk: range) -> list[Analysis | Refused] | None:
        """Load a stored chunk, or None if there is none for these sources and this spec."""
        path = self._path(chunk)
        if path is None or not path.exists():
            return None
        values = json.loads(path.read_bytes())
        return [_from_json(row) for row in values["seen"]] if values["of"] == self._purpose else None


def _purpose(sources: Sequence[InputFile], spec: Spec) -> str:
    """Hash everything that analyses depend on, except the files themselves."""
    scenes = spec.cut.threshold if spec.cut.kind == "scene" else None
    listing = [source.name for source in sources]
    wanted = [listing, spec.media, scenes, spec.dedupe.perceptual_bits is not None, spec.encode.crop_bars]
    return hashlib.sha256(canonical_json(wanted)).hexdigest()


def _to_json(result: Analysis | Refused) -> dict[str, Any]:
    if isinstance(result, Refused):
        return {"reason": result.reason, "detail": result.detail}
    return {**asdict(result), "probe": _info_to_json(result.probe)}


def _from_json(row: dict[str, Any]) -> Analysis | Refused:
    if "reason" in row:
        return Refused(Reason(row["reason"]), row["detail"])
    info = info_from_json(row["probe"])
    box = PictureBox(**row["box"]) if row["box"] else None
    return Analysis(info, row["sha256"], tuple(row["scenes"]), tuple(row["hashes"]), box)


def _info_to_json(info: VideoInfo) -> dict[str, Any]:
    """Return the properties of a video. `turn` is rare and left out, so that plans keep their bytes."""
    return {name: value for name, value in asdict(info).items() if name != "turn" or value is not None}


def info_from_json(values: dict[str, Any]) -> VideoInfo:
    """Make the properties of a video from their JSON object."""
    dense, points, turn = values.get("dense_rate"), values.get("seek_points", ()), values.get("turn")
    return VideoInfo(
        **{
            **values,
            "rate": tuple(values["rate"]),
            "dense_rate": tuple(dense) if dense else None,
            "seek_points": tuple(SeekPoint(*point) for point in points),
            "turn": tuple(turn) if turn else None,
        }
    )


def _describe(analysis: Analysis) -> dict[str, Any]:
    """Return the properties of a source that are stored with its clips. Clips of unusual sources are often left out."""
    info = analysis.probe
    known = {**asdict(info), "fps": info.fps, "sha256": analysis.sha256}
    for name in ("rate", "start_s", "stream", "delay", "seek_points", "turn"):
        del known[name]
    usual = {"video_streams": 1, "dense_rate": None, "transfer": "", "is_joined": False}
    return {name: value for name, value in known.items() if name not in usual or value != usual[name]}


def select_clips(
    sources: Sequence[InputFile], analyses: Sequence[Analysis | Refused], *, spec: Spec
) -> tuple[list[PlannedClip], list[RejectRecord]]:
    """Decide which sources to use, and cut them into clips.

    Args:
        sources: in order of name. The first of several copies is kept.
        analyses: one per source.
        spec: the rules.

    Returns:
        Clips in order of source and time, and the rejected sources.
    """
    denied = _read_deny_list(spec.filter)
    clips: list[PlannedClip] = []
    rejects: list[RejectRecord] = []
    sums: dict[tuple[str, float | None, float | None], str] = {}
    bits = spec.dedupe.perceptual_bits
    near = NearDuplicates(bits) if bits is not None else None
    for source, analysis in zip(sources, analyses, strict=True):
        stage = "ingest" if source.refused else "probe"
        try:
            if isinstance(analysis, Refused):
                raise analysis
            stage = "filter"
            start_s, end_s = _time_range(source, analysis.probe)
            _apply_filter(analysis, source, denied, spec, end_s - start_s)
            sidecars = check_sidecars(source.file, analysis.probe, spec)
            stage = "dedupe"
            same = (analysis.sha256, source.start_s, source.end_s)
            if spec.dedupe.exact and sums.setdefault(same, source.name) != source.name:
                raise Refused(Reason.DUPLICATE, f"same bytes as {sums[same]}")
            if near is not None and (match := near.match_or_add(source, analysis)) is not None:
                raise Refused(Reason.NEAR_DUPLICATE, f"looks like {match}")
            clips.extend(_cut_source(source, analysis, spec, sidecars))
        except Refused as refusal:
            rejects.append(
                RejectRecord(source.name, source.start_s, source.end_s, stage, refusal.reason, refusal.detail)
            )
    return clips, rejects


class NearDuplicates:
    """Finds earlier videos whose perceptual hashes are close.

    Hashes are cut into bands of 16 bits, and only videos that share a band are compared. Three hashes that differ in
    at most 11 bits in total share at least one of their 12 bands, so nothing is missed up to 3 bits per hash, and
    little above.
    """

    def __init__(self, bits: int) -> None:
        self._bits = bits
        self._bands: dict[tuple[int, int], list[int]] = {}
        self._known: list[tuple[str, float, tuple[int, ...]]] = []

    def match_or_add(self, source: InputFile, analysis: Analysis) -> str | None:
        """Return the name of an earlier video of similar content and length, or add this one. Parts are ignored."""
        if not analysis.hashes or source.start_s is not None or source.end_s is not None:
            return None
        length = analysis.probe.duration_s
        bands = [(4 * n + k, h >> 16 * k & 0xFFFF) for n, h in enumerate(analysis.hashes) for k in range(4)]
        for other in sorted({other for band in bands for other in self._bands.get(band, ())}):
            name, other_length, other_hashes = self._known[other]
            if abs(length - other_length) > max(SAME_LENGTH_S, 0.02 * length):
                continue
            distance = sum((a ^ b).bit_count() for a, b in zip(analysis.hashes, other_hashes, strict=True))
            if distance <= self._bits * len(analysis.hashes):
                return name
        for band in bands:
            self._bands.setdefault(band, []).append(len(self._known))
        self._known.append((source.name, length, analysis.hashes))
        return None


def _time_range(source: InputFile, info: VideoInfo) -> tuple[float, float]:
    """Return start and end of the part to use, in seconds."""
    start, end = source.start_s or 0.0, info.duration_s if source.end_s is None else source.end_s
    is_part = source.start_s is not None or source.end_s is not None
    if is_part and not start < end <= info.duration_s + SAME_LENGTH_S:
        raise Refused(Reason.BAD_RANGE, f"{start:g} to {end:g} s, but the video has {info.duration_s:g} s")
    return start, end


def _read_deny_list(accept: Filter) -> frozenset[str]:
    if accept.deny is None:
        return frozenset()
    try:
        return frozenset(line.strip() for line in Path(accept.deny).read_text().splitlines() if line.strip())
    except (OSError, UnicodeDecodeError):
        raise BadInput(f"filter.deny={accept.deny} cannot be read; give a text file with a source per line") from None


def _apply_filter(analysis: Analysis, source: InputFile, denied: frozenset[str], spec: Spec, seconds: float) -> None:
    """Reject a source that the filter excludes, judging by its declared properties."""
    info, accept = analysis.probe, spec.filter
    picture = analysis.box or info
    short, long = sorted((picture.width, picture.height))
    size = f"{picture.width}x{picture.height}"
    if source.name in denied or analysis.sha256 in denied:
        raise Refused(Reason.DENIED, "on the deny-list")
    if accept.codecs is not None and info.codec not in accept.codecs:
        raise Refused(Reason.CODEC, f"{info.codec}, accepted: {', '.join(accept.codecs)}")
    if short < accept.min_short_side_px:
        raise Refused(Reason.TOO_SMALL, f"{size}, minimum short side: {accept.min_short_side_px}")
    if long > accept.max_aspect * short:
        raise Refused(Reason.TOO_NARROW, f"{size}, maximum aspect ratio: {accept.max_aspect:g}:1")
    if spec.media == "images":
        return
    if seconds < accept.min_duration_s:
        raise Refused(Reason.TOO_SHORT, f"{seconds:g} s, minimum: {accept.min_duration_s:g} s")
    if accept.max_duration_s is not None and seconds > accept.max_duration_s:
        raise Refused(Reason.TOO_LONG, f"{seconds:g} s, maximum: {accept.max_duration_s:g} s")
    if info.fps < accept.min_fps:
        raise Refused(Reason.TOO_SLOW, f"{info.fps:g} frames per second, minimum: {accept.min_fps:g}")


def _cut_source(source: InputFile, analysis: Analysis, spec: Spec, sidecars: dict[str, Any]) -> list[PlannedClip]:
    """Cut an accepted source into clips."""
    group = source.group or (source.name.rpartition("/")[0] if spec.split.group == "folder" else source.name)
    split = source.split or assign_split(group, spec)
    original = _describe(analysis) | sidecars
    if analysis.box is not None:
        original["box"] = asdict(analysis.box)
    start, end = _time_range(source, analysis.probe)
    windows = [(source.start_s, source.end_s)]
    if spec.media == "videos" and spec.cut.kind != "none":
        bounds = [start, *(at for at in analysis.scenes if start < at < end), end]
        windows = [window for a, b in itertools.pairwise(bounds) for window in cut_windows(a, b, spec=spec)]
        if not windows:
            raise Refused(Reason.TOO_SHORT, f"no part between cuts has {spec.filter.min_duration_s:g} s")
        windows = [(source.start_s, source.end_s)] if windows == [(start, end)] else windows
    return [
        PlannedClip(
            key=f"{spec.name}-{_digest(source.name, begin, finish)}",
            source=source.name,
            start_s=begin,
            end_s=finish,
            seconds=(end if finish is None else finish) - (begin or 0.0),
            group=group,
            split=split,
            labels=canonical_json(source.labels).decode(),
            original=canonical_json(original).decode(),
            probe=_probe_of_part(analysis.probe, begin or 0.0) if spec.media == "videos" else "",
        )
        for begin, finish in windows
    ]


def _probe_of_part(info: VideoInfo, start_s: float) -> str:
    points = [point for point in info.seek_points if point.time_s <= start_s][-SEEK_POINTS:]
    return canonical_json({**_info_to_json(info), "seek_points": points}).decode()


def cut_windows(start: float, end: float, *, spec: Spec) -> list[tuple[float | None, float | None]]:
    """Cut a time span into windows of `cut.length_s`, in seconds. The last window may be shorter.

    A remainder below half a window is dropped, and so is any window shorter than `filter.min_duration_s`.
    """
    length = spec.cut.length_s
    count = max(1, int((end - start) / length + 0.5))
    bounds = [(start + n * length, min(start + (n + 1) * length, end)) for n in range(count)]
    return [(round(a, 6), round(b, 6)) for a, b in bounds if b - a >= spec.filter.min_duration_s]


def _digest(*parts: object) -> str:
    """Hash a few values to 64 bits, in hexadecimal."""
    return hashlib.blake2b(canonical_json(parts), digest_size=8).hexdigest()


def assign_split(group: str, spec: Spec) -> str:
    """Assign a group to `val` or `train` by a hash of its name, so that it stays there as other groups come and go."""
    draw = int(_digest("split", spec.split.salt, group), 16) / 2**64
    return "val" if draw < spec.split.val_share else "train"
