"""Stage 5 of a build: render a page about a corpus with totals, histograms, a contact sheet and the rejects."""

import base64
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vjepa_data import html
from vjepa_data.atomic import atomic_write
from vjepa_data.builder.status import (
    Tally,
    format_bytes,
    format_count,
    format_duration,
    read_builders,
    sum_tallies,
)
from vjepa_data.config_files import one_line
from vjepa_data.corpus.format import Manifest, read_manifest
from vjepa_data.decoding.backends import Expect
from vjepa_data.html import Section
from vjepa_data.media.fetch import FileRef
from vjepa_data.media.pool import WorkerPool
from vjepa_data.media.tasks import Strip, StripTask
from vjepa_data.media.video import Refused

SHEET_CLIPS, SHEET_FRAMES, SHEET_PX = 64, 4, 72

PLOT_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.edgecolor": "#e4e8ee",
    "xtick.color": "#6b7585",
    "ytick.color": "#6b7585",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
}


def write_report(folder: Path, manifest: Manifest, tally: Tally, *, pool: WorkerPool[Any, Any]) -> None:
    """Write `report.html` next to the manifest.

    Args:
        folder: folder of the corpus.
        manifest: the manifest that was written.
        tally: total work of all builders.
        pool: processes that decode the contact sheet.
    """
    atomic_write(folder / "report.html", _render(folder, manifest, tally, pool).encode())


def report_corpus(folder: Path) -> str:
    """Render the page of an existing corpus, as HTML.

    Raises:
        BadInput: there is no corpus, or its files are damaged.
    """
    tally = sum_tallies([builder.tally for builder in read_builders(folder)])
    with WorkerPool("vjepa_data.media.tasks", workers=1, timeout_s=60.0) as pool:
        return _render(folder, read_manifest(folder), tally, pool)


def _render(folder: Path, manifest: Manifest, tally: Tally, pool: WorkerPool[Any, Any]) -> str:
    samples = pq.read_table(folder / "samples.parquet")  # as columns: there may be millions
    rejects = pq.read_table(folder / "rejects.parquet").to_pylist()
    strips = _strips(folder, manifest, samples, pool)
    seconds = sum(counts["seconds"] for counts in manifest.splits.values())
    facts = [
        ("clips", f"{len(samples):,}"),
        ("of video", format_duration(seconds)),
        ("in shards", format_bytes(sum(shard.bytes for shard in manifest.shards))),
        ("shards", f"{len(manifest.shards):,}"),
        ("rejected", f"{len(rejects):,}"),
    ]
    images = [
        (f"{row['key']} {row['labels'][:200]}", f"data:image/jpeg;base64,{base64.b64encode(strip.jpeg).decode()}")
        for row, strip in strips
    ]
    cause = "An unusable source or clip never stops a build."
    settings = "\n".join(f"{name} = {value}" for name, value in _flatten(manifest.spec))
    spec = f"<details><summary>All settings</summary><pre>{escape(settings)}</pre></details>"
    sections = [
        Section("Corpus", "", html.values(_totals(manifest, samples, rejects, tally))),
        Section("Clips", "Each panel counts clips.", f'<div class="grid">{_histograms(samples, strips)}</div>'),
        Section(f"{len(strips)} clips, {SHEET_FRAMES} frames of each", "Hover for key and labels.", html.sheet(images)),
        Section(f"{len(rejects)} rejected", cause if rejects else "", _reject_table(rejects) if rejects else ""),
        Section("Spec", "The same sources and settings give the same corpus.", spec),
    ]
    return html.render(manifest.name, f"Corpus {manifest.hash}", facts, sections)


