"""The verb `vjepa plan`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter, Token

from vjepa.cli.app import Count, Number, Overwrite, Part, verb


def parse_words(kind: Any, tokens: Sequence[Token]) -> tuple[str, ...]:
    """Split words at commas."""
    return tuple(word for token in tokens for word in token.value.split(",") if word)


def parse_numbers(kind: Any, tokens: Sequence[Token]) -> tuple[int, ...]:
    """Split whole numbers at commas."""
    words = parse_words(kind, tokens)
    for word in words:
        if not word.isdecimal() or not int(word):
            raise ValueError(f"{word!r} is not a whole number of at least 1")
    return tuple(int(word) for word in words)


@verb("plan", example="plan runs/lewm_two_room --world two_room --against random,straight,oracle --out plan")
def plan(
    model: Path | None = None,
    /,
    *,
    out: Path,
    world: str = "two_room",
    layout: Literal["fixed", "random", "held_out"] = "fixed",
    planner: Literal["cem", "icem", "mppi", "sampling", "adam", "inverse"] = "cem",
    cost: Literal["last", "sum", "min", "temporal"] = "min",
    episodes: Count = 200,
    against: Annotated[tuple[str, ...], Parameter(converter=parse_words, n_tokens=1, metavar="A,B")] = (
        "random", "straight", "oracle",
    ),
    horizon: Count = 20,
    execute: Count = 4,
    budget: Count = 40,
    samples: Count | None = None,
    elites: Count | None = None,
    iterations: Count | None = None,
    distances: Annotated[tuple[int, ...], Parameter(converter=parse_numbers, n_tokens=1, metavar="5,10")] = (
        5, 10, 20, 40,
    ),
    per_distance: Number = 0,
    diagnose: Number = 0,
    seed: Number = 0,
    data_seed: Number = 0,
    data_episodes: Count = 400,
    batch: Count = 25,
    device: str | None = None,
    part: Part = "target",
    overwrite: Overwrite = False,
) -> None:  # fmt: skip
    """Plan with a world model in closed loop, and print the success compared with other agents.

    Args:
        model: A run, a checkpoint or an export of lewm or dynamics. Without a model, the other agents are played.
        out: Folder for the result. An interrupted evaluation continues there.
        world: two_room, push, or gym:ID for an environment of gymnasium.
        layout: Layouts of the tasks. held_out layouts are never drawn by random.
        planner: How actions are found. inverse takes them from an inverse model, without search.
        cost: Cost of a plan.
        episodes: Tasks that a straight line does not solve. A quarter as many that it solves are reported apart.
        against: Other agents: random, straight, oracle, cloning, inverse, untrained, shuffled.
        horizon: Steps of a plan.
        execute: Steps that are carried out before the next plan.
        budget: Steps of an episode.
        samples: Plans of an iteration. By default as the planner was tuned, as for the next two.
        elites: Best plans, to which cem and icem fit the next plans.
        iterations: Rounds of a plan.
        distances: Goals so many steps away are played too.
        per_distance: Tasks of each of these distances.
        diagnose: Tasks on which true and learned dynamics meet true and latent costs.
        seed: Seed of the tasks and of all draws.
        data_seed: Seed of the episodes that cloning, inverse model and temporal distance learn from.
        data_episodes: Number of these episodes.
        batch: Episodes between two records. Results do not depend on it.
        device: Device to compute on. By default a GPU, if any.
    """
    from vjepa.cli.models import usable_device
    from vjepa.planning.evaluation import AGAINST, Against, PlanSettings, effort_of, evaluate, format_rows
    from vjepa.progress import progress
    from vjepa.report.planning import write_page
    from vjepa_data.errors import BadInput

    unknown = [name for name in against if name not in AGAINST]
    if unknown:
        raise BadInput(f"--against {unknown[0]!r} is not an agent; give some of {','.join(AGAINST)}")
    others: tuple[Against, ...] = tuple(name for name in AGAINST if against.count(name))
    settings = PlanSettings(
        world=world, layout=layout, planner=planner, cost=cost, horizon=horizon, execute=execute, budget=budget,
        effort=effort_of(planner, samples=samples, elites=elites, iterations=iterations), episodes=episodes,
        against=others, distances=distances, per_distance=per_distance, diagnose=diagnose, seed=seed,
        data_seed=data_seed, data_episodes=data_episodes,
    )  # fmt: skip
    found = evaluate(model, settings, out, part=part, batch=batch, device=usable_device(device), overwrite=overwrite)
    print(format_rows(found.rows))
    with progress("draw pictures"):
        page = write_page(found, out)
    print(page)
