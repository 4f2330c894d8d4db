"""A page about a corpus, in one file: totals, histograms, a contact sheet, and what was refused."""

import base64
import html
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vjepa_data.atomic import atomic_write
from vjepa_data.builder.status import Tally, counted, lasting, read_builders, size, total
from vjepa_data.config_files import one_line
from vjepa_data.corpus.format import Manifest, read_manifest
from vjepa_data.decoding.backends import Expect
from vjepa_data.media.fetch import FileRef
from vjepa_data.media.pool import WorkerPool
from vjepa_data.media.tasks import Strip, StripTask
from vjepa_data.media.video import Refused

SHEET_CLIPS, SHEET_FRAMES, SHEET_PX = 64, 4, 72

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #222 }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem } code { font-size: 90% }
table { border-collapse: collapse } td, th { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top }
td.n { text-align: right; font-variant-numeric: tabular-nums }
.sheet { display: flex; flex-wrap: wrap; gap: 4px } .sheet img { height: 72px; display: block }
"""


def write_report(folder: Path, manifest: Manifest, tally: Tally, *, pool: WorkerPool[Any, Any]) -> Path:
    """Write `report.html` beside the manifest.

    Args:
        folder: the corpus.
        manifest: what was written.
        tally: what all builders did for it.
        pool: processes that decode the contact sheet.
    """
    atomic_write(folder / "report.html", _page(folder, manifest, tally, pool).encode())
    return folder / "report.html"


def report_corpus(folder: Path) -> str:
    """The page of a corpus that is there already, as HTML.

    Raises:
        BadInput: there is no corpus, or its files are damaged.
    """
    with WorkerPool("vjepa_data.media.tasks", workers=1, timeout_s=60.0) as pool:
        return _page(folder, read_manifest(folder), total([one.tally for one in read_builders(folder)]), pool)


def _page(folder: Path, manifest: Manifest, tally: Tally, pool: WorkerPool[Any, Any]) -> str:
    samples = pq.read_table(folder / "samples.parquet")  # as columns: there may be millions
    rejects = pq.read_table(folder / "rejects.parquet").to_pylist()
    strips = _strips(folder, manifest, samples, pool)
    parts = [
        f"<h1>{html.escape(manifest.name)}</h1>",
        _table([[key, value] for key, value in _totals(manifest, samples, rejects, tally)]),
        "<h2>Clips</h2>",
        f'<img src="data:image/png;base64,{_histograms(samples, strips)}" width="100%">',
        f"<h2>{len(strips)} clips, {SHEET_FRAMES} frames of each</h2>",
        '<div class="sheet">'
        + "".join(
            f'<img loading="lazy" title="{html.escape(row["key"])} {html.escape(row["labels"][:200])}" '
            f'src="data:image/jpeg;base64,{base64.b64encode(strip.jpeg).decode()}">'
            for row, strip in strips
        )
        + "</div>",
        f"<h2>{len(rejects)} refused</h2>",
        _reject_table(rejects),
        "<h2>Spec</h2>",
        _table([[key, value] for key, value in _flat(manifest.spec)]),
    ]
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(manifest.name)}</title>"
        f"<style>{STYLE}</style>{''.join(parts)}</html>\n"
    )


def _totals(
    manifest: Manifest, samples: pa.Table, rejects: Sequence[dict[str, Any]], tally: Tally
) -> list[tuple[str, str]]:
    total = int(samples["video_size"].to_numpy().sum())
    lines = [("Corpus", manifest.hash)]
    for split, counts in manifest.splits.items():
        clips, shards = counted(int(counts["samples"]), "clip"), counted(int(counts["shards"]), "shard")
        lines.append((split, f"{clips} in {shards}, {lasting(counts['seconds'])}"))
    lines.append(("Video", f"{size(total)}, {size(total / max(1, len(samples)))} a clip"))
    refused = counted(len({reject["source"] for reject in rejects}), "source")
    lines.append(("Refused", f"{len(rejects)}, from {refused}"))
    if tally.clips:
        cost = f"{tally.encode_s:.1f} s to encode and {tally.check_s:.1f} s to check {tally.video_s:.0f} s of video"
        lines.append(
            ("CPU time", f"{cost}: {tally.clips / max(1e-3, tally.encode_s + tally.check_s):.2f} clips a second")
        )
    lines.append(("Tools", ", ".join(f"{name} {version}" for name, version in manifest.tools.items())))
    return lines


def _strips(
    folder: Path, manifest: Manifest, samples: pa.Table, pool: WorkerPool[Any, Any]
) -> list[tuple[dict[str, Any], Strip]]:
    """Clips at equal distances in the table, which is shuffled already."""
    count = min(SHEET_CLIPS, len(samples))
    chosen = samples.take([i * len(samples) // count for i in range(count)]).to_pylist()
    tasks = [
        StripTask(
            key=row["key"],
            place=FileRef(str(folder / manifest.shards[row["shard"]].file), row["video_offset"], row["video_size"]),
            suffix=row["suffix"],
            expect=Expect(row["frames"], row["width"], row["height"]),
            frames=glances(row["frames"]),
            height_px=SHEET_PX,
        )
        for row in chosen
    ]
    answers = [answer for _, answer in pool.map(tasks)]
    return [(row, answer) for row, answer in zip(chosen, answers, strict=True) if not isinstance(answer, Refused)]


def glances(frames: int) -> tuple[int, ...]:
    """Numbers of a few frames spread over a clip; fewer where it has fewer."""
    count = min(SHEET_FRAMES, frames)
    return tuple((2 * i + 1) * frames // (2 * count) for i in range(count))


def _histograms(samples: pa.Table, strips: Sequence[tuple[dict[str, Any], Strip]]) -> str:
    """Six histograms as a base64 PNG."""
    figure = Figure(figsize=(13, 5), dpi=90, layout="constrained")
    names = ("duration_s", "fps", "width", "height", "video_size")
    seconds, fps, width, height, length = (samples[name].to_numpy() for name in names)
    panels = [
        ("length (s)", seconds),
        ("frames per second", fps),
        ("width / height", width / height),
        ("size (kB)", length / 1e3),
        ("bit rate (kbit/s)", length * 8e-3 / np.maximum(seconds, 1e-3)),
        (f"CPU ms to decode {SHEET_FRAMES} frames (contact sheet)", [1e3 * strip.decode_s for _, strip in strips]),
    ]
    for axes, (name, values) in zip(figure.subplots(2, 3).flat, panels, strict=True):
        counts, _, _ = axes.hist(values, bins=30, color="#3b6ea5")
        axes.set_xlabel(name)
        if max(counts) > 100:
            axes.set_yscale("symlog", linthresh=10)
        else:
            axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return base64.b64encode(file.getvalue()).decode()


def _reject_table(rejects: Sequence[dict[str, Any]]) -> str:
    if not rejects:
        return "<p>Nothing.</p>"
    counts = Counter((reject["stage"], reject["reason"]) for reject in rejects)
    lines = [["<b>stage</b>", "<b>reason</b>", "<b>count</b>", "<b>examples</b>"]]
    for (stage, reason), count in counts.most_common():
        found = [r for r in rejects if (r["stage"], r["reason"]) == (stage, reason)][:3]
        examples = "<br>".join(f"<code>{html.escape(r['source'])}</code>: {html.escape(r['detail'])}" for r in found)
        lines.append([stage, reason, str(count), examples])
    return _table(lines, is_html=True)


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    lines: list[tuple[str, str]] = []
    for name, value in values.items():
        lines.extend(
            _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(f"{prefix}{name}", one_line(value))]
        )
    return lines


def _table(lines: Sequence[Sequence[str]], *, is_html: bool = False) -> str:
    rows = ["".join(f"<td>{cell if is_html else html.escape(cell)}</td>" for cell in line) for line in lines]
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"
