"""Result files of evaluations: finding, reading and printing them."""

import json
from pathlib import Path

from vjepa.evals.base import Result
from vjepa.evals.registry import EVALUATIONS
from vjepa.weights.tensors import read_json
from vjepa_data.settings import BadInput

KEYS = {"protocol", "rows", "kind"}


def read_result(file: Path) -> Result:
    """Read a result.

    Raises:
        BadInput: the file holds no result.
    """
    content = read_json(file)
    if not content.keys() >= KEYS:
        raise BadInput(f"{file} is not an evaluation result; give a file that `vjepa eval ... --out` wrote")
    return Result.from_json(content)


def find_results(folder: Path) -> list[Result]:
    """Read all results in a folder, in the order of the registry. Other JSON files are ignored."""
    found = []
    for file in sorted(folder.glob("*.json")):
        try:
            content = json.loads(file.read_text())
        except ValueError:
            continue
        if isinstance(content, dict) and content.keys() >= KEYS:
            found.append(Result.from_json(content))
    order = list(EVALUATIONS)
    return sorted(found, key=lambda result: order.index(result.kind) if result.kind in order else len(order))


def format_table(result: Result) -> str:
    """Format a result as text, with a line for each task and a column for each kind of features."""
    columns = result.columns
    lines = [[result.kind, "", *columns]]
    for (task, metric), cells in result.tasks.items():
        texts = [f"{cells[name].value:.3f} {cells[name].uncertainty}" if name in cells else "" for name in columns]
        lines.append([task, metric, *texts])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
