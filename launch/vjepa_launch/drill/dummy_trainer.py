"""A trainer of nothing: steps, checkpoints, signals and exit codes as `vjepa train` has them, without torch.

For drills and tests of the launcher, which would otherwise spend their time importing torch. The ranks meet at
MASTER_ADDR:MASTER_PORT and go in step: in each step every rank tells rank 0 whether it was asked to stop, and all hear
the answer, as the trainer's all-reduce does. The loss is a chain in which each step depends on all before it, so that
a step lost, repeated or resumed from the wrong place shows in every later one.

    python -m vjepa_launch.drill.dummy_trainer RUN --steps 100 --step-s 0.1 --every 10

RUN/fault.json injects a fault: {"rank": 1, "step": 5, "restarts": 1, "do": "kill"}: in the first `restarts` starts.
"""

import argparse
import hashlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from vjepa_launch.history import newest_checkpoint, write_json

PATIENCE_S = 20.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--step-s", type=float, default=0.1, help="seconds that a step takes")
    parser.add_argument("--save-s", type=float, default=0.0, help="seconds that a checkpoint takes")
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    options = parser.parse_args()
    run: Path = options.run
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

    asked: set[int] = set()

    def hear(number: int, frame: FrameType | None) -> None:
        asked.add(number)

    signal.signal(signal.SIGUSR2, hear)
    signal.signal(signal.SIGTERM, hear)
    start = newest_checkpoint(run) or 0
    note_start(run, rank, start)
    agree = meet(rank, world)
    state = json.loads((checkpoint_folder(run, start) / "state.json").read_text())["value"] if start else ""
    for step in range(start, options.steps):
        inject_fault(run, rank, step)
        time.sleep(options.step_s)
        state = advance(state, step)
        done = step + 1
        if rank == 0:
            with (run / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": done, "time": time.time(), "loss/prediction": loss(state)}) + "\n")
        stop = agree(bool(asked))
        if stop or done % options.every == 0 or done == options.steps:
            time.sleep(options.save_s)
            if rank == 0:
                save(run, done, state)
            agree(False)
        if stop and done < options.steps:
            print(f"rank {rank} stopped in good order after step {done}", flush=True)
            return 75
    print(f"rank {rank} done", flush=True)
    return 0


def advance(state: str, step: int) -> str:
    """The state after a step: a function of all steps before it."""
    return hashlib.sha256(f"{state}/{step}".encode()).hexdigest()


def loss(state: str) -> float:
    """A number that tells states apart."""
    return int(state[:12], 16) / 16**12


def checkpoint_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def save(run: Path, step: int, state: str) -> None:
    """Complete or absent."""
    final = checkpoint_folder(run, step)
    if final.exists():
        return
    beside = final.with_name(f".{final.name}.{os.getpid()}")
    write_json(beside / "state.json", {"step": step, "value": state})
    beside.rename(final)


def note_start(run: Path, rank: int, step: int) -> None:
    """Leave our number where a drill finds it."""
    place = {"pid": os.getpid(), "node": os.environ.get("SLURMD_NODENAME") or socket.gethostname(), "step": step}
    write_json(run / "pids" / f"rank_{rank}.json", place)


def inject_fault(run: Path, rank: int, step: int) -> None:
    path = run / "fault.json"
    if not path.exists():
        return
    fault = json.loads(path.read_text())
    mark = run / "pids" / f"fault_{step}_{rank}"
    times = len(list(mark.parent.glob(f"{mark.name}.*")))
    if (rank, step) != (fault["rank"], fault["step"]) or times >= fault.get("restarts", 1):
        return
    mark.with_suffix(f".{times}").touch()
    number = {"kill": signal.SIGKILL, "suspend": signal.SIGSTOP}.get(fault["do"])
    if number is not None:
        os.kill(os.getpid(), number)
    elif fault["do"] == "sleep":
        time.sleep(3600)
    else:
        sys.exit(int(fault["do"]))


def meet(rank: int, world: int) -> Callable[[bool], bool]:
    """Connect all ranks; returns the step's question: does any rank wish to stop?"""
    address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    if rank == 0:
        server = socket.create_server(("", address[1]))
        server.settimeout(PATIENCE_S)
        others = [server.accept()[0] for _ in range(world - 1)]
        for other in others:
            other.settimeout(PATIENCE_S)

        def agree(stop: bool) -> bool:
            answer = bytes([max([stop, *(_receive(other) for other in others)])])
            for other in others:
                other.sendall(answer)
            return bool(answer[0])

        return agree
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            first = socket.create_connection(address, timeout=PATIENCE_S)
            break
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)

    def ask(stop: bool) -> bool:
        first.sendall(bytes([stop]))
        return bool(_receive(first))

    return ask


def _receive(peer: socket.socket) -> int:
    heard = peer.recv(1)
    if not heard:
        raise ConnectionError("another rank is gone")
    return heard[0]


if __name__ == "__main__":
    sys.exit(main())
