"""Tables and bars of what evaluations found."""

from collections.abc import Sequence
from html import escape

from vjepa.evals.results import TITLES, Result, Row, tasks_of, uncertainty
from vjepa.viz import plots
from vjepa_data import html
from vjepa_data.html import Section

TITLE = "What the features are worth"


def results_section(results: Sequence[Result], *, how: str) -> Section:
    """One table for each evaluation, and bars of the linear probes.

    Args:
        results: as `vjepa.evals.results.find_results` gives them.
        how: what to say if there are none.
    """
    if not results:
        return html.note(TITLE, how)
    body = "".join(_one(result) for result in results)
    text = (
        "In brackets: the interval that stands below each table; for an untrained encoder probed several times, the "
        "deviation over its seeds. What pixels or an untrained encoder can do was not learned."
    )
    return Section(TITLE, text, body)


def _one(result: Result) -> str:
    columns, tasks = tasks_of(result["rows"])
    lines = [["task", "score", *map(escape, columns)]]
    for (task, metric), cells in tasks.items():
        values = {name: row["value"] for name, row in cells.items() if "max over heads" not in name}
        # Bold where one column alone is best; a choice made on the reported videos is not praised.
        best = [name for name, value in values.items() if value == max(values.values())]
        texts = [_cell(cells.get(name), bold=best == [name]) for name in columns]
        lines.append([escape(task), escape(metric), *texts])
    title = TITLES.get(result["kind"]) or str(result["kind"])
    bars = _bars(columns, tasks) if result["kind"] == "probe" else ""
    return f"<h3>{escape(title)}</h3>{bars}{html.table(lines)}<p>{escape(_protocol(result))}</p>"


def _bars(columns: Sequence[str], tasks: dict[tuple[str, str], dict[str, Row]]) -> str:
    whole = {key: cells for key, cells in tasks.items() if set(columns) <= cells.keys()}
    return plots.bars(
        [f"{task}\n{metric}".replace(" ", "\n") for task, metric in whole],
        {
            name: [(row["value"], row["low"], row["high"]) for row in (cells[name] for cells in whole.values())]
            for name in columns
        },
        title="Linear readouts of frozen features",
    )


def _cell(row: Row | None, *, bold: bool) -> str:
    if row is None:
        return ""
    value = f"<b>{row['value']:.3f}</b>" if bold else f"{row['value']:.3f}"
    return f"{value} <small>{escape(uncertainty(row))}</small>"


def _protocol(result: Result) -> str:
    """How it was measured, in one sentence: whatever the protocol says, and of which weights."""
    model = ", ".join(f"{name} {value}" for name, value in result["model"].items() if value is not None)
    said = "; ".join(f"{name.replace('_', ' ')}: {_plain(value)}" for name, value in result["protocol"].items())
    return f"{said}. Model: {model}."


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{count} to {side}" for side, count in value.items())
    return str(value)
