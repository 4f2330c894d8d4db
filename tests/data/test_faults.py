"""The stream survives bad samples and killed, stopped or hanging processes."""

import hashlib
import itertools
import json
import multiprocessing.synchronize
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from vjepa_data.reader.loader import ClipLoader, TooManyRejects
from vjepa_data.settings import Clip, Crop, Data, Loader, Rejects, Source

BATCH = 4


def settings(folder: Path, *, max_share: float = 1.0, in_a_row: int = 100) -> Data:
    rejects = Rejects(max_share=max_share, max_in_a_row=in_a_row)
    sources = (Source(shards=str(folder)),)
    return Data(sources=sources, clip=Clip(frames=4, fps=4), crop=Crop(px=32), rejects=rejects)


def pixels(batch) -> tuple:
    group = batch.groups[0]
    return (batch.step, group.slots, group.keys, hashlib.sha256(group.frames.numpy().tobytes()).hexdigest())


def read(data: Data, steps: int, *, workers: int = 0, folder: Path | None = None, start: int = 0) -> list[tuple]:
    with ClipLoader(data, Loader(workers=workers), seed=1, batch_size=BATCH, step=start, folder=folder) as loader:
        return [pixels(next(loader)) for _ in range(steps)]


@pytest.fixture
def copy(corpus: Path, tmp_path: Path) -> Path:
    shutil.copytree(corpus, tmp_path / "copy")
    return tmp_path / "copy"


