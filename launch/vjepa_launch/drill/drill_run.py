"""A run of the dummy trainer that a drill launches, disturbs, and then checks step by step."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vjepa_launch import history, job_control, submit
from vjepa_launch.atomic import read_json, write_json
from vjepa_launch.drill import dummy_trainer
from vjepa_launch.request import Request
from vjepa_launch.settings import Cluster


class DrillRun:
    """A run folder whose command is the dummy trainer.

    Args:
        folder: the run folder, which must not exist.
        options: options of the dummy trainer.
    """

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder.resolve()
        self.command = ["python", "-m", "vjepa_launch.drill.dummy_trainer", str(self.folder), *options]
        self.executor = ""
        self.job = ""

    @staticmethod
    def of(folder: Path) -> "DrillRun":
        """Return the run in a folder that was launched by other means, for example as part of a sweep."""
        run = DrillRun(folder)
        owner = history.read_owner(run.folder)
        assert owner is not None
        run.executor, run.job, run.command = owner["executor"], owner["job"], owner["command"]
        return run

    def request(self, cluster: Cluster, *, config: str = "name: drill\n") -> Request:
        """Return the request that `launch` submits."""
        return Request(self.folder, cluster, self.command, config=config, name="drill")

    def launch(self, cluster: Cluster, *, config: str = "name: drill\n") -> submit.Launched:
        """Launch the run."""
        launched = submit.launch(self.request(cluster, config=config))
        self.executor, self.job = cluster.executor, launched.job
        return launched

    def inject(self, *, rank: int, step: int, do: str, restarts: int = 1) -> None:
        """Inject a fault into a rank at a step, in the first `restarts` starts that reach it."""
        write_json(self.folder / "fault.json", {"rank": rank, "step": step, "restarts": restarts, "do": do})

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Return the `launch`, `start` or `end` events of the run."""
        return history.read_events(self.folder, kind)

    def outcomes(self) -> list[str]:
        """Return the outcomes of the attempts so far."""
        return [event["outcome"] for event in self.events("end")]

    def kill(self, rank: int) -> None:
        """Kill a rank on this machine."""
        os.kill(read_json(self.folder / "pids" / f"rank_{rank}.json"), signal.SIGKILL)

    def ask_to_return(self) -> None:
        """Ask the run to save and requeue, as before a time limit."""
        job_control.send_signal(self.executor, self.job, "USR2")

    def cancel(self) -> None:
        """Cancel the job."""
        job_control.cancel(self.executor, self.job)

    def metrics(self) -> list[dict[str, Any]]:
        """Return all recorded rows in order, without a line that is still being written."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def step(self) -> int:
        """Return the newest recorded step."""
        rows = self.metrics()
        return rows[-1]["step"] if rows else 0

    def is_alive(self) -> bool:
        """Return whether the job is pending or running."""
        return job_control.is_alive(self.executor, self.job)

    def wait_for(self, condition: Callable[[], Any], timeout_s: float = 200.0, poll_s: float = 0.05) -> None:
        """Wait until a condition is true.

        Raises:
            TimeoutError: it did not become true in time. The message contains the output of all ranks.
        """
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"the condition was not met within {timeout_s:.0f} s\n{self.log()}")
            time.sleep(poll_s)

    def wait(self, timeout_s: float = 200.0) -> dict[str, Any]:
        """Wait until the job has ended, and return the last event of the run."""
        self.wait_for(lambda: not self.is_alive(), timeout_s, poll_s=0.05 if self.executor == "local" else 0.5)
        return history.read_events(self.folder)[-1]

    def log(self) -> str:
        """Return the output of all ranks and supervisors."""
        return "\n".join(path.read_text() for path in sorted((self.folder / "launch").glob("*.out")))

    def wrong_steps(self, steps: int) -> list[int]:
        """Return the steps that are missing, or whose loss differs from an undisturbed run."""
        losses: dict[int, set[float]] = {}
        for row in self.metrics():
            losses.setdefault(row["step"], set()).add(row["loss/total"])
        state, wrong = "", []
        for step in range(1, steps + 1):
            state = dummy_trainer.advance(state, step - 1)
            if losses.pop(step, None) != {dummy_trainer.loss(state)}:
                wrong.append(step)
        return wrong + sorted(losses)

    def replayed(self) -> int:
        """Return the number of steps that were repeated after a failure."""
        steps = [row["step"] for row in self.metrics()]
        return len(steps) - len(set(steps))
