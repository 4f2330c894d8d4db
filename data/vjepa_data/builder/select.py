"""What is worth keeping: sources are looked at, filtered, freed of copies, cut to clips and given a split.

Looking costs a read of every file, and a decode of it where scenes are wanted; so its results are written down in
chunks, OUT/plan/seen-000000.json, which other builders and later runs find. Choosing costs nothing and is repeated.
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
from vjepa_data.media.video import Reason, Refused, VideoInfo
from vjepa_data.settings import BadInput
from vjepa_data.spec import Filter, Spec

CHUNK = 512
"""Sources whose looks are written down together: what a killed builder may have to look at again."""

SAME_LENGTH_S = 0.5
"""Near copies may differ in length by so much, or by 2 %."""


@dataclass(frozen=True)
class Cutting:
    """One clip to be stored: a part of a source, its name, and all that is known of it before it is encoded."""

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
    """JSON object: what the source file is."""


def look_at(
    sources: Sequence[InputFile],
    out: Path | None,
    *,
    spec: Spec,
    pool: WorkerPool[AnalyzeTask, Analysis],
    start: float,
    advance: Callable[[int], None],
) -> list[Analysis | Refused]:
    """Look at every source: what it is, what it shows.

    Args:
        sources: in order of name.
        out: the corpus's folder, where looks are written down and found; None to write nothing.
        spec: says what must be known of a source.
        pool: processes that open files.
        start: at which of the chunks to begin, as a share of them, so that several builders begin apart.
        advance: called with the number of sources that were looked at or found written down.

    Returns:
        For each source what it is, or why it cannot be used.
    """
    of = _purpose(sources, spec)
    chunks = [range(first, min(first + CHUNK, len(sources))) for first in range(0, len(sources), CHUNK)]
    files = {chunk: out / "plan" / f"seen-{number:06d}.json" if out else None for number, chunk in enumerate(chunks)}
    turn = int(start * len(chunks))
    seen: dict[int, Analysis | Refused] = {}

    def missing() -> Iterator[AnalyzeTask]:
        for chunk in [*chunks[turn:], *chunks[:turn]]:
            known = _read_looks(files[chunk], of)
            if known is not None:
                seen.update(zip(chunk, known, strict=True))
                advance(len(chunk))
                continue
            for number in chunk:
                refusal = sources[number].as_refusal()
                if refusal is None:
                    yield AnalyzeTask(
                        number=number,
                        place=sources[number].place,
                        media=spec.media,
                        scene_threshold=spec.cut.threshold if spec.cut.kind == "scene" else None,
                        wants_hashes=spec.dedupe.perceptual_bits is not None,
                        wants_box=spec.encode.crop_bars,
                    )
                else:
                    seen[number] = refusal
                    advance(1)

    written: set[range] = set()
    for task, answer in pool.map(missing()):
        seen[task.number] = answer
        advance(1)
        chunk = chunks[task.number // CHUNK]
        if chunk not in written and all(number in seen for number in chunk):
            written.add(chunk)
            _write_looks(files[chunk], of, [seen[number] for number in chunk])
    return [seen[number] for number in range(len(sources))]


def _purpose(sources: Sequence[InputFile], spec: Spec) -> str:
    """A sum of all that looks depend on, except for the files themselves."""
    scenes = spec.cut.threshold if spec.cut.kind == "scene" else None
    listing = [source.name for source in sources]
    wanted = [listing, spec.media, scenes, spec.dedupe.perceptual_bits is not None, spec.encode.crop_bars]
    return hashlib.sha256(canonical_json(wanted)).hexdigest()


def _write_looks(path: Path | None, of: str, looks: Sequence[Analysis | Refused]) -> None:
    if path is None:
        return
    rows = [
        {"reason": look.reason, "detail": look.detail} if isinstance(look, Refused) else asdict(look) for look in looks
    ]
    path.parent.mkdir(exist_ok=True)
    atomic_write(path, canonical_json({"of": of, "seen": rows}) + b"\n")


def _read_looks(path: Path | None, of: str) -> list[Analysis | Refused] | None:
    if path is None or not path.exists():
        return None
    values = json.loads(path.read_bytes())
    if values["of"] != of:
        return None
    looks: list[Analysis | Refused] = []
    for row in values["seen"]:
        if "reason" in row:
            looks.append(Refused(Reason(row["reason"]), row["detail"]))
        else:
            probe = VideoInfo(**{**row["probe"], "rate": tuple(row["probe"]["rate"])})
            box = PictureBox(**row["box"]) if row["box"] else None
            looks.append(Analysis(probe, row["sha256"], tuple(row["scenes"]), tuple(row["hashes"]), box))
    return looks


def choose(
    sources: Sequence[InputFile], looks: Sequence[Analysis | Refused], *, spec: Spec
) -> tuple[list[Cutting], list[RejectRecord]]:
    """Decide for each source whether and in which clips it is used.

    Args:
        sources: in order of name; of two copies the first stays.
        looks: what each is.
        spec: the rules.

    Returns:
        Clips in order of source and time, and what was refused.
    """
    denied = _deny_list(spec.filter)
    clips: list[Cutting] = []
    rejects: list[RejectRecord] = []
    sums: dict[tuple[str, float | None, float | None], str] = {}
    gallery = Gallery(spec.dedupe.perceptual_bits) if spec.dedupe.perceptual_bits is not None else None
    for source, look in zip(sources, looks, strict=True):
        stage = "ingest" if source.refused else "probe"
        try:
            if isinstance(look, Refused):
                raise look
            stage = "filter"
            start_s, end_s = _part(source, look.probe)
            _admit(look, source, denied, spec, end_s - start_s)
            sidecars = check_sidecars(source.place, look.probe, spec)
            stage = "dedupe"
            same = (look.sha256, source.start_s, source.end_s)
            if spec.dedupe.exact and sums.setdefault(same, source.name) != source.name:
                raise Refused(Reason.DUPLICATE, f"same bytes as {sums[same]}")
            if gallery is not None and (twin := gallery.twin(source, look)) is not None:
                raise Refused(Reason.NEAR_DUPLICATE, f"looks like {twin}")
            clips.extend(_cut(source, look, spec, sidecars))
        except Refused as refusal:
            rejects.append(
                RejectRecord(source.name, source.start_s, source.end_s, stage, refusal.reason, refusal.detail)
            )
    return clips, rejects


class Gallery:
    """Finds an earlier video that looks the same.

    The hashes of a video are cut to bands of 16 bits, and videos are compared that agree in a band: of three hashes
    that differ in 11 bits together one band of 12 must agree, so that none is missed up to 3 bits a hash, few above.
    """

    def __init__(self, bits: int) -> None:
        self._bits = bits
        self._bands: dict[tuple[int, int], list[int]] = {}
        self._known: list[tuple[str, float, tuple[int, ...]]] = []

    def twin(self, source: InputFile, seen: Analysis) -> str | None:
        """Name of an earlier video of the same look and length; else remember this one. Parts are left alone."""
        if not seen.hashes or source.start_s is not None or source.end_s is not None:
            return None
        length = seen.probe.duration_s
        bands = [(4 * n + k, h >> 16 * k & 0xFFFF) for n, h in enumerate(seen.hashes) for k in range(4)]
        for other in sorted({other for band in bands for other in self._bands.get(band, ())}):
            name, its_length, its_hashes = self._known[other]
            if abs(length - its_length) > max(SAME_LENGTH_S, 0.02 * length):
                continue
            distance = sum((a ^ b).bit_count() for a, b in zip(seen.hashes, its_hashes, strict=True))
            if distance <= self._bits * len(seen.hashes):
                return name
        for band in bands:
            self._bands.setdefault(band, []).append(len(self._known))
        self._known.append((source.name, length, seen.hashes))
        return None


def _part(source: InputFile, probe: VideoInfo) -> tuple[float, float]:
    """Start and end of the part to use, in seconds."""
    start, end = source.start_s or 0.0, probe.duration_s if source.end_s is None else source.end_s
    is_whole = source.start_s is None and source.end_s is None
    if not is_whole and not start < end <= probe.duration_s + SAME_LENGTH_S:
        raise Refused(Reason.BAD_RANGE, f"{start:g} to {end:g} s of {probe.duration_s:g} s")
    return start, end


def _deny_list(accept: Filter) -> frozenset[str]:
    if accept.deny is None:
        return frozenset()
    try:
        return frozenset(line.strip() for line in Path(accept.deny).read_text().splitlines() if line.strip())
    except (OSError, UnicodeDecodeError):
        raise BadInput(f"filter.deny={accept.deny}: cannot be read; give a text file with one source a line") from None


def _admit(seen: Analysis, source: InputFile, denied: frozenset[str], spec: Spec, seconds: float) -> None:
    """Refuse what the filter does not want, by what the file says of itself."""
    probe, accept = seen.probe, spec.filter
    picture = seen.box or probe
    short, long = sorted((picture.width, picture.height))
    if source.name in denied or seen.sha256 in denied:
        raise Refused(Reason.DENIED, "on the deny-list")
    if accept.codecs is not None and probe.codec not in accept.codecs:
        raise Refused(Reason.CODEC, f"{probe.codec}, wanted {', '.join(accept.codecs)}")
    if short < accept.min_short_side_px:
        raise Refused(Reason.TOO_SMALL, f"{picture.width}x{picture.height}, at least {accept.min_short_side_px} wanted")
    if long > accept.max_aspect * short:
        raise Refused(Reason.TOO_NARROW, f"{picture.width}x{picture.height}, at most {accept.max_aspect:g}:1 wanted")
    if spec.media == "images":
        return
    if seconds < accept.min_duration_s:
        raise Refused(Reason.TOO_SHORT, f"{seconds:g} s, at least {accept.min_duration_s:g} wanted")
    if accept.max_duration_s is not None and seconds > accept.max_duration_s:
        raise Refused(Reason.TOO_LONG, f"{seconds:g} s, at most {accept.max_duration_s:g} wanted")
    if probe.fps < accept.min_fps:
        raise Refused(Reason.TOO_SLOW, f"{probe.fps:g} frames per second, at least {accept.min_fps:g} wanted")


def _cut(source: InputFile, seen: Analysis, spec: Spec, sidecars: dict[str, Any]) -> list[Cutting]:
    """The clips of one source that passed."""
    group = source.group or (source.name.rpartition("/")[0] if spec.split.group == "folder" else source.name)
    split = source.split or split_of(group, spec)
    original: dict[str, Any] = {**asdict(seen.probe), "fps": seen.probe.fps, "sha256": seen.sha256}
    del original["rate"], original["start_s"]
    original |= sidecars
    if seen.box is not None:
        original["box"] = asdict(seen.box)
    start, end = _part(source, seen.probe)
    windows = [(source.start_s, source.end_s)]
    if spec.media == "videos" and spec.cut.kind != "none":
        bounds = [start, *(at for at in seen.scenes if start < at < end), end]
        windows = [window for a, b in itertools.pairwise(bounds) for window in cut_windows(a, b, spec=spec)]
        if not windows:
            raise Refused(Reason.TOO_SHORT, f"no part of at least {spec.filter.min_duration_s:g} s between cuts")
        windows = [(source.start_s, source.end_s)] if windows == [(start, end)] else windows
    return [
        Cutting(
            key=f"{spec.name}-{_digest(source.name, begin, finish)}",
            source=source.name,
            start_s=begin,
            end_s=finish,
            seconds=(end if finish is None else finish) - (begin or 0.0),
            group=group,
            split=split,
            labels=canonical_json(source.labels).decode(),
            original=canonical_json(original).decode(),
        )
        for begin, finish in windows
    ]


def cut_windows(start: float, end: float, *, spec: Spec) -> list[tuple[float | None, float | None]]:
    """Cut a time span to windows of `cut.length_s`, in seconds; the last may be shorter.

    A rest below half a window is left out, and so is what is shorter than the shortest clip.
    """
    length = spec.cut.length_s
    count = max(1, int((end - start) / length + 0.5))
    bounds = [(start + n * length, min(start + (n + 1) * length, end)) for n in range(count)]
    return [(round(a, 6), round(b, 6)) for a, b in bounds if b - a >= spec.filter.min_duration_s]


def _digest(*parts: object) -> str:
    """64 bits, in hexadecimal, of a few values."""
    return hashlib.blake2b(canonical_json(parts), digest_size=8).hexdigest()


def split_of(group: str, spec: Spec) -> str:
    """`val` for a share of the groups, chosen by a hash, so that a group stays where it is when others come or go."""
    draw = int(_digest("split", spec.split.salt, group), 16) / 2**64
    return "val" if draw < spec.split.val_share else "train"
