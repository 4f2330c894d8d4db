"""A suspended job (SIGSTOP to all of it, `scontrol suspend`, a paused machine) reads the same stream."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vjepa_data import child_process
from vjepa_data.child_process import ActiveTimeBudget
from vjepa_data.reader.loader import ClipLoader
from vjepa_data.settings import Clip, Crop, Data, Loader, Source

# Replaces decord: it computes in a thread of its own, as decord does, and then fails, so that PyAV decodes.
SLOW_DECORD = """
import threading, time
class DECORDError(Exception): pass
class DECORDLimitReachedError(Exception): pass
def cpu(n): return n
def work():
    end = time.thread_time() + 0.08
    while time.thread_time() < end: pass
class VideoReader:
    def __init__(self, file, **_):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        raise DECORDError("PyAV is next")
"""

STEPS = 8
JOB = """
import sys
sys.path.insert(0, sys.argv[1])
from test_suspended import read_stream
for line in read_stream(sys.argv[2]):
    print(line, flush=True)
"""


def read_stream(corpus: str) -> Iterator[str]:
    """Yield keys and hashes of a few batches with a small time budget per clip."""
    data = Data(sources=(Source(shards=corpus),), clip=Clip(frames=4, fps=4), crop=Crop(px=32))
    with ClipLoader(data, Loader(workers=1, decode_timeout_s=0.3), seed=0, batch_size=2) as loader:
        for _ in range(STEPS):
            batch = next(loader)
            (clips,) = batch.groups
            yield f"{clips.keys} {hashlib.sha256(clips.frames.numpy().tobytes()).hexdigest()} {batch.rejected}"


def test_suspending_a_job_rejects_no_clip(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "decord.py").write_text(SLOW_DECORD)
    printed = tmp_path / "printed.txt"
    with printed.open("w") as out:
        job = subprocess.Popen(
            [sys.executable, "-c", JOB, Path(__file__).parent, corpus],
            stdout=out,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])},
            process_group=0,
        )
    awake, suspensions = random.Random(0), 0
    while job.poll() is None and len(lines := printed.read_text().splitlines()) < STEPS:
        time.sleep(awake.uniform(0.05, 0.2))
        if lines:
            os.killpg(job.pid, signal.SIGSTOP)
            time.sleep(0.4)  # longer than the time budget of a clip
            os.killpg(job.pid, signal.SIGCONT)
            suspensions += 1
    assert job.wait() == 0
    assert suspensions > 3
    assert printed.read_text().splitlines() == list(read_stream(str(corpus)))


@pytest.mark.parametrize(
    ("is_running", "worked_s", "checks"),
    [
        (True, 0.0, None),  # ready to run, but without a core
        (True, 0.5, 5),  # computes all the time; the first check only starts the measurement
        (False, 0.0, 4),  # sleeps
    ],
)
def test_a_budget_counts_work_and_sleep(
    monkeypatch: pytest.MonkeyPatch, is_running: bool, worked_s: float, checks: int | None
) -> None:
    clock, used = iter(range(1000)), iter(worked_s * check for check in range(1000))
    monkeypatch.setattr(child_process.time, "monotonic", lambda: 0.5 * next(clock))
    monkeypatch.setattr(child_process, "_is_running_and_cpu_s", lambda pid: (is_running, next(used)))
    budget = ActiveTimeBudget(0, 2.0)
    assert next((check for check in range(1, 100) if budget.is_over()), None) == checks
