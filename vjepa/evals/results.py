"""What evaluations write: one JSON file each, told apart by `kind`, with the same rows for tables everywhere.

{"format": 1, "kind": "probe"|"attentive"|"knn", "model": {...}, "protocol": {...}, "rows": [
    {"task": "shape", "metric": "accuracy", "features": "pretrained", "value": 0.9, "low": 0.8, "high": 0.95}, ...]}
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vjepa.weights.native import VideoEncoder
from vjepa.weights.tensors import read_json
from vjepa_data.settings import BadInput

log = logging.getLogger(__name__)

Result = dict[str, Any]
Row = Mapping[str, Any]

TITLES = {"probe": "Linear probes", "attentive": "Attentive probe", "knn": "Nearest neighbours"}


def about_model(path: Path, encoder: VideoEncoder) -> dict[str, Any]:
    """Which model a result is about."""
    return {"path": str(path), **{key: encoder.provenance.get(key) for key in ("part", "run", "step")}}


def score_row(task: str, features: str, value: float, low: float, high: float, *, videos: int) -> dict[str, Any]:
    """One accuracy with its interval."""
    return {
        "task": task, "metric": "accuracy", "features": features,
        "value": value, "low": low, "high": high, "clips": videos,
    }  # fmt: skip


def read_result(file: Path) -> Result:
    """One result from its file.

    Raises:
        BadInput: there is none.
    """
    content = read_json(file)
    if not {"protocol", "rows", "kind"} <= content.keys():
        raise BadInput(f"{file} holds no result of an evaluation; give a file that `vjepa eval ... --out` wrote")
    return content


def find_results(folder: Path) -> list[Result]:
    """The results that lie in a folder, probes first; what is no result is passed over."""
    found = []
    for file in sorted(folder.glob("*.json")):
        try:
            content = json.loads(file.read_text())
        except ValueError:
            continue
        if isinstance(content, dict) and {"protocol", "rows", "kind"} <= content.keys():
            found.append(content)
    return sorted(found, key=lambda one: list(TITLES).index(one["kind"]) if one["kind"] in TITLES else len(TITLES))


def tasks_of(
    rows: Sequence[Mapping[str, Any]],
) -> tuple[list[str], dict[tuple[str, str], dict[str, Mapping[str, Any]]]]:
    """Names of the columns, and for each task and metric the row of each column that has one."""
    columns = list(dict.fromkeys(row["features"] for row in rows))
    cells: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        cells.setdefault((row["task"], row["metric"]), {})[row["features"]] = row
    return columns, cells


def uncertainty(row: Row) -> str:
    """The deviation over seeds where there are several, else the interval."""
    if seeds := row.get("seeds"):
        return f"±{np.std(seeds):.3f} ({len(seeds)} seeds)"
    return f"[{row['low']:.3f} {row['high']:.3f}]"


def table(result: Mapping[str, Any]) -> str:
    """A result as text, a task a line and a column for each kind of features: value [low high]."""
    columns, tasks = tasks_of(result["rows"])
    lines = [[result["kind"], "", *columns]]
    for (task, metric), cells in tasks.items():
        texts = [f"{cells[name]['value']:.3f} {uncertainty(cells[name])}" if name in cells else "" for name in columns]
        lines.append([task, metric, *texts])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
