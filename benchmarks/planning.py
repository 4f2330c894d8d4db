"""Measure plans per second: our CEM and eb_jepa's, with the same model at the same sizes, in one run.

    python benchmarks/planning.py MODEL [--eb-jepa CHECKOUT] [--episodes 8] [--rounds 3]

Both find plans of --horizon steps with --iterations rounds of --samples plans, for the same frames and goals of two
rooms. The planner of eb_jepa (`CEMPlanner` with `ReprTargetDistMPCObjective`) plans episodes in turn, and hands a frame
for each sample to the model, as its `GCAgent.unroll` does. The last row is the same planner with each frame encoded
once, which leaves the difference of batches. A predictor call is a step of the dynamics for one plan. Our
planner evaluates the first guess, rest, and the mean beside its samples, and these count.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import vjepa
from vjepa.planning.agents import PlannerAgent, Planning
from vjepa.planning.planners import Effort
from vjepa.planning.scoring import LearnedScorer, encode
from vjepa.planning.worlds import View, make_world


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--eb-jepa", type=Path, help="folder with a checkout of facebookresearch/eb_jepa")
    parser.add_argument("--episodes", type=int, default=8)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--horizon", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    world, model = make_world("two_room"), vjepa.load(args.model)
    view = world.play(world.tasks(range(args.episodes), seed=0, layout="fixed"), model.px).view()
    effort = Effort(samples=args.samples, iterations=args.iterations)
    planning = Planning("cem", effort, horizon=args.horizon, execute=args.horizon, seed=0)
    agent = PlannerAgent(LearnedScorer(model, "sum"), planning, low=world.low, high=world.high)
    agent.act(view, 0)  # compares blocks of each size with tiles, once
    agent.counts.calls = 0
    seconds = best_time(lambda: agent.act(view, 0), args.rounds)
    report("vjepa", args.episodes, agent.counts.calls / args.rounds, seconds)
    calls = args.episodes * args.samples * args.iterations * args.horizon
    for name, is_once in (("eb_jepa", False), ("eb_jepa, a frame once", True)) if args.eb_jepa else ():
        sys.path.insert(0, str(args.eb_jepa))
        plan = partial(eb_jepa_plans, model, view, args, float(world.high[0]), is_once=is_once)
        theirs = best_time(plan, args.rounds)
        report(name, args.episodes, calls, theirs)
        print(f"plans per second: {theirs / seconds:.1f} times {name}")


def best_time(work: Callable[[], object], rounds: int) -> float:
    """Return the least CPU seconds of a few rounds: other programs on the machine count less than in wall time."""
    found = []
    for _ in range(rounds):
        began = time.process_time()
        work()
        found.append(time.process_time() - began)
    return min(found)


def report(name: str, plans: int, calls: float, seconds: float) -> None:
    print(f"{name:21} {plans / seconds:8.2f} plans and {calls / seconds:9,.0f} predictor calls per CPU second")


@torch.no_grad()
def eb_jepa_plans(
    model: vjepa.WorldModel, view: View, args: argparse.Namespace, largest: float, *, is_once: bool
) -> None:
    """Plan every episode with the planner of eb_jepa."""
    from eb_jepa.planning import (  # pyright: ignore[reportMissingImports]
        CEMPlanner,
        ReprTargetDistMPCObjective,
    )

    def unroll(first: Tensor, actions: Tensor) -> Tensor:
        rollout = model.rollout_from if is_once else model.rollout
        found = rollout(first.repeat(len(actions), 1, 1, 1, 1), actions.transpose(1, 2))
        return found.permute(0, 4, 1, 2, 3)  # [B D T h w]

    for row in range(len(view)):
        one = view.take(slice(row, row + 1))
        now, goal = encode(model, one.frames, one.goals)
        planner = CEMPlanner(
            unroll, n_iters=args.iterations, num_samples=args.samples, plan_length=args.horizon, num_elites=8,
            var_scale=largest, max_norms=[largest], decode_each_iteration=False,
        )  # fmt: skip
        target = goal.permute(0, 3, 1, 2)[:, :, None]  # [1 D 1 h w]
        planner.set_objective(ReprTargetDistMPCObjective(target, sum_all_diffs=True))
        planner.plan(now[:, None] if is_once else torch.from_numpy(np.ascontiguousarray(one.frames))[None])


if __name__ == "__main__":
    main()
