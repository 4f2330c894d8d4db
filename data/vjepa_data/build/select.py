"""What is worth keeping: sources are probed, filtered, freed of copies, cut to clips and given a split."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vjepa_data.build.ingest import Source, as_refusal
from vjepa_data.pool import Pool
from vjepa_data.settings import BadInput
from vjepa_data.shards import Reject, canonical_json
from vjepa_data.spec import Filter, Spec
from vjepa_data.video import Probe, Reason, Refused
from vjepa_data.work import Look, Seen


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


def select(
    sources: Sequence[Source], *, spec: Spec, pool: Pool[Look, Seen], advance: Callable[[int], None]
) -> tuple[list[Cutting], list[Reject]]:
    """Decide for each source whether and in which clips it is used.

    Args:
        sources: in order of name; of two copies the first stays.
        spec: the rules.
        pool: processes that open files.
        advance: called with the number of sources that are done.

    Returns:
        Clips in order of source and time, and what was refused.
    """
    denied = _deny_list(spec.filter)
    clips: list[Cutting] = []
    rejects: list[Reject] = []
    sums: dict[str, str] = {}
    tasks = (Look(number, source.path) for number, source in enumerate(sources) if source.refused is None)
    answers = pool.map(tasks)
    for source in sources:
        answer = as_refusal(source) or next(answers)[1]
        stage = "ingest" if source.refused else "probe"
        try:
            if isinstance(answer, Refused):
                raise answer
            stage = "filter"
            start_s, end_s = _part(source, answer.probe)
            _admit(answer, source, denied, spec.filter, end_s - start_s)
            stage = "dedupe"
            if spec.dedupe.exact and sums.setdefault(answer.sha256, source.name) != source.name:
                raise Refused(Reason.DUPLICATE, f"same bytes as {sums[answer.sha256]}")
            clips.extend(_cut(source, answer, spec))
        except Refused as refusal:
            rejects.append(Reject(source.name, source.start_s, source.end_s, stage, refusal.reason, refusal.detail))
        advance(1)
    return clips, rejects


def _part(source: Source, probe: Probe) -> tuple[float, float]:
    """Start and end of the part to use, in seconds."""
    start, end = source.start_s or 0.0, probe.duration_s if source.end_s is None else source.end_s
    if not start < end <= probe.duration_s + 1.0:
        raise Refused(Reason.BAD_RANGE, f"{start:g} to {end:g} s of {probe.duration_s:g} s")
    return start, end


def _deny_list(accept: Filter) -> frozenset[str]:
    if accept.deny is None:
        return frozenset()
    try:
        return frozenset(line.strip() for line in Path(accept.deny).read_text().splitlines() if line.strip())
    except (OSError, UnicodeDecodeError):
        raise BadInput(f"filter.deny={accept.deny}: cannot be read; give a text file with one source a line") from None


def _admit(seen: Seen, source: Source, denied: frozenset[str], accept: Filter, seconds: float) -> None:
    """Refuse what the filter does not want, by what the file says of itself."""
    probe = seen.probe
    short, long = sorted((probe.width, probe.height))
    if source.name in denied or seen.sha256 in denied:
        raise Refused(Reason.DENIED, "on the deny-list")
    if accept.codecs is not None and probe.codec not in accept.codecs:
        raise Refused(Reason.CODEC, f"{probe.codec}, wanted {', '.join(accept.codecs)}")
    if seconds < accept.min_duration_s:
        raise Refused(Reason.TOO_SHORT, f"{seconds:g} s, at least {accept.min_duration_s:g} wanted")
    if accept.max_duration_s is not None and seconds > accept.max_duration_s:
        raise Refused(Reason.TOO_LONG, f"{seconds:g} s, at most {accept.max_duration_s:g} wanted")
    if short < accept.min_short_side_px:
        raise Refused(Reason.TOO_SMALL, f"{probe.width}x{probe.height}, at least {accept.min_short_side_px} wanted")
    if long > accept.max_aspect * short:
        raise Refused(Reason.TOO_NARROW, f"{probe.width}x{probe.height}, at most {accept.max_aspect:g}:1 wanted")
    if probe.fps < accept.min_fps:
        raise Refused(Reason.TOO_SLOW, f"{probe.fps:g} frames per second, at least {accept.min_fps:g} wanted")


def _cut(source: Source, seen: Seen, spec: Spec) -> list[Cutting]:
    """The clips of one source that passed."""
    group = source.group or (source.name.rpartition("/")[0] if spec.split.group == "folder" else source.name)
    split = source.split or _split_of(group, spec)
    original: dict[str, Any] = {**asdict(seen.probe), "fps": seen.probe.fps, "sha256": seen.sha256}
    del original["rate"], original["start_s"]
    start, end = _part(source, seen.probe)
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
        for begin, finish in _windows(source, start, end, spec)
    ]


def _windows(source: Source, start: float, end: float, spec: Spec) -> list[tuple[float | None, float | None]]:
    """Where the clips of a source begin and end; a rest shorter than half a window is left out."""
    if spec.cut.kind == "none" or end - start <= spec.cut.length_s:
        return [(source.start_s, source.end_s)]
    length = spec.cut.length_s
    count = int((end - start) / length + 0.5)
    times = [round(start + number * length, 6) for number in range(count)]
    return [(begin, round(min(begin + length, end), 6)) for begin in times]


def _digest(*parts: object) -> str:
    """64 bits, in hexadecimal, of a few values."""
    return hashlib.blake2b(canonical_json(parts), digest_size=8).hexdigest()


def _split_of(group: str, spec: Spec) -> str:
    """`val` for a share of the groups, chosen by a hash, so that a group stays where it is when others come or go."""
    draw = int(_digest("split", spec.split.salt, group), 16) / 2**64
    return "val" if draw < spec.split.val_share else "train"
