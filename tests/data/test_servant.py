import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from vjepa_data.decoding.backends import Expect, decode
from vjepa_data.decoding.decode_worker import DecodeWorker
from vjepa_data.errors import Unreadable
from vjepa_data.process import STOP_SIGNALS, on_one_core
from vjepa_data.settings import BadInput

EXPECT = Expect(frames=48, width=96, height=64)

# Stands in for decord in the servant: what it does is written in the bytes it is given.
BAD_DECORD = """
import os, sys, time
class DECORDError(Exception): pass
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
def servant():
    made = DecodeWorker(timeout_s=10)
    yield made
    made.close()


@pytest.fixture
def bad_servant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
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


def test_what_is_sent_to_all_of_a_job_does_not_end_a_servant_that_starts(videos: list[bytes]):
    made = DecodeWorker(timeout_s=10)
    for number in STOP_SIGNALS:
        os.kill(made.pid, number)
    assert made.decode(videos[0], [1], EXPECT).shape == (1, 64, 96, 3)
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
    made.close()


def test_frames_are_those_of_the_decoder_itself(servant: DecodeWorker, videos: list[bytes]):
    for video in videos:
        got = servant.decode(video, [1, 7, 30], EXPECT)
        assert np.array_equal(got, decode(video, [1, 7, 30], backend="decord", expect=EXPECT))


def test_frames_stay_valid_while_the_next_are_decoded(servant: DecodeWorker, videos: list[bytes]):
    first = servant.decode(videos[0], [1, 2], EXPECT)
    copy = first.copy()
    servant.begin(videos[1], [1, 2], EXPECT)
    time.sleep(0.2)
    assert np.array_equal(first, copy)
    assert not np.array_equal(servant.finish(), copy)


def test_requests_of_any_size_fit(servant: DecodeWorker, videos: list[bytes]):
    for frames in (1, 48, 3, 40):
        assert servant.decode(videos[0], list(range(frames)), EXPECT).shape == (frames, 64, 96, 3)


def test_damaged_bytes_are_unreadable_and_the_next_clip_is_served(servant: DecodeWorker, videos: list[bytes]):
    pid = servant.pid
    for bad in (b"", b"<html>503</html>", videos[0][: len(videos[0]) // 2]):
        with pytest.raises(Unreadable) as e:
            servant.decode(bad, [0, 47], EXPECT)
        assert e.value.reason == "error"
    assert servant.decode(videos[0], [0], EXPECT).shape == (1, 64, 96, 3)
    assert servant.pid == pid


def test_a_killed_servant_is_replaced_and_the_clip_is_served(servant: DecodeWorker, videos: list[bytes]):
    want = servant.decode(videos[0], [3], EXPECT).copy()
    old = servant.pid
    os.kill(old, signal.SIGKILL)
    assert np.array_equal(servant.decode(videos[0], [3], EXPECT), want)
    assert servant.pid != old
    assert not Path(f"/proc/{old}").exists()  # reaped: no zombie
    assert servant.counts["crash"] == 1


def test_a_stopped_servant_is_killed_and_the_clip_is_served(servant: DecodeWorker, videos: list[bytes]):
    servant.decode(videos[0], [3], EXPECT)
    servant.timeout_s = 2
    os.kill(servant.pid, signal.SIGSTOP)
    assert servant.decode(videos[0], [3], EXPECT).shape[0] == 1
    assert servant.counts["timeout"] == 1


def test_a_hang_costs_two_time_outs_and_no_more(bad_servant: DecodeWorker):
    with pytest.raises(Unreadable):
        bad_servant.decode(b"warm up", [0], EXPECT)
    bad_servant.timeout_s = 1.5
    began = time.monotonic()
    with pytest.raises(Unreadable) as e:
        bad_servant.decode(b"HANG", [0], EXPECT)
    assert e.value.reason == "timeout"
    assert 2.9 < time.monotonic() - began < 30  # and not for ever; a busy machine starts processes slowly
    bad_servant.timeout_s = 20
    with pytest.raises(Unreadable):  # the next is answered
        bad_servant.decode(b"nothing", [0], EXPECT)


def test_a_servant_that_spins_is_killed(bad_servant: DecodeWorker):
    bad_servant.timeout_s = 1
    with pytest.raises(Unreadable, match="timeout"):
        bad_servant.decode(b"SPIN1000", [0], EXPECT)


def test_a_servant_that_is_starved_of_cores_does_not_hang(bad_servant: DecodeWorker, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(Unreadable):
        bad_servant.decode(b"warm up", [0], EXPECT)
    bad_servant.timeout_s = 1
    # As if it ran, and the clock of its CPU stood still, as it nearly does where many share a core.
    monkeypatch.setattr("vjepa_data.process._is_running_and_cpu_s", lambda pid: (True, 0.0))
    with pytest.raises(Unreadable, match=r"error: .*cannot +open"):
        bad_servant.decode(b"NAP", [0], EXPECT)
    assert bad_servant.counts["timeout"] == 0


@pytest.mark.parametrize(("order", "reason"), [(b"CRASH", "crash"), (b"EAT", "memory")])
def test_a_crash_and_a_flood_of_memory_are_contained(bad_servant: DecodeWorker, order: bytes, reason: str):
    with pytest.raises(Unreadable) as e:
        bad_servant.decode(order, [0], EXPECT)
    assert e.value.reason == reason


def test_what_a_decoder_prints_stays_bounded_and_messages_are_one_line(bad_servant: DecodeWorker):
    details = []
    for _ in range(40):
        with pytest.raises(Unreadable) as e:
            bad_servant.decode(b"TALK", [0], EXPECT)
        details.append(e.value.detail)
    assert os.fstat(bad_servant._printed.fileno()).st_size <= 1 << 20
    assert all(detail.isprintable() and len(detail) <= 160 for detail in details)


def test_what_one_decoder_gives_up_on_another_may_decode(bad_servant: DecodeWorker, videos: list[bytes], read_number):
    assert read_number(bad_servant.decode(videos[0], [9], EXPECT)[0]) == 9
    assert bad_servant.counts["fallback"] == 1
    assert bad_servant.fell_back == "error"


def test_what_may_well_cost_more_gets_more_time(bad_servant: DecodeWorker):
    with pytest.raises(Unreadable):
        bad_servant.decode(b"warm up", [0], EXPECT)
    bad_servant.timeout_s = 0.2
    with pytest.raises(Unreadable, match=r"timeout: .* in 0.2 s"):
        bad_servant.decode(b"HANG", [0, 47], EXPECT)
    hd = Expect(frames=900, width=1280, height=720)  # at worst 300 + 1 frames, 11 s
    with pytest.raises(Unreadable, match=r"error: .*cannot +open"):
        bad_servant.decode(b"NAP", [600], hd)


def test_it_is_recycled_after_so_many_clips(videos: list[bytes], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("vjepa_data.decoding.decode_worker.RECYCLE_CLIPS", 3)
    servant = DecodeWorker()
    pids = set()
    for i in range(7):
        pids.add(servant.pid)
        servant.decode(videos[i % 6], [i], EXPECT)
    assert len(pids) == 3
    assert [alive(pid) for pid in pids].count(True) == 1
    servant.close()


def test_a_missing_decoder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "decord.py").write_text("raise ImportError('no decord for this machine')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    servant = DecodeWorker()
    with pytest.raises(BadInput, match=r"decord cannot be used \(no decord for this machine\); set loader.decoder"):
        servant.decode(b"", [0], EXPECT)
    servant.close()


def test_one_that_does_not_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "decord.py").write_text("raise RuntimeError('the library is broken')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    servant = DecodeWorker()
    with pytest.raises(BadInput, match=r"does not start \(.*the library is broken\)"):
        servant.decode(b"", [0], EXPECT)
    servant.close()


def test_starting_slowly_is_no_time_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "decord.py").write_text("import time; time.sleep(1.5)\n" + BAD_DECORD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    servant = DecodeWorker(timeout_s=1)
    with pytest.raises(Unreadable, match=r"cannot +open"):
        servant.decode(b"", [0], EXPECT)
    servant.close()


def test_it_imports_no_torch_and_runs_few_threads(servant: DecodeWorker, videos: list[bytes]):
    servant.decode(videos[0], [0], EXPECT)
    assert "libtorch" not in Path(f"/proc/{servant.pid}/maps").read_text()
    assert len(os.listdir(f"/proc/{servant.pid}/task")) <= 2


def test_it_dies_with_its_owner_even_in_the_middle_of_a_hang(tmp_path: Path):
    (tmp_path / "decord.py").write_text(BAD_DECORD)
    code = (
        "from vjepa_data.decoding.decode_worker import Servant, Expect\n"
        "s = Servant(timeout_s=100)\n"
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


def test_signals_of_a_terminal_or_scheduler_do_not_end_it(servant: DecodeWorker, videos: list[bytes]):
    servant.decode(videos[0], [0], EXPECT)
    pid = servant.pid
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(pid, number)
    servant.decode(videos[0], [0], EXPECT)
    assert servant.pid == pid


def test_threads_of_a_decoder_share_a_core_for_the_time_of_a_clip():
    before, seen = os.sched_getaffinity(0), []
    with on_one_core():
        thread = threading.Thread(target=lambda: seen.append(os.sched_getaffinity(0)))
        thread.start()
        thread.join()
        assert seen == [os.sched_getaffinity(0)]
        assert len(seen[0]) == 1
    assert os.sched_getaffinity(0) == before


def test_only_the_part_that_is_wanted_is_handed_over(servant: DecodeWorker, videos: list[bytes]):
    whole = servant.decode(videos[0], [3, 9], EXPECT).copy()
    servant.begin(videos[0], [3, 9], EXPECT, part=(5, 7, 40, 30))
    assert np.array_equal(servant.finish(), whole[:, 5:45, 7:37])