def processes_below(pid: int) -> set[int]:
    """List all descendants of a process."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
    found, border = set(), {pid}
    while border:
        border = {child for child, parent in parents.items() if parent in border}
        found |= border
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(claim, limit_s: float = 60) -> bool:
    end = time.monotonic() + limit_s
    while not (done := claim()) and time.monotonic() < end:
        time.sleep(0.05)
    return done


def test_bad_samples_are_replaced_deterministically(corpus: Path, copy: Path, tmp_path: Path):
    whole = read(settings(corpus), 7)
    os.truncate(copy / "shards" / "toy-train-000003.tar", 4096)  # 4 of 26 samples
    run = tmp_path / "run"
    run.mkdir()
    damaged = read(settings(copy), 7, folder=run)
    assert damaged == read(settings(copy), 7, workers=2)
    assert damaged[4:] == read(settings(copy), 3, start=4)
    lost = {f"toy-{i:04d}" for i in range(22, 26)}
    for (_, _, before, _), (_, _, after, _) in zip(whole, damaged, strict=True):
        assert not lost & set(after)
        assert all(a == b for a, b in zip(before, after, strict=True) if a not in lost)
    rows = [json.loads(line) for line in (run / "rejected.jsonl").read_text().splitlines()]
    drawn = [(step, slot, key) for step, slots, keys, _ in whole for slot, key in zip(slots, keys, strict=True)]
    assert [(r["step"], r["slot"], r["key"]) for r in rows if r["attempt"] == 0] == [d for d in drawn if d[2] in lost]
    assert {r["reason"] for r in rows} <= {"size", "known"}
    assert all("toy-train-000003.tar" in r["shard"] for r in rows)


def test_a_video_unlike_its_index_entry_is_replaced(videos, make_corpus, tmp_path: Path):
    facts = {"fps": 12.0, "width": 96, "height": 64, "video": videos[0]}
    samples = [{"key": f"k{i}", "frames": 60 if i == 3 else 48, **facts} for i in range(8)]
    folder = make_corpus(tmp_path / "c", [samples])
    with ClipLoader(settings(folder), Loader(workers=0), seed=0, batch_size=4, folder=tmp_path) as loader:
        keys = [key for _ in range(4) for key in next(loader).groups[0].keys]
    assert "k3" not in keys
    rows = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert {(r["key"], r["reason"]) for r in rows} == {("k3", "frames"), ("k3", "known")}
    assert "counts 48 frames, the index 60" in rows[0]["detail"]


def test_too_many_consecutive_rejects_stop_the_run(copy: Path):
    for shard in (copy / "shards").iterdir():
        shard.unlink()
    for workers in (0, 1):
        with (
            ClipLoader(settings(copy, in_a_row=20), Loader(workers=workers), seed=0, batch_size=4) as loader,
            pytest.raises(
                TooManyRejects, match=r"^20 samples in a row are unreadable, the last is toy-\d{4} in .*verify`\.$"
            ),
        ):
            next(loader)


def test_too_large_a_share_of_rejects_stops_the_run(copy: Path):
    (copy / "shards" / "toy-train-000003.tar").unlink()
    loader = ClipLoader(settings(copy, max_share=0.01), Loader(workers=0), seed=0, batch_size=4)
    with loader, pytest.raises(TooManyRejects, match=r"of the last \d+ samples are unreadable, more than .* \(0.01\)"):
        list(itertools.islice(loader, 250))


def test_dangerous_members_are_never_touched(videos, tmp_path: Path, make_corpus, edit_manifest):
    import io
    import tarfile

    facts = {"frames": 48, "fps": 12.0, "width": 96, "height": 64, "video": videos[0]}
    folder = make_corpus(tmp_path / "c", [[{"key": f"k{i}", **facts} for i in range(4)]])
    shard = folder / "shards" / "toy-train-000000.tar"
    payload = f"cposix\nsystem\n(S'touch {tmp_path}/evil'\ntR.".encode()
    with tarfile.open(shard, "a") as tar:
        for name in ("k0.pyd", "k1.pth", "k1.pickle", "../../evil"):
            member = tarfile.TarInfo(name)
            member.size = len(payload)
            tar.addfile(member, io.BytesIO(payload))
    edit_manifest(folder, lambda m: m["shards"][0].update(bytes=shard.stat().st_size))
    assert len(read(settings(folder), 3)) == 3
    assert not (tmp_path / "evil").exists()
    assert not list(tmp_path.glob("../**/evil"))


def test_killing_workers_does_not_change_the_stream(corpus: Path):
    want = read(settings(corpus), 40)
    got = []
    with ClipLoader(settings(corpus), Loader(workers=1, prefetch_steps=1), seed=1, batch_size=BATCH) as loader:
        (worker,) = (w.pid for w in loader._batches._workers)  # pyright: ignore[reportAttributeAccessIssue]
        for step in range(40):
            got.append(pixels(next(loader)))
            if step == 5:
                (decode_worker,) = processes_below(worker)
                os.kill(decode_worker, signal.SIGKILL)
            if step == 20:
                os.kill(worker, signal.SIGKILL)
    assert got == want


def test_a_killed_worker_does_not_interrupt_a_training_step(corpus: Path):
    with ClipLoader(settings(corpus), Loader(workers=1), seed=1, batch_size=BATCH) as loader:
        next(loader)
        (worker,) = (w.pid for w in loader._batches._workers)  # pyright: ignore[reportAttributeAccessIssue]
        os.kill(worker, signal.SIGKILL)
        end = time.monotonic() + 1
        while time.monotonic() < end:
            sum(range(1000))  # DataLoader's own handler would raise here
        assert next(loader).step == 1


def test_workers_ignore_stop_signals(corpus: Path):
    with ClipLoader(settings(corpus), Loader(workers=1), seed=1, batch_size=BATCH) as loader:
        next(loader)
        (worker,) = (w.pid for w in loader._batches._workers)  # pyright: ignore[reportAttributeAccessIssue]
        for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
            os.kill(worker, number)
        for _ in range(8):
            next(loader)
        assert alive(worker)


TRAINER = """
import sys
from vjepa_data.reader.loader import ClipLoader
from vjepa_data.settings import Clip, Crop, Data, Loader, Source

