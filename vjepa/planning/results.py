"""The table of an evaluation, from the records of its episodes.

Letters: E episodes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vjepa.evals.ridge import wilson


@dataclass(frozen=True)
class Row:
    """An agent on a group of tasks."""

    agent: str
    group: str
    episodes: int
    reached: int
    """Episodes that were at the goal at any step."""

    held: int
    """Episodes that were at the goal when their budget ended."""

    low: float
    high: float
    """95 % interval of the share that was reached (Wilson)."""

    held_low: float
    held_high: float
    """95 % interval of the share that was held."""

    median_steps: float | None
    """Median of the first step at the goal, over the episodes that reached it."""

    seconds: float
    """Time of all episodes, with rendering and simulation."""

    plans: int
    calls: int
    """Steps of dynamics that planning took."""

    @property
    def share(self) -> float:
        """Share of the episodes that reached the goal."""
        return self.reached / self.episodes

    def to_json(self) -> dict[str, Any]:
        """Return the row as it is written to plan.json."""
        return asdict(self) | {"share": self.share}


def make_row(lines: Sequence[Mapping[str, Any]], *, agent: str, group: str, goal_distance: float) -> Row | None:
    """Return the row of an agent and a group, or None if it has no episode."""
    own = [line for line in lines if (line["agent"], line["group"]) == (agent, group)]
    if not own:
        return None
    at_goal = np.asarray(np.concatenate([line["distances"] for line in own]) < goal_distance)
    is_reached = np.asarray(np.any(at_goal, axis=1))
    (low, high), (held_low, held_high) = (
        wilson(float(share.mean()), len(share)) for share in (is_reached, at_goal[:, -1])
    )
    first = at_goal.argmax(1)[is_reached]
    return Row(
        agent=agent,
        group=group,
        episodes=len(is_reached),
        reached=int(is_reached.sum()),
        held=int(at_goal[:, -1].sum()),
        low=max(0.0, low),
        high=min(1.0, high),
        held_low=max(0.0, held_low),
        held_high=min(1.0, held_high),
        median_steps=float(np.median(first)) if len(first) else None,
        seconds=round(sum(line["seconds"] for line in own), 3),
        plans=sum(line["plans"] for line in own),
        calls=sum(line["calls"] for line in own),
    )


def make_rows(
    lines: Sequence[Mapping[str, Any]], *, agents: Sequence[str], groups: Sequence[str], goal_distance: float
) -> list[Row]:
    """Return the rows of all agents and groups that were played."""
    found = [
        make_row(lines, agent=agent, group=group, goal_distance=goal_distance) for group in groups for agent in agents
    ]
    return [row for row in found if row is not None]


HEAD = ("tasks", "agent", "success %", "95 % interval", "held %", "95 %", "steps", "plans/s", "calls/s")


def cells(row: Row) -> tuple[str, ...]:
    """Return a row as text, in the order of HEAD."""
    return (
        row.group,
        row.agent,
        f"{100 * row.share:.1f}",
        f"{100 * row.low:.1f} to {100 * row.high:.1f} ({row.reached}/{row.episodes})",
        f"{100 * row.held / row.episodes:.1f}",
        f"{100 * row.held_low:.1f} to {100 * row.held_high:.1f}",
        "" if row.median_steps is None else f"{row.median_steps:g}",
        f"{row.plans / row.seconds:.1f}" if row.plans and row.seconds else "",
        f"{row.calls / row.seconds:,.0f}" if row.calls and row.seconds else "",
    )


def format_rows(rows: Sequence[Row]) -> str:
    """Format rows as a table of text."""
    lines = [HEAD, *(cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEAD))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
