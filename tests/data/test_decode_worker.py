"""The decode worker contains decoders that hang, crash, print or allocate without bound."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from vjepa_data.child_process import STOP_SIGNALS
from vjepa_data.decoding.backends import Expect, decode
from vjepa_data.decoding.decode_worker import DecodeWorker
from vjepa_data.decoding.decode_worker_main import on_one_core
from vjepa_data.errors import Unreadable
from vjepa_data.settings import BadInput

EXPECT = Expect(frames=48, width=96, height=64)

# Replaces decord in the decode worker. The bytes of the "video" select its behaviour.
BAD_DECORD = """
import os, sys, time
class DECORDError(Exception): pass
class DECORDLimitReachedError(Exception): pass
def cpu(n): return n
class VideoReader:
    def __init__(self, file, **_):
        order = file.read()
        if order.startswith(b"HANG"): time.sleep(1000)
        if order.startswith(b"SPIN"):
            while time.process_time() < float(order[4:]): pass
        if order.startswith(b"NAP"): time.sleep(3)
        if order.startswith(b"CRASH"): os.abort()
        if order.startswith(b"EAT"): self.eaten = bytearray(100 << 30)
        if order.startswith(b"TALK"): print("x" * 70_000, file=sys.stderr); sys.stderr.flush()
        raise DECORDError("cannot\\n open \\x07 " + "y" * 500)
"""


@pytest.fixture
def worker():
    made = DecodeWorker(timeout_s=10)
    yield made
    made.close()


@pytest.fixture
def bad_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "decord.py").write_text(BAD_DECORD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    made = DecodeWorker(timeout_s=20)
    yield made
    made.close()


def alive(pid: int) -> bool:
    """Say whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(claim, limit_s: float = 60) -> bool:
    end = time.monotonic() + limit_s
    while not (done := claim()) and time.monotonic() < end:
        time.sleep(0.05)
    return done


def test_stop_signals_do_not_end_a_starting_decode_worker(videos: list[bytes]):
    made = DecodeWorker(timeout_s=10)
    for number in STOP_SIGNALS:
        os.kill(made.pid, number)
    assert made.decode(videos[0], [1], EXPECT).shape == (1, 64, 96, 3)
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
    made.close()


def test_frames_equal_those_of_the_decoder(worker: DecodeWorker, videos: list[bytes]):
    for video in videos:
        got = worker.decode(video, [1, 7, 30], EXPECT)
        assert np.array_equal(got, decode(video, [1, 7, 30], backend="decord", expect=EXPECT))


def test_frames_stay_valid_while_the_next_clip_is_decoded(worker: DecodeWorker, videos: list[bytes]):
    first = worker.decode(videos[0], [1, 2], EXPECT)
    copy = first.copy()
    worker.begin(videos[1], [1, 2], EXPECT)
    time.sleep(0.2)
    assert np.array_equal(first, copy)
    assert not np.array_equal(worker.finish(), copy)


def test_requests_of_any_size_fit(worker: DecodeWorker, videos: list[bytes]):
    for frames in (1, 48, 3, 40):
        assert worker.decode(videos[0], list(range(frames)), EXPECT).shape == (frames, 64, 96, 3)