if __name__ == "__main__":
    data = Data(sources=(Source(shards=sys.argv[1]),), clip=Clip(frames=4, fps=4), crop=Crop(px=32))
    loader = ClipLoader(data, Loader(workers=2, start_method=sys.argv[2]), seed=0, batch_size=4)
    next(loader)
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("method", ["forkserver", "fork"])
def test_no_process_outlives_a_killed_trainer(corpus: Path, tmp_path: Path, method: str):
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    trainer = subprocess.Popen(
        [sys.executable, str(script), str(corpus), method], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert trainer.stdout is not None
    assert trainer.stdout.readline() == "ready\n"
    children = processes_below(trainer.pid)
    assert len(children) >= 4  # two workers, two decode workers
    trainer.kill()
    trainer.wait()
    gone = wait_until(lambda: not any(alive(pid) for pid in children))
    for pid in filter(alive, children):
        os.kill(pid, signal.SIGKILL)
    trainer.communicate()
    assert gone


def test_a_worker_killed_while_holding_a_lock_blocks_nothing(corpus: Path):
    want = read(settings(corpus), 8)
    got: list[tuple] = []

    def read_on() -> None:
        got.extend(pixels(next(loader)) for _ in range(6))
        loader.close()

    loader = ClipLoader(settings(corpus), Loader(workers=1, prefetch_steps=1), seed=1, batch_size=BATCH)
    got += [pixels(next(loader)), pixels(next(loader))]
    worker = loader._batches._workers[0]  # pyright: ignore[reportAttributeAccessIssue]
    event = loader._batches._workers_done_event._shared  # pyright: ignore[reportAttributeAccessIssue]
    assert isinstance(event, multiprocessing.synchronize.Event)
    os.kill(worker.pid, signal.SIGSTOP)
    assert event._cond.acquire()  # pyright: ignore[reportAttributeAccessIssue]  as if the worker had it
    os.kill(worker.pid, signal.SIGKILL)
    reading = threading.Thread(target=read_on, daemon=True)
    reading.start()
    reading.join(timeout=100)
    assert got == want
    assert not reading.is_alive()


def test_closing_ends_all_processes(corpus: Path):
    before = processes_below(os.getpid())
    with ClipLoader(settings(corpus), Loader(workers=2), seed=1, batch_size=BATCH) as loader:
        next(loader)
        during = processes_below(os.getpid()) - before
        threads = {pid: len(os.listdir(f"/proc/{pid}/task")) for pid in during}
        ours = {p for p in during if b"resource_tracker" not in Path(f"/proc/{p}/cmdline").read_bytes()}
    assert len(during) >= 4
    assert set(threads.values()) <= {1, 2, 3}, threads
    left = {p for p in ours if alive(p) and b"forkserver" not in Path(f"/proc/{p}/cmdline").read_bytes()}
    assert wait_until(lambda: not any(alive(p) for p in left)), left


def test_a_stall_is_logged_with_keys_and_stacks(corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    loader = ClipLoader(
        settings(corpus),
        Loader(workers=1, prefetch_steps=1),
        seed=1,
        batch_size=BATCH,
        folder=tmp_path,
        stall_s=0.5,
    )
    with loader:
        next(loader)
        next(loader)
        (worker,) = (w.pid for w in loader._batches._workers)  # pyright: ignore[reportAttributeAccessIssue]
        (decode_worker,) = processes_below(worker)
        os.kill(decode_worker, signal.SIGSTOP)
        time.sleep(0.5)

        def wake() -> None:
            time.sleep(2.5)
            os.kill(decode_worker, signal.SIGCONT)

        import threading

        waker = threading.Thread(target=wake)
        waker.start()
        for _ in range(6):
            next(loader)
        waker.join()
    text = (tmp_path / "stalls.txt").read_text()
    assert "no batch for" in caplog.text
    assert "key toy-" in caplog.text
    assert "key toy-" in text
    assert "in _next" in text  # the trainer's stack
    assert "decode_worker.py" in text  # the worker's stack
