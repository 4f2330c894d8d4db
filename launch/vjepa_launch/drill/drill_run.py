"""A run of the stand-in trainer that a drill launches, disturbs and then checks step by step."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vjepa_launch import history, job_control, submit
from vjepa_launch.drill import dummy_trainer
from vjepa_launch.request import Request
from vjepa_launch.settings import Cluster


class DrillRun:
    """A run folder whose command is the stand-in.

    Args:
        folder: where; must not exist.
        options: of the stand-in.
    """

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder.resolve()
        self.command = ["python", "-m", "vjepa_launch.drill.dummy_trainer", str(self.folder), *options]
        self.executor = ""
        self.job = ""

    @staticmethod
    def of(folder: Path) -> "DrillRun":
        """A run that was launched by other means, as part of a sweep for instance."""
        run = DrillRun(folder)
        owner = history.read_json(history.launch_folder(run.folder) / "job.json")
        assert owner is not None
        run.executor, run.job, run.command = owner["executor"], owner["job"], owner["command"]
        return run

    def request(self, cluster: Cluster, *, config: str = "name: rehearsal\n") -> Request:
        return Request(self.folder, cluster, self.command, config=config, name="rehearsal")

    def launch(self, cluster: Cluster, *, config: str = "name: rehearsal\n") -> submit.Launched:
        launched = submit.launch(self.request(cluster, config=config))
        self.executor, self.job = cluster.executor, launched.job
        return launched

    def inject(self, *, rank: int, step: int, do: str, restarts: int = 1) -> None:
        """Have a rank meet its fate at a step, in the first `restarts` starts that reach it."""
        fault = {"rank": rank, "step": step, "restarts": restarts, "do": do}
        history.write_json(self.folder / "fault.json", fault)

    def events(self, kind: str) -> list[dict[str, Any]]:
        """The history of the run: its `launch`, `start` or `end` events."""
        return [event for event in history.read_events(self.folder) if event["event"] == kind]

    def outcomes(self) -> list[str]:
        return [event["outcome"] for event in self.events("end")]

    def pid(self, rank: int) -> int:
        """Process of a rank, on this machine."""
        return json.loads((self.folder / "pids" / f"rank_{rank}.json").read_text())["pid"]

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid(rank), number)

    def ask_to_return(self) -> None:
        """Tell the run to save and come back, as before a time limit."""
        job_control.send_signal(self.executor, self.job, "USR2")

    def cancel(self) -> None:
        job_control.cancel(self.executor, self.job)

    def metrics(self) -> list[dict[str, Any]]:
        """All that was recorded, in order; a line that is being written is left out."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def step(self) -> int:
        """Newest step that was recorded."""
        rows = self.metrics()
        return rows[-1]["step"] if rows else 0

    def is_alive(self) -> bool:
        return job_control.is_alive(self.executor, self.job)

    def wait_for(self, condition: Callable[[], Any], timeout_s: float = 200.0, poll_s: float = 0.05) -> None:
        """Wait for something to become true.

        Raises:
            TimeoutError: it did not; with all that the ranks wrote.
        """
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {timeout_s:.0f} s in vain\n{self.log()}")
            time.sleep(poll_s)

    def wait(self, timeout_s: float = 200.0) -> dict[str, Any]:
        """Wait until the job is over.

        Returns:
            The last event of the run's history.
        """
        self.wait_for(lambda: not self.is_alive(), timeout_s, poll_s=0.05 if self.executor == "local" else 0.5)
        return history.read_events(self.folder)[-1]

    def log(self) -> str:
        """All that the ranks and their supervisors wrote."""
        return "\n".join(path.read_text() for path in sorted((self.folder / "launch").glob("*.out")))

    def wrong_steps(self, steps: int) -> list[int]:
        """Steps that are missing, or that were anything else than in a run that nothing disturbed."""
        seen: dict[int, set[float]] = {}
        for row in self.metrics():
            seen.setdefault(row["step"], set()).add(row["loss/prediction"])
        state, wrong = "", []
        for step in range(1, steps + 1):
            state = dummy_trainer.advance(state, step - 1)
            if seen.pop(step, None) != {dummy_trainer.loss(state)}:
                wrong.append(step)
        return wrong + sorted(seen)

    def replayed(self) -> int:
        """Steps that were done again after a failure."""
        steps = [row["step"] for row in self.metrics()]
        return len(steps) - len(set(steps))
