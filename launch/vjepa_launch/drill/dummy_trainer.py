"""A trainer without a model: the steps, checkpoints, signals and exit codes of `vjepa train`, without torch.

Drills and tests of the launcher use it, because importing torch would take most of their time. The ranks connect to
MASTER_ADDR:MASTER_PORT. In each step every rank tells rank 0 whether it received a stop signal, and all ranks receive
the combined answer, as in the trainer's all-reduce. The loss of a step depends on all steps before it. So a step that
is lost, repeated, or resumed from the wrong checkpoint changes all later losses.

    python -m vjepa_launch.drill.dummy_trainer RUN --steps 100 --step-s 0.1 --every 10

RUN/fault.json injects a fault in the first `restarts` starts: {"rank": 1, "step": 5, "restarts": 1, "do": "kill"}.
`do` is "kill", "suspend", "sleep", or an exit code.
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

from vjepa_launch.atomic import write_json
from vjepa_launch.history import newest_checkpoint
from vjepa_launch.policy import DONE, STOPPED

CONNECT_TIMEOUT_S = 20.0


def main() -> int:
    """Train, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--step-s", type=float, default=0.1, help="duration of a step, seconds")
    parser.add_argument("--save-s", type=float, default=0.0, help="duration of a checkpoint, seconds")
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    options = parser.parse_args()
    run: Path = options.run
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

    received: set[int] = set()

    def receive(number: int, frame: FrameType | None) -> None:
        received.add(number)

    signal.signal(signal.SIGUSR2, receive)
    signal.signal(signal.SIGTERM, receive)
    start = newest_checkpoint(run) or 0
    write_json(run / "pids" / f"rank_{rank}.json", os.getpid())
    any_rank = connect(rank, world)
    state = json.loads((checkpoint_folder(run, start) / "state.json").read_text())["value"] if start else ""
    for step in range(start, options.steps):
        inject_fault(run, rank, step)
        time.sleep(options.step_s)
        state = advance(state, step)
        done = step + 1
        if rank == 0:
            with (run / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": done, "time": time.time(), "loss/total": loss(state)}) + "\n")
        stop = any_rank(bool(received))
        if stop or done % options.every == 0 or done == options.steps:
            time.sleep(options.save_s)
            if rank == 0:
                save(run, done, state)
            any_rank(False)  # a barrier
        if stop and done < options.steps:
            print(f"rank {rank} saved and stopped after step {done}", flush=True)
            return STOPPED
    print(f"rank {rank} done", flush=True)
    return DONE


def advance(state: str, step: int) -> str:
    """Return the state after a step, which is a function of all steps before it."""
    return hashlib.sha256(f"{state}/{step}".encode()).hexdigest()


def loss(state: str) -> float:
    """Return a number in [0, 1) that identifies a state."""
    return int(state[:12], 16) / 16**12


def checkpoint_folder(run: Path, step: int) -> Path:
    """Return the folder of the checkpoint of a step."""
    return run / "checkpoints" / f"step_{step:08d}"


def save(run: Path, step: int, state: str) -> None:
    """Write a checkpoint folder, which is complete or absent at any time."""
    final = checkpoint_folder(run, step)
    if final.exists():
        return
    temporary = final.with_name(f".{final.name}.{os.getpid()}")
    write_json(temporary / "state.json", {"step": step, "value": state})
    temporary.rename(final)


def inject_fault(run: Path, rank: int, step: int) -> None:
    """Cause the fault of RUN/fault.json if it is due at this rank and step."""
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


def connect(rank: int, world: int) -> Callable[[bool], bool]:
    """Connect all ranks, and return a function that says whether its argument is true on any rank."""
    address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    if rank == 0:
        server = socket.create_server(("", address[1]))
        server.settimeout(CONNECT_TIMEOUT_S)
        peers = [server.accept()[0] for _ in range(world - 1)]
        for peer in peers:
            peer.settimeout(CONNECT_TIMEOUT_S)

        def gather(value: bool) -> bool:
            answer = bytes([max([value, *(_receive(peer) for peer in peers)])])
            for peer in peers:
                peer.sendall(answer)
            return bool(answer[0])

        return gather
    deadline = time.monotonic() + CONNECT_TIMEOUT_S
    while True:
        try:
            rank_0 = socket.create_connection(address, timeout=CONNECT_TIMEOUT_S)
            break
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)

    def ask(value: bool) -> bool:
        rank_0.sendall(bytes([value]))
        return bool(_receive(rank_0))

    return ask


def _receive(peer: socket.socket) -> int:
    received = peer.recv(1)
    if not received:
        raise ConnectionError("the connection to another rank was closed")
    return received[0]


if __name__ == "__main__":
    sys.exit(main())
