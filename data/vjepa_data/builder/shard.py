"""The builder: runs the stages, may be killed at any time and run again, alone or beside others."""

import contextlib
import errno
import os
import re
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

import av
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from vjepa_data.atomic import remove_leftovers
from vjepa_data.builder.ingest import InputFile, ingest
from vjepa_data.builder.pack import BuildPlan, ShardPlan, freeze, thaw
from vjepa_data.builder.report import write_report
from vjepa_data.builder.select import choose, look_at
from vjepa_data.builder.status import StatusFile, Tally, read_builders, total
from vjepa_data.builder.write import write_shards
from vjepa_data.corpus.format import Manifest, RejectRecord, read_manifest, read_record, write_manifest
from vjepa_data.corpus.index import prepare
from vjepa_data.media.pool import WorkerPool
from vjepa_data.settings import BadInput
from vjepa_data.spec import Spec

WRITTEN = frozenset(
    {"plan", "shards", "status", "manifest.json", "samples.parquet", "rejects.parquet", "report.html", ".index"}
)
"""All that a build puts into its folder."""

DISK_TROUBLE = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST}
)
"""What a disk may object to that a user can mend."""


def shard(
    sources: Sequence[str],
    out: Path,
    *,
    spec: Spec,
    workers: int,
    task: tuple[int, int] | None = None,
    console: Console | None = None,
) -> Manifest:
    """Turn raw videos into a corpus of shards.

    May be killed at any moment and called again with the same arguments, on any number of machines at once: the
    result is the same to the byte.

    Args:
        sources: folders, video files, tables of videos and more (`ingest`).
        out: folder of the corpus; new, empty, or that of the same build begun earlier or elsewhere.
        spec: what to take and how to store it.
        workers: processes that decode and encode.
        task: K and N, if this is task K of an array of N, counted from 0. Every task does what the others leave, so
            that any of them may be missing; they only begin apart.
        console: where to show progress; by default the terminal's.

    Returns:
        The manifest of the corpus.

    Raises:
        BadInput: nothing can be built from this, or not there. Nothing half-written is left behind.
        SystemExit: 75, after TERM or USR2: whole shards stay, call again to go on.
    """
    found = ingest(sources, spec=spec, out=out)
    pool = WorkerPool[Any, Any]("vjepa_data.media.tasks", workers=workers, timeout_s=spec.timeout_s)
    with stop_in_good_order(), _disk_trouble(out), show_progress(console) as progress, pool:
        is_new = _open(out)
        try:
            return _build(found, out, spec=spec, pool=pool, task=task, progress=progress)
        except BadInput:
            if is_new and not any((out / "shards").glob("*.tar")):
                _remove(out)
            raise


def _build(
    found: Sequence[InputFile],
    out: Path,
    *,
    spec: Spec,
    pool: WorkerPool[Any, Any],
    task: tuple[int, int] | None,
    progress: Progress,
) -> Manifest:
    """The stages, in order."""
    start = task[0] / task[1] if task else os.getpid() % 97 / 97
    tools = tool_versions()
    plan = thaw(out, sources=found, spec=spec, tools=tools)
    own = StatusFile(out, sources=len(found), task=task)
    if plan is None:
        bar = progress.add_task("looking at sources", total=len(found), note="")
        looks = look_at(found, out, spec=spec, pool=pool, start=start, advance=lambda n: progress.advance(bar, n))
        clips, rejects = choose(found, looks, spec=spec)
        if not clips:
            raise BadInput(_nothing_left(len(found), rejects))
        _limit_rejects(found, rejects, spec)
        plan = freeze(out, clips, rejects, sources=found, spec=spec, tools=tools)
    _remove_leftovers(out)
    show = _Progress(progress, plan, [s for s in plan.shards if read_record(out, s.number, plan=plan.hash)])

    def advance(tally: Tally) -> None:
        own.update(tally)
        show(tally)

    places = {source.name: source.place for source in found}
    write_shards(out, plan, places=places, spec=spec, pool=pool, start=start, advance=advance)
    own.update(show.tally, is_done=True)
    if (out / "report.html").exists():  # another builder was first; the report is the last file of a build
        return read_manifest(out)
    manifest = _finish(found, out, plan, spec=spec, tools=tools)
    prepare(out, manifest)
    write_report(out, manifest, total([builder.tally for builder in read_builders(out)]), pool=pool)
    _remove_leftovers(out)
    return manifest


