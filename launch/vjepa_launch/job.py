"""The job that runs on the nodes: supervise the ranks of a run and record how they end.

    sbatch script            srun ->  supervisor of rank 0  ->  python -m vjepa train RUN/config.yaml --out RUN
    (first node)                      supervisor of rank 1  ->  ...                 (one process per rank)
         |                            ...
         +-- python -m vjepa_launch.port                        once, before srun: the port where the ranks meet
         +-- python -m vjepa_launch.finish_attempt RUN/launch   once, after srun: requeue or end

On a single machine a single supervisor has all ranks and restarts them itself.
"""

import dataclasses
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from submitit.core.utils import DelayedSubmission

from vjepa_launch import history, policy, snapshot, supervisor
from vjepa_launch.policy import BAD_INPUT, DONE, FAILED, Outcome, RankExit
from vjepa_launch.port import free_port
from vjepa_launch.process_info import (
    ProcessInfo,
    code_environment,
    common_environment,
    rank_environment,
    reachable_address,
)
from vjepa_launch.settings import BadLaunch, Restart

log = logging.getLogger(__name__)

TORCHRUN = ("TORCHELASTIC_",)
"""Variables of an enclosing torchrun, whose store the ranks would join."""

OWNER_TRIES = 30
"""Seconds to wait for job.json, which is written after the submission. A job may start before."""


