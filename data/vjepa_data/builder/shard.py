"""Run the stages of a build. A build can be killed and resumed at any time, alone or together with other builders."""

import contextlib
import errno
import functools
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
from vjepa_data.builder.pack import BuildPlan, ShardPlan, load_plan, save_plan
from vjepa_data.builder.report import write_report
from vjepa_data.builder.select import analyze_sources, select_clips
from vjepa_data.builder.status import StatusFile, Tally, read_builders, sum_tallies
from vjepa_data.builder.write import write_shards
from vjepa_data.corpus.format import Manifest, RejectRecord, read_manifest, read_record, write_manifest
from vjepa_data.corpus.sample_table import prepare
from vjepa_data.media.pool import WorkerPool
from vjepa_data.media.video import Reason
from vjepa_data.settings import BadInput
from vjepa_data.spec import Spec

WRITTEN = frozenset(
    {"plan", "shards", "status", "manifest.json", "samples.parquet", "rejects.parquet", "report.html", ".index"}
)
"""Names of everything that a build writes into its folder."""

DISK_ERRORS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST}
)
"""Errors of the file system that a user can resolve."""


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

    The call can be killed at any moment and repeated with the same arguments, on any number of machines at once. The
    result is always the same to the byte.

    Args:
        sources: folders, video files, tables of videos and more (`ingest`).
        out: folder of the corpus: new, empty, or that of the same build begun earlier or elsewhere.
        spec: selects sources and sets how to store them.
        workers: number of processes that decode and encode.
        task: K and N, if this is task K of an array of N, counted from 0. Tasks only begin at different shards. Each
            task does all work that is left, so that any other task may be missing.
        console: where to show progress (default: standard error).

    Returns:
        The manifest of the corpus.

    Raises:
        BadInput: the sources or the folder cannot be used. No partial files are left behind.
        SystemExit: 75, after SIGTERM or SIGUSR2. Complete shards are kept. Call again to resume.
    """
    found = ingest(sources, spec=spec, out=out)
    pool = WorkerPool[Any, Any]("vjepa_data.media.tasks", workers=workers, timeout_s=spec.timeout_s)
    with exit_on_signal(), _explain_disk_errors(out), show_progress(console) as progress, pool:
        is_new = _create_folder(out)
        try:
            return _build(found, out, spec=spec, pool=pool, task=task, progress=progress)
        except BadInput:
            if is_new and not any((out / "shards").glob("*.tar")):
                _remove_build(out)
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
    """Run the stages in order."""
    start = task[0] / task[1] if task else os.getpid() % 97 / 97
    tools = tool_versions()
    plan = load_plan(out, sources=found, spec=spec, tools=tools)
    own = StatusFile(out, sources=len(found), task=task)
    if plan is None:
        bar = progress.add_task("analyzing sources", total=len(found), note="")
        advance = functools.partial(progress.advance, bar)
        analyses = analyze_sources(found, out, spec=spec, pool=pool, start=start, advance=advance)
        clips, rejects = select_clips(found, analyses, spec=spec)
        if not clips:
            raise BadInput(_all_rejected(len(found), rejects))
        _limit_rejects(found, rejects, spec)
        plan = save_plan(out, clips, rejects, sources=found, spec=spec, tools=tools)
    _remove_leftovers(out)
    show = _Progress(progress, plan, [s for s in plan.shards if read_record(out, s.number, plan=plan.hash)])

    def report(tally: Tally) -> None:
        own.update(tally)
        show(tally)

    files = {source.name: source.file for source in found}
    write_shards(out, plan, files=files, spec=spec, pool=pool, start=start, advance=report)
    own.update(show.tally, is_done=True)
    if (out / "report.html").exists():  # the last file of a build, so another builder has finished it
        return read_manifest(out)
    manifest = _finish(found, out, plan, spec=spec, tools=tools)
    prepare(out, manifest)
    write_report(out, manifest, sum_tallies([builder.tally for builder in read_builders(out)]), pool=pool)
    _remove_leftovers(out)
    return manifest


class _Progress:
    """Progress bar of written clips, with the speed and the rejects."""

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
            note += f", rejected: {', '.join(f'{count} {reason}' for reason, count in sorted(tally.rejects.items()))}"
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
        raise BadInput(_all_rejected(len(found), rejects))
    _limit_rejects(found, rejects, spec)
    return write_manifest(out, complete, plan.rejects, name=spec.name, spec=spec.model_dump(mode="json"), tools=tools)


def _limit_rejects(found: Sequence[InputFile], rejects: Sequence[RejectRecord], spec: Spec) -> None:
    refused = len({reject.source for reject in rejects})
    if refused > spec.max_rejects * len(found):
        raise BadInput(
            f"{refused} of {len(found)} sources were rejected ({_by_reason(rejects)}), more than "
            f"{spec.max_rejects:.0%}. Repair the sources or increase max_rejects."
        )


ADVICE = {
    Reason.MISSING: "check the paths, which count from the folder of their table or list",
    Reason.UNREACHABLE: "check the addresses and the connection",
    Reason.BAD_LABELS: "correct the labels",
    Reason.BAD_RANGE: "correct the times",
    Reason.SKIPPED: "give sources that are read directly",
    Reason.DUPLICATE: "give other sources, or set dedupe.exact=false",
    Reason.CRASHED: "report it as a bug",
    Reason.CHECK_FAILED: "report it as a bug",
    Reason.TIMED_OUT: "raise timeout_s",
}
"""Next step for reasons other than the file itself and the filter."""


def _all_rejected(sources: int, rejects: Sequence[RejectRecord]) -> str:
    first = rejects[0]
    common = Reason(Counter(reject.reason for reject in rejects).most_common(1)[0][0])
    default = "relax `filter`" if first.stage == "filter" else "repair the sources (docs/datasets.md lists the reasons)"
    return (
        f"none of the {sources} sources can be used ({_by_reason(rejects)}), for example {first.source}: "
        f"{first.reason}, {first.detail}; {ADVICE.get(common, default)}"
    )


def _by_reason(rejects: Sequence[RejectRecord]) -> str:
    counts = Counter(reject.reason for reject in rejects)
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common())


def tool_versions() -> dict[str, str]:
    """Return the versions of all libraries that affect the stored bytes."""
    versions = {name: metadata.version(name) for name in ("av", "decord", "pillow", "pyarrow")}
    versions["ffmpeg"] = str(av.ffmpeg_version_info)
    return versions


def _create_folder(out: Path) -> bool:
    """Create the folder of the corpus, and return whether it was empty.

    Raises:
        BadInput: it is a file, cannot be written, or holds files that are not from a build.
    """
    if re.match(r"[a-z0-9]+:/", str(out)):
        raise BadInput(f"--out {out} is a URL; give a local folder and upload it when it is complete")
    if os.path.exists(out) and not out.is_dir():
        raise BadInput(f"--out {out} is a file; give a folder")
    there = {path.name for path in out.iterdir() if not path.match(".*.tmp")} if os.path.exists(out) else set()
    if there - WRITTEN:
        raise BadInput(f"--out {out} holds other files ({min(there - WRITTEN)}); give an empty or new folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--out {out} cannot be written ({error.strerror}); give another folder") from None
    return not there


def _remove_build(out: Path) -> None:
    """Remove the files of a build that failed without a shard."""
    for name in WRITTEN:
        path = out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        out.rmdir()


@contextlib.contextmanager
def _explain_disk_errors(out: Path) -> Iterator[None]:
    """Turn errors of the file system that a user can resolve into `BadInput`."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise BadInput(
            f"{out} cannot be written ({error.strerror}); free some space or give another --out, then run it again"
        ) from None


@contextlib.contextmanager
def exit_on_signal() -> Iterator[None]:
    """Exit with code 75 on SIGTERM or SIGUSR2, so that temporary files are removed and complete shards kept."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        for other in before:
            signal.signal(other, signal.SIG_IGN)  # a second signal must not interrupt the cleanup
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