def test_damaged_bytes_do_not_affect_the_next_clip(worker: DecodeWorker, videos: list[bytes]):
    pid = worker.pid
    for bad in (b"", b"<html>503</html>", videos[0][: len(videos[0]) // 2]):
        with pytest.raises(Unreadable) as e:
            worker.decode(bad, [0, 47], EXPECT)
        assert e.value.reason == "error"
    assert worker.decode(videos[0], [0], EXPECT).shape == (1, 64, 96, 3)
    assert worker.pid == pid


def test_a_killed_decode_worker_is_replaced(worker: DecodeWorker, videos: list[bytes]):
    want = worker.decode(videos[0], [3], EXPECT).copy()
    old = worker.pid
    os.kill(old, signal.SIGKILL)
    assert np.array_equal(worker.decode(videos[0], [3], EXPECT), want)
    assert worker.pid != old
    assert not Path(f"/proc/{old}").exists()  # reaped: no zombie
    assert worker.counts["crash"] == 1


def test_a_stopped_decode_worker_is_replaced(worker: DecodeWorker, videos: list[bytes]):
    worker.decode(videos[0], [3], EXPECT)
    worker.timeout_s = 2
    os.kill(worker.pid, signal.SIGSTOP)
    assert worker.decode(videos[0], [3], EXPECT).shape[0] == 1
    assert worker.counts["timeout"] == 1


def test_a_hang_costs_two_time_outs(bad_worker: DecodeWorker):
    with pytest.raises(Unreadable):
        bad_worker.decode(b"warm up", [0], EXPECT)
    bad_worker.timeout_s = 1.5
    began = time.monotonic()
    with pytest.raises(Unreadable) as e:
        bad_worker.decode(b"HANG", [0], EXPECT)
    assert e.value.reason == "timeout"
    assert 2.9 < time.monotonic() - began < 30  # the upper bound is loose: a busy machine starts processes slowly
    bad_worker.timeout_s = 20
    with pytest.raises(Unreadable):  # the next request is answered
        bad_worker.decode(b"nothing", [0], EXPECT)


def test_a_busy_loop_exceeds_the_time_budget(bad_worker: DecodeWorker):
    bad_worker.timeout_s = 1
    with pytest.raises(Unreadable, match="timeout"):
        bad_worker.decode(b"SPIN1000", [0], EXPECT)


def test_time_without_a_core_is_not_counted(bad_worker: DecodeWorker, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(Unreadable):
        bad_worker.decode(b"warm up", [0], EXPECT)
    bad_worker.timeout_s = 1
    # As if the process were ready to run and got no CPU time, as on an overloaded core.
    monkeypatch.setattr("vjepa_data.child_process._is_running_and_cpu_s", lambda pid: (True, 0.0))
    with pytest.raises(Unreadable, match=r"error: .*cannot +open"):
        bad_worker.decode(b"NAP", [0], EXPECT)
    assert bad_worker.counts["timeout"] == 0


@pytest.mark.parametrize(("order", "reason"), [(b"CRASH", "crash"), (b"EAT", "memory")])
def test_a_crash_or_lack_of_memory_is_contained(bad_worker: DecodeWorker, order: bytes, reason: str):
    with pytest.raises(Unreadable) as e:
        bad_worker.decode(order, [0], EXPECT)
    assert e.value.reason == reason


def test_decoder_output_is_bounded(bad_worker: DecodeWorker):
    details = []
    for _ in range(40):
        with pytest.raises(Unreadable) as e:
            bad_worker.decode(b"TALK", [0], EXPECT)
        details.append(e.value.detail)
    assert all(detail.isprintable() and len(detail) <= 160 for detail in details)
    assert os.fstat(bad_worker._child._output).st_size <= 1 << 20


def test_the_fallback_decodes_files_that_defeat_the_first_decoder(
    bad_worker: DecodeWorker, videos: list[bytes], read_number
):
    assert read_number(bad_worker.decode(videos[0], [9], EXPECT)[0]) == 9
    assert bad_worker.counts["fallback"] == 1
    assert bad_worker.fell_back == "error"


def test_large_videos_get_a_larger_time_budget(bad_worker: DecodeWorker):
    with pytest.raises(Unreadable):
        bad_worker.decode(b"warm up", [0], EXPECT)
    bad_worker.timeout_s = 0.2
    with pytest.raises(Unreadable, match=r"timeout: .* exceeded 0.2 s"):
        bad_worker.decode(b"HANG", [0, 47], EXPECT)
    hd = Expect(frames=900, width=1280, height=720)  # at worst 300 + 1 frames, 11 s of decoding
    with pytest.raises(Unreadable, match=r"error: .*cannot +open"):
        bad_worker.decode(b"NAP", [600], hd)


def test_a_decode_worker_is_replaced_after_many_clips(videos: list[bytes], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("vjepa_data.decoding.decode_worker.RECYCLE_CLIPS", 3)
    worker = DecodeWorker()
    pids = set()
    for i in range(7):
        pids.add(worker.pid)
        worker.decode(videos[i % 6], [i], EXPECT)
    assert len(pids) == 3
    assert [alive(pid) for pid in pids].count(True) == 1
    worker.close()


def test_a_missing_decoder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "decord.py").write_text("raise ImportError('no decord for this machine')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    worker = DecodeWorker()
    with pytest.raises(BadInput, match=r"decord cannot be used \(no decord for this machine\); set loader.decoder"):
        worker.decode(b"", [0], EXPECT)
    worker.close()


def test_a_failed_start_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "decord.py").write_text("raise RuntimeError('the library is broken')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    worker = DecodeWorker()
    with pytest.raises(BadInput, match=r"does not start \(.*the library is broken\)"):
        worker.decode(b"", [0], EXPECT)
    worker.close()


def test_a_slow_start_is_not_a_time_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "decord.py").write_text("import time; time.sleep(1.5)\n" + BAD_DECORD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    worker = DecodeWorker(timeout_s=1)
    with pytest.raises(Unreadable, match=r"cannot +open"):
        worker.decode(b"", [0], EXPECT)
    worker.close()


def test_a_decode_worker_imports_no_torch_and_has_few_threads(worker: DecodeWorker, videos: list[bytes]):
    worker.decode(videos[0], [0], EXPECT)
    assert "libtorch" not in Path(f"/proc/{worker.pid}/maps").read_text()
    assert len(os.listdir(f"/proc/{worker.pid}/task")) <= 2


def test_a_hanging_decode_worker_dies_with_its_owner(tmp_path: Path):
    (tmp_path / "decord.py").write_text(BAD_DECORD)
    code = (
        "from vjepa_data.decoding.decode_worker import DecodeWorker, Expect\n"
        "s = DecodeWorker(timeout_s=100)\n"
        "s.begin(b'HANG', [0], Expect(1, 8, 8)); print(s.pid, flush=True); s.finish()"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)}
    )
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    time.sleep(1)
    assert alive(pid)
    owner.kill()
    owner.communicate()
    assert wait_until(lambda: not alive(pid))


def test_stop_signals_do_not_end_a_decode_worker(worker: DecodeWorker, videos: list[bytes]):
    worker.decode(videos[0], [0], EXPECT)
    pid = worker.pid
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(pid, number)
    worker.decode(videos[0], [0], EXPECT)
    assert worker.pid == pid


def test_threads_of_a_decoder_share_a_core():
    before, seen = os.sched_getaffinity(0), []
    with on_one_core():
        thread = threading.Thread(target=lambda: seen.append(os.sched_getaffinity(0)))
        thread.start()
        thread.join()
        assert seen == [os.sched_getaffinity(0)]
        assert len(seen[0]) == 1
    assert os.sched_getaffinity(0) == before


def test_only_the_requested_part_is_returned(worker: DecodeWorker, videos: list[bytes]):
    whole = worker.decode(videos[0], [3, 9], EXPECT).copy()
    worker.begin(videos[0], [3, 9], EXPECT, part=(5, 7, 40, 30))
    assert np.array_equal(worker.finish(), whole[:, 5:45, 7:37])
