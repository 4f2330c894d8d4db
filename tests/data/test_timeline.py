"""Times, lengths and rates come from the packets of real files, which the tests create. Seeks are exact."""

import io
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.stream import VideoStream

from vjepa_data.media import frames as frames_module
from vjepa_data.media.canonical import ClipFormat
from vjepa_data.media.frames import read_frames
from vjepa_data.media.probe import probe
from vjepa_data.media.timeline import dense_rate, mean_rate, read_packets
from vjepa_data.media.transcode import SourceSample, StoredClip, check, stored_rate, transcode
from vjepa_data.media.video import Reason, Refused, VideoInfo
from vjepa_data.spec import Encode, Filter

FORM = Encode(short_side_px=64, preset="ultrafast")
WIDTH, HEIGHT = 96, 64


def numbered_frame(number: int, width: int, height: int) -> np.ndarray:
    """Draw a frame whose upper half says its number: nine squares, black or white. The lower half is noise."""
    picture = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
    for bit in range(9):
        picture[: height // 2, bit * width // 9 : (bit + 1) * width // 9] = 235 if number >> bit & 1 else 16
    return picture


def read_number(frame: np.ndarray) -> int:
    height, width = frame.shape[:2]
    return sum(int(frame[height // 4, (2 * bit + 1) * width // 18].mean() > 128) << bit for bit in range(9))


Shown = list[tuple[float, int]]
"""Time in seconds and number of each frame."""


def write(
    path: Path,
    codec: str,
    *,
    frames: int = 100,
    fps: int = 25,
    times: list[int] | None = None,
    shown: Callable[[int], int] = lambda n: n,
    form: str | None = None,
    pixels: str = "yuv420p",
    options: Mapping[str, str] | None = None,
) -> Path:
    """Write numbered frames, optionally at given times in ticks of 1 / fps."""
    with av.open(str(path), "w", format=form) as container:
        stream = container.add_stream(codec, rate=fps, options={"g": "30", "threads": "1", **(options or {})})
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pixels
        stream.time_base = Fraction(1, fps)
        for number, time in enumerate(times or range(frames)):
            frame = av.VideoFrame.from_ndarray(numbered_frame(shown(number), WIDTH, HEIGHT), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def shown(path: Path, info: VideoInfo, **options) -> Shown:
    return [(float(t), read_number(f.to_ndarray(format="rgb24"))) for t, f in read_frames(path, info, **options)]


def stored(path: Path, *, start_s: float | None = None, end_s: float | None = None) -> tuple[ClipFormat, list[int]]:
    """Store a video as the builder does, and return the numbers of its frames."""
    clip = transcode(path, start_s=start_s, end_s=end_s, encode=FORM, accept=Filter())
    check(clip, gop=FORM.gop)
    with av.open(io.BytesIO(clip.data), "r") as container:
        return clip.stored, [read_number(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]


X264 = {"preset": "ultrafast", "x264-params": "bframes=2:scenecut=0"}

KINDS: dict[str, tuple[str, dict[str, str]]] = {
    "x.mp4": ("libx264", X264),
    "x.mkv": ("libx264", X264),
    "x.flv": ("flv", {}),
    "x.ts": ("libx264", X264),
    "open.ts": ("libx264", {**X264, "x264-params": "bframes=2:scenecut=0:open-gop=1"}),
    "hevc.ts": ("libx265", {"preset": "ultrafast", "x265-params": "keyint=30:bframes=2:log-level=none"}),
    "mpeg2.ts": ("mpeg2video", {"bf": "2"}),
    "x.mpg": ("mpeg2video", {"bf": "2"}),
    "x.vob": ("mpeg2video", {"bf": "2"}),
    "x.m2v": ("mpeg2video", {"bf": "2"}),
    "x.avi": ("mpeg4", {}),
    "bframes.avi": ("mpeg4", {"bf": "2"}),
    "h264.avi": ("libx264", X264),
    "x.h264": ("libx264", X264),
    "x.hevc": ("libx265", {"preset": "ultrafast", "x265-params": "keyint=30:bframes=2:log-level=none"}),
}


@pytest.mark.parametrize("name", KINDS)
def test_frames_from_the_middle_equal_those_from_the_start(name: str, tmp_path: Path) -> None:
    codec, options = KINDS[name]
    path = write(tmp_path / name, codec, frames=200, options=options)
    info = probe(path)
    whole = shown(path, info)
    assert [number for _, number in whole] == list(range(200))
    assert np.allclose([time for time, _ in whole], np.arange(200) / 25, atol=2e-3)
    for start_s in (0.04, 6.0, 7.9):
        part = shown(path, info, start_s=start_s)
        assert part[0][0] <= start_s + 0.01
        assert np.allclose(part, whole[-len(part) :], atol=2e-3)


@pytest.mark.parametrize("name", ["x.mkv", "x.ts", "bframes.avi", "x.h264"])
def test_a_part_is_not_decoded_from_the_start(name: str, tmp_path: Path) -> None:
    codec, options = KINDS[name]
    path = write(tmp_path / name, codec, frames=300, options=options)
    first = next(read_frames(path, probe(path), start_s=11.9))
    assert first[0] > 4


def test_a_seek_that_lands_late_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "x.mkv", "libx264", frames=60, options=X264)
    monkeypatch.setattr(frames_module, "STEPS_BACK_S", (-1, 0))
    assert stored(path, start_s=0.4, end_s=0.8)[1] == list(range(10, 20))


def test_a_stored_frame_that_differs_from_its_source_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.mp4", "libx264", frames=24, options=X264)
    clip = transcode(path, start_s=None, end_s=None, encode=FORM, accept=Filter())
    assert [sample.number for sample in clip.samples] == [0, 12, 23]
    check(clip, gop=FORM.gop)
    other = SourceSample(12, 255 - clip.samples[1].thumbnail)
    with pytest.raises(Refused, match="frame 12 of 24 differs from its source") as caught:
        check(StoredClip(clip.data, clip.stored, (other,)), gop=FORM.gop)
    assert caught.value.reason is Reason.CHECK_FAILED


def test_a_length_that_is_not_declared_is_that_of_the_packets(tmp_path: Path) -> None:
    live = write(tmp_path / "x.webm", "libvpx", frames=30, form="webm", options={"deadline": "realtime"})
    data = live.read_bytes()
    at = data.index(b"\x44\x89\x88")  # Duration, an element of eight bytes
    live.write_bytes(data[:at] + b"\xec\x89" + data[at + 2 :])  # Void
    for path in (live, write(tmp_path / "x.h264", "libx264", frames=30, options=X264)):
        assert probe(path).duration_s == pytest.approx(1.2, abs=0.05)
        assert stored(path)[0].frames == 30


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_wrong_length_in_the_header_is_ignored(factor: float, tmp_path: Path) -> None:
    path = write(tmp_path / "x.flv", "flv", frames=50)
    data = bytearray(path.read_bytes())
    at = data.index(b"duration") + 9
    data[at : at + 8] = np.array(2.0 * factor, ">f8").tobytes()
    path.write_bytes(data)
    assert probe(path).duration_s == pytest.approx(2.0, abs=0.05)
    assert stored(path)[1] == list(range(50))


def test_a_file_that_ends_early_is_truncated(tmp_path: Path) -> None:
    data = write(tmp_path / "x.mkv", "libx264", frames=100, options=X264).read_bytes()
    (tmp_path / "cut.mkv").write_bytes(data[: len(data) // 2])
    with pytest.raises(Refused, match="but 4") as caught:
        stored(tmp_path / "cut.mkv")
    assert caught.value.reason is Reason.TRUNCATED


def test_pictures_that_stay_for_long_are_kept(tmp_path: Path) -> None:
    slides = write(tmp_path / "x.mp4", "libx264", fps=5, times=[0, 400, *range(401, 420)], options=X264)
    form, numbers = stored(slides)
    assert (form.frames, form.fps) == (420, 5)
    assert numbers[399:402] == [0, 1, 2]


def test_a_pause_after_the_last_picture_is_kept(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "x.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(10):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number, WIDTH, HEIGHT), format="rgb24")
            for packet in stream.encode(frame):
                packet.duration = 30 if number == 9 else 1
                container.mux(packet)
        container.mux(stream.encode())
    form, numbers = stored(tmp_path / "x.mp4")
    assert form.frames == 39
    assert numbers == [*range(9), *[9] * 30]


def test_empty_chunks_of_an_avi_keep_their_time(tmp_path: Path) -> None:
    path = write(tmp_path / "x.avi", "mpeg4", times=[*range(25), *range(75, 100)])
    form, numbers = stored(path)
    assert form.frames == 100
    assert numbers[24:77] == [*[24] * 51, 25, 26]


def test_a_burst_is_stored_at_its_own_rate(tmp_path: Path) -> None:
    path = write(tmp_path / "x.mp4", "libx264", fps=50, times=[0, 100, *range(150, 200), 300], options=X264)
    info = probe(path)
    assert info.dense_rate == (50, 1)
    form, numbers = stored(path)
    assert form.rate == (25, 1)
    assert len(set(numbers)) >= 27


def test_a_rate_that_is_about_constant_stays_the_mean() -> None:
    base, even = Fraction(1, 1000), [round(n * 1000 / 29.97) for n in range(200)]
    assert dense_rate(even, base, Fraction(30000, 1001)) is None
    jittered = [time + (n * 7 % 5) for n, time in enumerate(even)]
    assert dense_rate(jittered, base, Fraction(30000, 1001)) is None
    burst = [*range(0, 5000, 500), *range(5000, 6000, 20), *range(6000, 9000, 500)]
    assert dense_rate(burst, base, Fraction(7)) == 50


def test_a_rate_counted_wrongly_is_measured() -> None:
    base, times = Fraction(1, 30000), [n * 1001 for n in range(30)]
    assert mean_rate(times, base, Fraction(31)) == Fraction(30000, 1001)
    assert mean_rate(times, base, Fraction(30)) == 30


@pytest.mark.parametrize(
    ("rate", "expected"), [("30.5", "30.5"), ("31", "31"), ("33", "33"), ("61", "30.5"), ("1/3600", "1")]
)
def test_rates_a_little_above_the_limit_keep_their_frames(rate: str, expected: str) -> None:
    assert stored_rate(Fraction(rate), encode=Encode()) == Fraction(expected)


def test_a_preview_before_the_video_is_not_the_video(tmp_path: Path) -> None:
    path = tmp_path / "x.mkv"
    with av.open(str(path), "w") as container:
        cover, preview, video = (container.add_stream("mpeg4", rate=25) for _ in range(3))
        for stream, scale in ((cover, 4), (preview, 1), (video, 2)):
            stream.width, stream.height, stream.pix_fmt = WIDTH * scale, HEIGHT * scale, "yuv420p"
        for number in range(20):
            for stream, scale in ((cover, 4), (preview, 1), (video, 2)):
                if stream is cover and number:
                    continue
                picture = numbered_frame(number, WIDTH * scale, HEIGHT * scale)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        for stream in (cover, preview, video):
            container.mux(stream.encode())
    info = probe(path)
    assert (info.stream, info.video_streams, info.width) == (2, 3, 2 * WIDTH)
    assert stored(path)[1] == list(range(20))


def test_a_video_trimmed_behind_its_only_key_frame_is_kept(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.mp4", "libx264", frames=60, options={"g": "250", "bf": "0"})
    with av.open(str(whole)) as source, av.open(str(tmp_path / "x.mp4"), "w") as target:
        stream = source.streams.video[0]
        output = target.add_stream_from_template(stream)
        packets = [packet for packet in source.demux(stream) if packet.size]
        start = packets[30].pts or 0
        for packet in packets:
            packet.pts, packet.dts, packet.stream = (packet.pts or 0) - start, (packet.dts or 0) - start, output
            target.mux(packet)
    info = probe(tmp_path / "x.mp4")
    assert info.duration_s == pytest.approx((len(packets) - 30) / info.fps, abs=0.01)
    assert stored(tmp_path / "x.mp4")[1] == list(range(30, len(packets)))


def test_an_encrypted_video_is_named(tmp_path: Path) -> None:
    key = {"encryption_scheme": "cenc-aes-ctr", "encryption_key": "76" * 16, "encryption_kid": "a7" * 16}
    with av.open(str(tmp_path / "x.mp4"), "w", options=key) as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(4):
            picture = numbered_frame(number, WIDTH, HEIGHT)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    with pytest.raises(Refused, match="encrypted after 0 frames; decrypt it first"):
        probe(tmp_path / "x.mp4")


def _packets_of_ts(data: bytes) -> Iterator[bytes]:
    yield from (data[at : at + 188] for at in range(0, len(data), 188))


@pytest.mark.parametrize("codec", ["libx264", "mpeg2video"])
def test_a_recording_begins_at_its_first_whole_picture(codec: str, tmp_path: Path) -> None:
    options = X264 if codec == "libx264" else {"bf": "2"}
    data = write(tmp_path / "x.ts", codec, options=options).read_bytes()
    tables = b"".join([*_packets_of_ts(data)][:3])
    (tmp_path / "cut.ts").write_bytes(tables + data[len(data) // 188 // 6 * 188 : -500])
    form, numbers = stored(tmp_path / "cut.ts")
    assert numbers[0] == 30
    assert numbers[:60] == list(range(30, 90))
    assert form.frames >= 67


def test_joined_recordings_are_one_video(tmp_path: Path) -> None:
    first = write(tmp_path / "a.ts", "libx264", frames=60, options=X264).read_bytes()
    second = write(tmp_path / "b.ts", "libx264", frames=150, shown=lambda n: n + 60, options=X264).read_bytes()
    path = tmp_path / "x.ts"
    path.write_bytes(first + second)
    info = probe(path)
    assert info.is_joined
    assert info.duration_s == pytest.approx(8.4, abs=0.1)
    assert stored(path)[1] == list(range(210))
    assert [number for _, number in shown(path, info, start_s=8.0)][-10:] == list(range(200, 210))
    assert stored(path, start_s=7.9, end_s=8.3)[0].frames == 10


@pytest.mark.parametrize("codec", ["libx264", "mpeg2video"])
@pytest.mark.parametrize("gap_s", [0.4, 3])
@pytest.mark.parametrize(("end", "begins"), [(None, 0), (-500, 0), (None, 6), (-500, 6)])
def test_joined_recordings_with_a_gap_are_one_video(
    codec: str, gap_s: float, end: int | None, begins: int, tmp_path: Path
) -> None:
    """The first may end, and the second begin, inside a packet. The last whole picture is held meanwhile."""
    options = X264 if codec == "libx264" else {"bf": "2"}
    first = write(tmp_path / "a.ts", codec, frames=60, options=options).read_bytes()
    write(tmp_path / "b.ts", codec, frames=75, shown=lambda n: n + 60, options=options)
    second = _delayed(tmp_path / "b.ts", 2.4 + gap_s)
    if begins:
        second = second[: 3 * 188] + second[len(second) // 188 // begins * 188 :]
    path = tmp_path / "x.ts"
    path.write_bytes(first[:end] + second)
    info = probe(path)
    assert info.duration_s == pytest.approx(5.4 + gap_s, abs=0.1)
    seen = [number for _, number in shown(path, info)]
    assert seen == sorted(set(seen))
    assert {*range(56), *range(120, 135)} <= set(seen)
    if not begins:
        assert {*range(60, 135)} <= set(seen)


def _delayed(path: Path, seconds: float) -> bytes:
    """Return a recording whose clock begins later."""
    out = path.with_suffix(".late.ts")
    with av.open(str(path)) as old, av.open(str(out), "w", options={"output_ts_offset": str(seconds)}) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(old.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)
    return out.read_bytes()


def test_packets_of_a_stream_that_appears_late_are_skipped():
    read = iter([av.Packet(1), IndexError("list index out of range"), av.Packet(2)])

    def demux() -> Iterator[av.Packet]:  # PyAV's check reads memory that it does not own, so no file is certain to fail
        for packet in read:
            if isinstance(packet, IndexError):
                raise packet
            yield packet

    assert [packet.size for packet in read_packets(demux)] == [1, 2]
