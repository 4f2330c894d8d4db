"""What runs on the nodes: a supervisor for the processes of a run, and the decision that follows them.

    sbatch script            srun ->  supervisor of rank 0  ->  python -m vjepa train RUN/config.yaml --out RUN
    (first node)                      supervisor of rank 1  ->  ...          (a process each; see supervisor.py)
         |                            ...
         +-- python -m vjepa_launch.port                 once, before srun: where the ranks meet (port.py)
         +-- python -m vjepa_launch.finish_attempt RUN/launch   once, when the step is over: requeue or not

On this machine one supervisor looks after all ranks, and starts them again itself.

A command exits with 0 (done), 1 (failed), 2 (refused its input) or 75 (stopped in good order, and wishes to come back).
"""

import dataclasses
import logging
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from submitit.core.utils import DelayedSubmission

from vjepa_launch import history, snapshot, supervisor
from vjepa_launch.history import BAD_INPUT, DONE, FAILED, STOPPED, Decision, End, Outcome
from vjepa_launch.port import free_port
from vjepa_launch.process_info import (
    ProcessInfo,
    address_of,
    common_environment,
    path_environment,
    rank_environment,
)
from vjepa_launch.settings import BadInput, Restart
from vjepa_launch.supervisor import RankExit, StopSignals

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """What submitit carries to the nodes: data only."""

    run: str
    command: tuple[str, ...]
    """`python` as the first word is the interpreter of the job."""
    code: str
    """Folder of the frozen code."""
    ranks: int
    """Ranks on this machine; on SLURM each has a supervisor of its own."""
    environment: Mapping[str, str] = field(default_factory=dict)
    restart: Restart = field(default_factory=Restart)
    makes_steps: bool = True
    """Whether it hangs when no step was recorded for long."""

    def checkpoint(self) -> DelayedSubmission:
        """What submitit runs after a requeue: the same."""
        return DelayedSubmission(self)

    def __call__(self) -> int:
        speak()
        heard = StopSignals()
        place = ProcessInfo.here()
        if place.slurm:
            return self._on_slurm(place, heard)
        return self._on_this_machine(place, heard)

    def _on_slurm(self, place: ProcessInfo, heard: StopSignals) -> int:
        """One rank of a step. Only a finished run returns: a result file would tell submitit that the job is over."""
        run = Path(self.run)
        if place.rank == 0:
            begin(run, place)
        (ended,) = self._attempt(place, [place.rank], heard)
        outcome = classify_ranks([ended], heard)
        failed = outcome in ("failed", "bad_input")
        if place.rank == 0 or failed:
            history.write_end(run, place.attempt, _end(ended, place, outcome))
        if outcome == "done":
            return DONE
        _leave(exit_code(outcome) if failed else DONE)

    def _on_this_machine(self, place: ProcessInfo, heard: StopSignals) -> int:
        """All ranks of a run, as many times as it takes."""
        run = Path(self.run)
        place = dataclasses.replace(place, world=self.ranks, local_world=self.ranks)
        while True:
            begin(run, place)
            ended = self._attempt(place, range(self.ranks), heard)
            for one in ended:
                history.write_end(run, place.attempt, _end(one, place, classify_ranks([one], heard)))
            decision = record_end(run, place.attempt, classify_ranks(ended, heard), self.restart)
            log.info("attempt %s: %s", place.attempt, decision.why)
            if not decision.requeue:
                return exit_code(classify_ranks(ended, heard))
            heard.signals.clear()
            place = dataclasses.replace(place, restart=place.restart + 1)

    def _attempt(self, place: ProcessInfo, ranks: Sequence[int], heard: StopSignals) -> list[RankExit]:
        """Start the processes of some ranks and wait for them."""
        run = Path(self.run)
        try:
            snapshot.verify(Path(self.code).parent)
            if 0 in ranks:
                owner = _owner(run, place.job)
                if owner != place.job:
                    raise BadInput(f"{run} belongs to job {owner} now, and this is job {place.job}; cancel one of them")
        except BadInput as error:
            log.error("%s", error)
            return [RankExit(rank, BAD_INPUT, str(error)) for rank in ranks]
        port = int(os.environ["MASTER_PORT"]) if place.slurm else free_port()
        address = address_of(place.nodes[0]) if place.slurm else "127.0.0.1"
        inherited = {**os.environ, **common_environment(run), **path_environment(Path(self.code), os.environ)}
        if not place.slurm:
            inherited.pop("CUDA_VISIBLE_DEVICES", None)  # submitit hides all GPUs when none are asked for
        environments = {
            rank: {**inherited, **self.environment, **rank_environment(place, rank, address, port)} for rank in ranks
        }
        python, *rest = self.command
        command = [sys.executable if python == "python" else python, *rest]
        logs = {rank: log_path(run, place.job, rank) for rank in ranks if not place.slurm and rank > 0}
        log.info("attempt %s: ranks %s of %d on %s, rank 0 at %s:%d: %s",
                 place.attempt, list(ranks), place.world, place.node, address, port, " ".join(command))  # fmt: skip
        started = supervisor.start(command, environments, logs)
        stall_s = self.restart.stall_min * 60 if self.makes_steps else math.inf
        ended = supervisor.wait(started, heard, alive=run / "metrics.jsonl", stall_s=stall_s)
        if place.restart == 0:
            return ended
        # What was accepted at the first start is refused for a passing reason (a lock that lingers, a disk that is
        # gone), which is a failure like others.
        return [dataclasses.replace(one, code=FAILED) if one.code == BAD_INPUT else one for one in ended]