def _totals(
    manifest: Manifest, samples: pa.Table, rejects: Sequence[dict[str, Any]], tally: Tally
) -> list[tuple[str, str]]:
    size = int(samples["video_size"].to_numpy().sum())
    lines: list[tuple[str, str]] = []
    for split, counts in manifest.splits.items():
        clips, shards = format_count(int(counts["samples"]), "clip"), format_count(int(counts["shards"]), "shard")
        lines.append((split, f"{clips} in {shards}, {format_duration(counts['seconds'])}"))
    lines.append(("Video", f"{format_bytes(size)}, {format_bytes(size / max(1, len(samples)))} per clip"))
    sources = format_count(len({reject["source"] for reject in rejects}), "source")
    lines.append(("Rejected", f"{len(rejects)}, from {sources}"))
    if tally.clips:
        cost = f"{tally.encode_s:.1f} s to encode and {tally.check_s:.1f} s to check {tally.video_s:.0f} s of video"
        speed = tally.clips / max(1e-3, tally.encode_s + tally.check_s)
        lines.append(("CPU time", f"{cost}, {speed:.2f} clips per second and core"))
    lines.append(("Tools", ", ".join(f"{name} {version}" for name, version in manifest.tools.items())))
    return lines


def _strips(
    folder: Path, manifest: Manifest, samples: pa.Table, pool: WorkerPool[Any, Any]
) -> list[tuple[dict[str, Any], Strip]]:
    """Render clips at equal distances in the table, which is shuffled already."""
    count = min(SHEET_CLIPS, len(samples))
    chosen = samples.take([i * len(samples) // count for i in range(count)]).to_pylist()
    tasks = [
        StripTask(
            key=row["key"],
            file=FileRef(str(folder / manifest.shards[row["shard"]].file), row["video_offset"], row["video_size"]),
            suffix=row["suffix"],
            expect=Expect(row["frames"], row["width"], row["height"]),
            frames=_spread_frames(row["frames"]),
            height_px=SHEET_PX,
        )
        for row in chosen
    ]
    answers = [answer for _, answer in pool.map(tasks)]
    return [(row, answer) for row, answer in zip(chosen, answers, strict=True) if not isinstance(answer, Refused)]


def _spread_frames(frames: int) -> tuple[int, ...]:
    """Choose a few frame numbers spread evenly over a clip."""
    count = min(SHEET_FRAMES, frames)
    return tuple((2 * i + 1) * frames // (2 * count) for i in range(count))


def _histograms(samples: pa.Table, strips: Sequence[tuple[dict[str, Any], Strip]]) -> str:
    names = ("duration_s", "fps", "width", "height", "video_size")
    seconds, fps, width, height, size = (samples[name].to_numpy() for name in names)
    panels = {
        "length (s)": seconds,
        "frames per second": fps,
        "width / height": width / height,
        "size (kB)": size / 1e3,
        "bit rate (kbit/s)": size * 8e-3 / np.maximum(seconds, 1e-3),
        f"CPU ms to decode {SHEET_FRAMES} frames (contact sheet)": [1e3 * strip.decode_s for _, strip in strips],
    }
    return "".join(_histogram(name, values) for name, values in panels.items())


def _histogram(name: str, values: np.ndarray | Sequence[float]) -> str:
    """Draw a histogram as SVG."""
    with matplotlib.rc_context(PLOT_STYLE):
        figure = Figure(figsize=(4.8, 1.7), layout="constrained")
        axes = figure.subplots()
        counts, _, _ = axes.hist(values, bins=30, color="#2563eb", rwidth=0.9)
        axes.tick_params(length=0)
        if max(counts) > 100:
            axes.set_yscale("symlog", linthresh=10)
        else:
            axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    return f"<figure><figcaption>{escape(name)}</figcaption>{svg[svg.index('<svg') :]}</figure>"


def _reject_table(rejects: Sequence[dict[str, Any]]) -> str:
    rows = [["stage", "reason", "count", "examples"]]
    for (stage, reason), count in Counter((reject["stage"], reject["reason"]) for reject in rejects).most_common():
        found = [r for r in rejects if (r["stage"], r["reason"]) == (stage, reason)][:3]
        examples = "<br>".join(f"<code>{escape(r['source'])}</code>: {escape(r['detail'])}" for r in found)
        rows.append([stage, f"<code>{reason}</code>", str(count), examples])
    return html.table(rows)


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", one_line(value)