class _Progress:
    """The bar of clips that are written, and beside it how fast, and what was refused."""

    def __init__(self, progress: Progress, plan: BuildPlan, done: Sequence[ShardPlan]) -> None:
        self._progress, self._began, self.tally = progress, time.monotonic(), Tally()
        self._done = sum(len(shard.clips) for shard in done)
        clips = sum(len(shard.clips) for shard in plan.shards)
        self._bar = progress.add_task("writing clips", total=clips, completed=self._done, note="")

    def __call__(self, tally: Tally) -> None:
        self.tally = tally
        took_s = max(1e-3, time.monotonic() - self._began)
        note = f"{tally.clips / took_s:.1f} clips/s, {tally.bytes / took_s / 1e6:.1f} MB/s"
        if tally.rejects:
            note += f", refused: {', '.join(f'{count} {reason}' for reason, count in sorted(tally.rejects.items()))}"
        self._progress.update(self._bar, completed=self._done + tally.clips, note=note)


def _remove_leftovers(out: Path) -> None:
    for folder in (out, out / "plan", out / "shards", out / "status"):
        remove_leftovers(folder)


def _finish(found: Sequence[InputFile], out: Path, plan: BuildPlan, *, spec: Spec, tools: dict[str, str]) -> Manifest:
    """Write the tables and the manifest from the commit records."""
    records = [read_record(out, shard.number, plan=plan.hash) for shard in plan.shards]
    complete = [record for record in records if record is not None]
    assert len(complete) == len(records)
    late = [RejectRecord(**reject) for record in complete for reject in record["rejects"]]
    rejects = [*plan.rejects, *late]
    if not any(record["samples"] for record in complete):
        raise BadInput(_nothing_left(len(found), rejects))
    _limit_rejects(found, rejects, spec)
    return write_manifest(out, complete, plan.rejects, name=spec.name, spec=spec.model_dump(mode="json"), tools=tools)


def _limit_rejects(found: Sequence[InputFile], rejects: Sequence[RejectRecord], spec: Spec) -> None:
    refused = len({reject.source for reject in rejects})
    if refused > spec.max_rejects * len(found):
        raise BadInput(
            f"{refused} of {len(found)} sources were refused ({_by_reason(rejects)}), at most {spec.max_rejects:.0%} "
            f"allowed; mend the sources or raise max_rejects"
        )


def _nothing_left(sources: int, rejects: Sequence[RejectRecord]) -> str:
    first = rejects[0]
    return (
        f"none of the {sources} sources can be used ({_by_reason(rejects)}); the first is {first.source}: "
        f"{first.reason}, {first.detail}; give videos that ffprobe can read, or relax `filter`"
    )


def _by_reason(rejects: Sequence[RejectRecord]) -> str:
    counts = Counter(reject.reason for reject in rejects)
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common())


def tool_versions() -> dict[str, str]:
    """Versions of all that has a part in the bytes."""
    versions = {name: metadata.version(name) for name in ("av", "decord", "pillow", "pyarrow")}
    versions["ffmpeg"] = str(av.ffmpeg_version_info)
    return versions


def _open(out: Path) -> bool:
    """Make the folder, and say whether it holds nothing yet.

    Raises:
        BadInput: it is a file, or holds something that no build wrote.
    """
    if re.match(r"[a-z0-9]+:/", str(out)):
        raise BadInput(f"{out} is an address; give a folder to --out and copy it up when it is complete")
    if out.exists() and not out.is_dir():
        raise BadInput(f"{out} is a file; give a folder to --out")
    there = {path.name for path in out.iterdir() if not path.match(".*.tmp")} if out.exists() else set()
    if there - WRITTEN:
        raise BadInput(f"{out} holds other things ({min(there - WRITTEN)}); give an empty or new folder to --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{out} cannot be written ({error.strerror}); give another folder to --out") from None
    return not there


def _remove(out: Path) -> None:
    """Take away what a build that came to nothing wrote."""
    for name in WRITTEN:
        path = out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        out.rmdir()


@contextlib.contextmanager
def _disk_trouble(out: Path) -> Iterator[None]:
    """Say in a user's words what the disk objects to."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_TROUBLE:
            raise
        raise BadInput(
            f"{out}: cannot be written ({error.strerror}); make room or give another --out, then run it again"
        ) from None


@contextlib.contextmanager
def stop_in_good_order() -> Iterator[None]:
    """Turn TERM or USR2 into an exit with code 75, so that temporary files go and whole shards stay."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        for one in before:
            signal.signal(one, signal.SIG_IGN)  # a second wish must not interrupt the tidying up
        raise SystemExit(75)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGUSR2)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def show_progress(console: Console | None) -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", table_column=Column(no_wrap=False)),
    )
    with Progress(*columns, console=console or Console(stderr=True)) as progress:
        yield progress
