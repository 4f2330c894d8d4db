"""The page of an evaluation of planning: the table, the diagnosis, the energy of actions, films."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from vjepa.atomic import new_file
from vjepa.planning.agents import PlannerAgent
from vjepa.planning.evaluation import LEARNED_TRUE, TRUE_LATENT, Evaluation
from vjepa.planning.films import film
from vjepa.planning.harness import GROUP
from vjepa.planning.landscape import Landscape, energy_landscape
from vjepa.planning.results import HEAD, Row, cells
from vjepa.planning.worlds import SimulatedWorld
from vjepa.viz import plots
from vjepa.viz.plots import Curve
from vjepa_data import html
from vjepa_data.html import Section
from vjepa_data.synthetic.physics import write_video

FILMS = {"failed": 4, "left": 2, "reached": 2}
"""Films of hard tasks, the first of each kind: never at the goal, away from it again at the end,
at it at the end."""


def write_page(found: Evaluation, out: Path) -> Path:
    """Write report.html and its films into the folder of an evaluation, and return the path of the page."""
    settings, model = found.contenders.settings, found.contenders.model
    main = [row for row in found.rows if row.group == GROUP]
    sections = [_table(found), *_distance_curve(found.rows), *_diagnosis(found.rows)]
    world = found.contenders.world
    if model is not None and isinstance(world, SimulatedWorld):
        landscape = energy_landscape(model, world, layout=settings.layout, seed=settings.seed)
        sections += [_energy(landscape), *_films(found, world, out)]
    facts = [(f"{row.agent}, success", f"{100 * row.share:.1f} %") for row in main[:4]]
    name = "no model" if model is None else str(model.provenance.get("run", "model"))
    title = f"Planning in {settings.world}"
    subtitle = f"{name}: {settings.planner}, cost {settings.cost}, {settings.layout} layouts, seed {settings.seed}"
    page = out / "report.html"
    with new_file(page, overwrite=True) as file:
        file.write_text(html.render(title, subtitle, facts, sections))
    return page


def _table(found: Evaluation) -> Section:
    settings, tasks = found.contenders.settings, found.tasks
    text = (
        f"{tasks.drawn:,} tasks were drawn; {tasks.solved:,} of them were at their goal from the start and are left "
        "out. A straight line does not reach the goal of a hard task. Success is the first step at the goal, held is "
        f"being there after all {settings.budget} steps. No agent is told when it arrives. Intervals are Wilson's."
    )
    rows = [list(map(escape, HEAD)), *([escape(cell) for cell in cells(row)] for row in found.rows)]
    return Section("Success", text, html.table(rows))


def _distance_curve(rows: Sequence[Row]) -> list[Section]:
    """Success over the distance of the goal."""
    away = [row for row in rows if row.group.endswith(" steps away")]
    curves = []
    for agent in dict.fromkeys(row.agent for row in away):
        own = [row for row in away if row.agent == agent]
        steps = np.array([float(row.group.split()[0]) for row in own])
        curves.append(Curve(agent, steps, np.array([100 * row.share for row in own])))
    if not curves:
        return []
    svg = plots.plot(curves, title="Success, %", across="steps to the goal", size=(8.9, 2.6))
    return [Section("Distance", "Goals are states of held-out episodes so many steps after the start.", svg)]


def _diagnosis(rows: Sequence[Row]) -> list[Section]:
    share = {row.agent: cells(row) for row in rows if row.group == "diagnosis"}
    if not share:
        return []

    def cell(agent: str) -> str:
        return f"{share[agent][2]} % <small>{escape(share[agent][3])}</small>" if agent in share else "not played"

    table = [
        ["", "true distance", "distance of latents"],
        ["true dynamics", cell("oracle"), cell(TRUE_LATENT)],
        ["learned dynamics", cell(LEARNED_TRUE), cell("model")],
    ]
    text = (
        "Where success falls from left to right, the latents are at fault. Where it falls from top to bottom, the "
        "predictor is. States are read from predicted latents by a linear map."
    )
    return [Section("True and learned dynamics", text, html.table(table))]


def _energy(found: Landscape) -> Section:
    text = (
        "Distance of the predicted latent from the goal, for each action, darker for less. The axes are the first two "
        "columns of the action. The cross is the true action, the ring the minimum. "
        f"Median over {len(found.true)} starts: {np.median(found.distances):.2f} of the "
        f"largest action apart, {np.median(found.angles):.0f} degrees."
    )
    return Section("Energy of actions", text, _draw_landscape(found))


def _draw_landscape(found: Landscape, count: int = 4) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.9, 2.4), layout="constrained")
    for number, axes in enumerate(figure.subplots(1, count)):
        x, y = found.values
        axes.contourf(x, y, found.energies[number].T, levels=16, cmap="Blues_r")
        axes.plot(*found.true[number], marker="x", color=plots.COLOURS[1], markersize=8, markeredgewidth=2)
        axes.plot(*found.best[number], marker="o", color="white", markersize=8, fillstyle="none", markeredgewidth=2)
        axes.set_aspect("equal")
        axes.invert_yaxis()  # y points down in frames
        axes.set_xticks([])
        axes.set_yticks([])
    return plots.as_svg(figure)


def _films(found: Evaluation, world: SimulatedWorld, out: Path) -> list[Section]:
    """Play some hard tasks again and write their films."""
    settings, model = found.contenders.settings, found.contenders.model
    assert model is not None
    agent = found.contenders.agents()["model"]()
    if not isinstance(agent, PlannerAgent):
        return []
    own = [line for line in found.lines if (line["agent"], line["group"]) == ("model", GROUP)]
    at_goal = np.concatenate([line["distances"] for line in own]) < world.goal_distance
    is_reached = np.asarray(np.any(at_goal, axis=1))
    kinds = np.select([~is_reached, ~at_goal[:, -1]], ["failed", "left"], "reached")
    rows = [(kind, int(row)) for kind, count in FILMS.items() for row in np.flatnonzero(kinds == kind)[:count]]
    folder, parts = out / "films", []
    folder.mkdir(exist_ok=True)
    for kind, row in rows:
        task = found.tasks.groups[GROUP].take(slice(row, row + 1))
        shown = film(world, agent, task, px=model.px, budget=settings.budget)
        path = folder / f"{kind}_{task.numbers[0]:06d}.mp4"
        write_video(path, shown.frames, fps=10)
        strip = plots.strip(shown.frames[plots.evenly(len(shown.frames))], height=plots.STRIP_PX)
        caption = f'<figcaption><a href="films/{path.name}">{path.name}</a></figcaption>'
        width = shown.frames.shape[2]
        player = f'<video src="films/{path.name}" width="{width}" controls muted preload="metadata"></video>'
        pictures = f'<div class="wide"><img src="{plots.jpeg(strip)}" alt="{path.name}"></div>'
        parts.append(f"<figure>{caption}{player}{pictures}</figure>")
    failures = int((~is_reached).sum())
    numbers = ", ".join(str(int(n)) for n in found.tasks.groups[GROUP].numbers[~is_reached][:100])
    text = (
        "Left the frame with the best plan in blue and the next best in grey, as the true world would carry them out; "
        f"right the goal; below the cost of each plan. {failures} of {len(is_reached)} hard tasks failed"
        f"{': ' + numbers if failures else ''}, and {int((kinds == 'left').sum())} left their goal again."
    )
    return [Section("Films", text, "".join(parts))]