@dataclass(frozen=True)
class Job:
    """The function that submitit pickles and calls on the nodes. It holds data only."""

    run: str
    command: tuple[str, ...]
    """Command of each rank. `python` as its first word stands for the interpreter of the job."""
    code: str
    """Folder of the frozen code."""
    ranks: int
    """Number of ranks on a single machine. On SLURM each rank has its own supervisor."""
    environment: Mapping[str, str] = field(default_factory=dict)
    restart: Restart = field(default_factory=Restart)
    makes_steps: bool = True
    """True if the command records steps, so that a long time without a step is a stall."""
    cores: int | None = None
    """CPU cores that each rank asks for."""

    def checkpoint(self) -> DelayedSubmission:
        """Return the job that submitit runs after a requeue: the same job."""
        return DelayedSubmission(self)

    def __call__(self) -> int:
        log_to_stderr()
        received = supervisor.catch_stop_signals()
        info = ProcessInfo.from_environment()
        return self._run_on_slurm(info, received) if info.slurm else self._run_on_this_machine(info, received)

    def _run_on_slurm(self, info: ProcessInfo, received: set[int]) -> int:
        """Run a rank of a SLURM step.

        Return only if the run is done. Returning writes a result file, which tells submitit that the job is over.
        """
        run = Path(self.run)
        if info.rank == 0:
            history.record_start(run, info.attempt, nodes=info.nodes, world=info.world)
        (rank_exit,) = self._run_attempt(info, [info.rank], received)
        # Nothing is left to save. When Python exits, it restores the default action, by which USR2 would kill it.
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        outcome = policy.rank_outcome([rank_exit], received)
        failed = outcome in ("failed", "bad_input")
        if info.rank == 0 or failed:
            self._record_end(info, rank_exit, outcome)
        if outcome == "done":
            return DONE
        _exit_without_result(policy.exit_code(outcome) if failed else DONE)

    def _run_on_this_machine(self, info: ProcessInfo, received: set[int]) -> int:
        """Run all ranks, and restart them until the run ends for good."""
        run = Path(self.run)
        info = dataclasses.replace(info, world=self.ranks, local_world=self.ranks)
        while True:
            history.record_start(run, info.attempt, nodes=info.nodes, world=info.world)
            exits = self._run_attempt(info, range(self.ranks), received)
            for rank_exit in exits:
                outcome = policy.rank_outcome([rank_exit], received)
                self._record_end(info, rank_exit, outcome)
            outcome = policy.rank_outcome(exits, received)
            decision = history.record_end(run, info.attempt, outcome, self.restart)
            log.info("attempt %s: %s", info.attempt, decision.why)
            if not decision.requeue:
                return policy.exit_code(outcome)
            received.clear()
            info = dataclasses.replace(info, restart=info.restart + 1)

    def _record_end(self, info: ProcessInfo, rank_exit: RankExit, outcome: Outcome) -> None:
        run = Path(self.run)
        error = history.error_path(run, info.attempt, rank_exit.rank)
        history.write_rank_record(run, info.attempt, history.rank_record(rank_exit, info.node, outcome, error))

    def _run_attempt(self, info: ProcessInfo, ranks: Sequence[int], received: set[int]) -> list[RankExit]:
        """Start the processes of some ranks and wait until they have ended."""
        run = Path(self.run)
        try:
            snapshot.verify(Path(self.code).parent)
            snapshot.check_running(Path(self.code))
            if 0 in ranks:
                _check_ownership(run, info.job)
        except BadLaunch as error:
            log.error("%s", error)
            return [RankExit(rank, BAD_INPUT, str(error)) for rank in ranks]
        port = int(os.environ["MASTER_PORT"]) if info.slurm else free_port()
        address = reachable_address(info.nodes[0]) if info.slurm else "127.0.0.1"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(TORCHRUN)}
        if not info.slurm:
            inherited.pop("CUDA_VISIBLE_DEVICES", None)  # submitit hides all GPUs if the profile requests none
        common = {**inherited, **common_environment(run, cores=self.cores), **self.environment}
        common |= code_environment(Path(self.code), common)
        environments = {rank: {**common, **rank_environment(info, rank, address, port)} for rank in ranks}
        for rank, environment in environments.items():
            environment["TORCHELASTIC_ERROR_FILE"] = str(history.error_path(run, info.attempt, rank))
        cores = len(os.sched_getaffinity(0))
        if info.slurm and self.cores and cores < self.cores:
            log.warning("rank %d may use %d of the %d cores that cpus_per_task asks for; see TaskPlugin and --cpu-bind",
                        info.rank, cores, self.cores)  # fmt: skip
        python, *rest = self.command
        command = [sys.executable if python == "python" else python, *rest]
        launch = history.launch_folder(run)
        logs = {rank: history.rank_log(launch, info.job, rank) for rank in ranks if not info.slurm and rank > 0}
        log.info("attempt %s: ranks %s of %d on %s, rank 0 at %s:%d: %s",
                 info.attempt, list(ranks), info.world, info.node, address, port, " ".join(command))  # fmt: skip
        started = supervisor.start(command, environments, logs)
        stall_s = self.restart.stall_min * 60 if self.makes_steps else math.inf
        heartbeat = run / "metrics.jsonl" if 0 in ranks else None  # written by rank 0: one supervisor asks its disk
        exits = supervisor.supervise(
            started, received, heartbeat=heartbeat, stall_s=stall_s, handles_usr2=self.makes_steps
        )
        if info.restart == 0:
            return exits
        # The first start accepted this input. If a restart rejects it, the cause is temporary (a lock that has not been
        # released yet, a disk that is gone), so it counts as an ordinary failure.
        return [dataclasses.replace(end, code=FAILED) if end.code == BAD_INPUT else end for end in exits]


def log_to_stderr() -> None:
    """Send the log of this package to stderr. submitit handles its own log."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s launch: %(message)s"))
    package = logging.getLogger("vjepa_launch")
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    package.propagate = False


def _check_ownership(run: Path, job: str) -> None:
    """Raise BadLaunch unless the run folder belongs to this job."""
    owner = None
    for _ in range(OWNER_TRIES):
        owner = (history.read_owner(run) or {}).get("job")
        if owner == job:
            return
        time.sleep(1)
    raise BadLaunch(f"{run} belongs to job {owner} now, and this is job {job}; cancel either job")


def _exit_without_result(code: int) -> NoReturn:
    """Exit at once, so that submitit does not write a result file."""
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)
