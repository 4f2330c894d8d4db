"""Tables and bar charts of evaluation results."""

from collections.abc import Sequence
from html import escape

from vjepa.evals.base import Result, ScoreRow
from vjepa.evals.registry import title_of
from vjepa.viz import plots
from vjepa_data import html
from vjepa_data.html import Section

TITLE = "Evaluations"


def results_section(results: Sequence[Result], *, how: str) -> Section:
    """Show a table for each evaluation, and bars if it has several tasks.

    Args:
        results: results of a model.
        how: shown if there are no results: the command that makes some.
    """
    if not results:
        return html.note(TITLE, how)
    text = (
        "In brackets: the interval named below each table, or the standard deviation over the seeds of untrained "
        "encoders. Scores that pixels or untrained encoders reach too were not learned."
    )
    return Section(TITLE, text, "".join(_one_result(result) for result in results))


def _one_result(result: Result) -> str:
    columns, tasks = result.columns, result.tasks
    lines = [["task", "score", *map(escape, columns)]]
    for (task, metric), cells in tasks.items():
        values = {name: row.value for name, row in cells.items() if "max over heads" not in name}
        # Bold where one column alone is best. A score that was selected on the reported videos does not count.
        best = [name for name, value in values.items() if value == max(values.values())]
        texts = [_cell(cells.get(name), bold=best == [name]) for name in columns]
        lines.append([escape(task), escape(metric), *texts])
    bars = _bars(result) if len(tasks) > 1 else ""
    return f"<h3>{escape(title_of(result.kind))}</h3>{bars}{html.table(lines)}<p>{escape(_describe(result))}</p>"


def _bars(result: Result) -> str:
    columns = result.columns
    complete = {key: cells for key, cells in result.tasks.items() if set(columns) <= cells.keys()}
    return plots.bars(
        [f"{task}\n{metric}".replace(" ", "\n") for task, metric in complete],
        {
            name: [(row.value, row.low, row.high) for row in (cells[name] for cells in complete.values())]
            for name in columns
        },
        title=title_of(result.kind),
    )


def _cell(row: ScoreRow | None, *, bold: bool) -> str:
    if row is None:
        return ""
    value = f"<b>{row.value:.3f}</b>" if bold else f"{row.value:.3f}"
    return f"{value} <small>{escape(row.uncertainty)}</small>"


def _describe(result: Result) -> str:
    """Describe in a paragraph how a result was measured and of which weights."""
    model = ", ".join(f"{name} {value}" for name, value in result.model.items() if value is not None)
    protocol = "; ".join(f"{name.replace('_', ' ')}: {_plain(value)}" for name, value in result.protocol.items())
    return f"{protocol}. Model: {model}."


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{count} to {name}" for name, count in value.items())
    return str(value)