def log_path(run: Path, job: str, rank: int) -> Path:
    """Where the output of a rank is; the name is submitit's."""
    return history.launch_folder(run) / f"{job}_{rank}_log.out"


def begin(run: Path, place: ProcessInfo) -> None:
    """Note the start of an attempt."""
    history.append_event(
        run,
        {
            "event": "start",
            "attempt": place.attempt,
            "nodes": list(place.nodes),
            "world": place.world,
            "checkpoint": history.newest_checkpoint(run),
        },
    )


def classify_ranks(ends: Sequence[RankExit], heard: StopSignals) -> Outcome:
    """One word for how ranks ended."""
    bad = [end for end in ends if end.code not in (DONE, STOPPED) and not supervisor.killed_by_us(end.code, heard)]
    if any(end.code == BAD_INPUT for end in bad):
        return "bad_input"
    if bad:
        return "cancelled" if heard.to_end else "failed"
    if all(end.code == DONE for end in ends):
        return "done"
    return "cancelled" if heard.to_end else "stopped"


def _end(ended: RankExit, place: ProcessInfo, outcome: Outcome) -> End:
    return End(ended.rank, place.node, ended.code, outcome, ended.reason, ended.echo, time.time())


def exit_code(outcome: Outcome) -> int:
    return {"done": DONE, "bad_input": BAD_INPUT, "failed": FAILED}.get(outcome, STOPPED)


def record_end(run: Path, attempt: str, outcome: Outcome, rule: Restart, *, unexplained: str = "") -> Decision:
    """Decide what becomes of a run after an attempt, and note it."""
    events = history.read_events(run)
    started = [event for event in events if event["event"] == "start" and event["attempt"] == attempt]
    checkpoint = history.newest_checkpoint(run)
    progress = bool(started) and started[-1]["checkpoint"] != checkpoint
    ends = [end for end in history.read_ends(run, attempt) if end.outcome == outcome]
    first = ends[0] if ends and outcome in ("failed", "bad_input") else None
    event = {
        "event": "end",
        "attempt": attempt,
        "outcome": outcome,
        "checkpoint": checkpoint,
        "progress": progress,
        "reason": f"rank {first.rank} on {first.node}: {first.reason}" if first else unexplained,
        "node": first.node if first and outcome == "failed" else None,
    }
    stop_asked = history.stop_path(run).exists()
    decision = history.decide(events, rule, outcome=outcome, progress=progress, stop_asked=stop_asked)
    if decision.requeue:
        decision = dataclasses.replace(decision, exclude=history.nodes_to_exclude([*events, event], rule))
    history.append_event(run, {**event, "requeue": decision.requeue, "why": decision.why})
    return decision


def _owner(run: Path, job: str) -> str | None:
    """The job that a run folder belongs to. It is noted after the submission, so a job that starts at once waits."""
    owner = None
    for _ in range(30):
        owner = (history.read_json(history.launch_folder(run) / "job.json") or {}).get("job")
        if owner == job:
            break
        time.sleep(1)
    return owner


def speak() -> None:
    """Show what this room has to say; submitit shows its own."""
    shown = logging.StreamHandler(sys.stderr)
    shown.setFormatter(logging.Formatter("%(asctime)s launch: %(message)s"))
    room = logging.getLogger("vjepa_launch")
    room.addHandler(shown)
    room.setLevel(logging.INFO)
    room.propagate = False


def _leave(code: int) -> NoReturn:
    """End at once, without the result file that submitit would write."""
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)
