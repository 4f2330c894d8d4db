"""Probe, transcode and reject real video files, which the tests create."""

import io
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from odd_files import ffmpeg, turned

from vjepa_data.decoding.backends import Expect, decode
from vjepa_data.media.canonical import ClipFormat, read_canonical
from vjepa_data.media.probe import probe
from vjepa_data.media.transcode import StoredClip, check, resample_frames, stored_rate, stored_size, transcode
from vjepa_data.media.video import Reason, Refused
from vjepa_data.spec import Encode, Filter

FORM = Encode(short_side_px=64)

needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="odd files are made by the ffmpeg command")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write three seconds of a moving pattern: 128x72, 25 frames per second, H.264, a key frame every 250."""
    path = tmp_path_factory.mktemp("good") / "good.mp4"
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 128, 72, "yuv420p"
        y, x = np.mgrid[:72, :128]
        for number in range(75):
            picture = np.stack([x * 2 + number * 3, y * 3, (x + y) + number * 2], axis=-1) % 256
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture.astype(np.uint8), format="rgb24")))
        container.mux(stream.encode())
    return path


def store(path: Path, *, start_s: float | None = None, end_s: float | None = None, form: Encode = FORM, **accept):
    """Transcode and check, as the builder does."""
    clip = transcode(path, start_s=start_s, end_s=end_s, encode=form, accept=Filter(**accept))
    check(clip, gop=form.gop)
    return clip


def frames_of(clip: StoredClip, numbers: list[int]) -> np.ndarray:
    expect = Expect(clip.stored.frames, clip.stored.width, clip.stored.height)
    return decode(clip.data, numbers, backend="decord", expect=expect)


def reason_of(call: Callable[..., object], *args, **kwargs) -> Reason:
    with pytest.raises(Refused) as caught:
        call(*args, **kwargs)
    return caught.value.reason


def test_probe_reads_the_declared_properties(good: Path) -> None:
    facts = probe(good)
    assert (facts.codec, facts.width, facts.height, facts.rate) == ("h264", 128, 72, (25, 1))
    assert (facts.duration_s, facts.frames, facts.audio) == (3.0, 75, False)


def test_a_stored_clip_is_canonical_for_all_decoders(good: Path) -> None:
    clip = store(good)
    assert clip.stored == ClipFormat(frames=75, rate=(25, 1), width=114, height=64)
    assert read_canonical(clip.data, gop=12) == clip.stored
    with av.open(io.BytesIO(clip.data), "r") as container:
        kinds = [(frame.key_frame, frame.pts) for frame in container.decode(video=0)]
    assert [number for number, (is_key, _) in enumerate(kinds) if is_key] == list(range(0, 75, 12))
    with av.open(io.BytesIO(clip.data), "r") as container:
        pixels = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    numbers = [0, 11, 12, 40, 74]
    assert (frames_of(clip, numbers) == pixels[numbers]).all()


def test_the_same_video_gives_the_same_bytes(good: Path) -> None:
    assert store(good).data == store(good).data


def test_a_part_has_the_requested_start_and_length(good: Path) -> None:
    full, part = store(good), store(good, start_s=1.0, end_s=2.2)
    assert part.stored.frames == 30
    difference = frames_of(part, [0, 29]).astype(int) - frames_of(full, [25, 54])
    neighbour = frames_of(part, [0, 29]).astype(int) - frames_of(full, [26, 55])
    assert np.abs(difference).mean() < 0.5 * np.abs(neighbour).mean()


def test_a_part_beyond_the_end_is_truncated(good: Path) -> None:
    assert reason_of(store, good, start_s=2.0, end_s=9.0) is Reason.TRUNCATED


def test_still_and_dark_clips_are_rejected_on_request(good: Path) -> None:
    assert reason_of(store, good, min_motion=200.0) is Reason.STILL
    assert reason_of(store, good, min_brightness=250.0) is Reason.DARK


@pytest.mark.parametrize(
    ("rate", "stored"), [(24, 24), (30, 30), (60, 30), (50, 25), (48, 24), (120, 30), ("30000/1001", "30000/1001")]
)
def test_high_rates_are_divided_by_an_integer(rate: int | str, stored: int | str) -> None:
    assert stored_rate(Fraction(rate), encode=Encode()) == Fraction(stored)


def test_the_shorter_side_is_exact_and_both_are_even() -> None:
    assert stored_size(1920, 1080, encode=Encode()) == (456, 256)
    assert stored_size(1080, 1920, encode=Encode()) == (256, 456)
    assert stored_size(17, 17, encode=Encode(short_side_px=32)) == (32, 32)


def test_resampling_takes_the_frame_on_display() -> None:
    at = [Fraction(n) for n in (0, 1, 4, 5)]
    assert list(resample_frames(zip(at, "abcd", strict=True), start_s=None, seconds=None, rate=Fraction(1))) == list(
        "abbbcd"
    )
    assert list(resample_frames(zip(at, "abcd", strict=True), start_s=1.0, seconds=3.0, rate=Fraction(1))) == list(
        "bbb"
    )
    sixty = zip([Fraction(n, 60) for n in range(8)], "abcdefgh", strict=True)
    assert list(resample_frames(sixty, start_s=None, seconds=None, rate=Fraction(30))) == list("aceg")
    slow = zip([Fraction(n, 10) for n in range(3)], "abc", strict=True)
    assert list(resample_frames(slow, start_s=None, seconds=None, rate=Fraction(20))) == list("aabbc")


def test_time_stamps_with_jumps_are_damage() -> None:
    for times in ([0, 15_000], [0, 2, 1]):
        frames = [(Fraction(time), "x") for time in times]
        with pytest.raises(Refused) as caught:
            list(resample_frames(iter(frames), start_s=None, seconds=None, rate=Fraction(1)))
        assert caught.value.reason is Reason.DAMAGED


def test_files_that_are_not_videos_are_told_apart(good: Path, tmp_path: Path) -> None:
    data = good.read_bytes()
    made = {
        "empty.mp4": (b"", Reason.EMPTY),
        "page.mp4": (b"<html>404</html>" * 40, Reason.NOT_VIDEO),
        "list.mp4": (f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{good}\n".encode(), Reason.NOT_VIDEO),
        "concat.mp4": (f"ffconcat version 1.0\nfile '{good}'\n".encode(), Reason.NOT_VIDEO),
        "zeroed.mp4": (bytes(1024) + data[1024:], Reason.NOT_VIDEO),
        "half.mp4": (data[: len(data) // 2], Reason.DAMAGED),
    }
    found = {}
    for name, (content, _) in made.items():
        (tmp_path / name).write_bytes(content)
        found[name] = reason_of(store, tmp_path / name)
    found["absent.mp4"] = reason_of(store, tmp_path / "absent.mp4")
    assert found == {name: reason for name, (_, reason) in made.items()} | {"absent.mp4": Reason.MISSING}


def test_an_mp4_without_its_index_has_its_own_reason(good: Path, tmp_path: Path) -> None:
    data = good.read_bytes()
    at = data.index(b"moov")
    (tmp_path / "x.mp4").write_bytes(data[: at - 4] + data[at - 4 :].replace(b"moov", b"junk", 1))
    assert reason_of(store, tmp_path / "x.mp4") is Reason.NO_INDEX


@pytest.mark.parametrize(
    ("words", "difference"),
    [
        (["-g", "48"], "key frames"),
        (["-pix_fmt", "yuv444p"], "yuv444p"),
        (["-c:v", "mpeg4"], "not H.264"),
        (["-movflags", "frag_keyframe"], "complete|fragmented"),
        (["-movflags", "-faststart"], "front"),
        (["-use_editlist", "1"], "edit list"),
        (["-aspect", "2:1"], "square"),
        (["-f", "matroska"], "MP4"),
    ],
)
@needs_ffmpeg
def test_differences_from_the_canonical_form_are_named(
    good: Path, tmp_path: Path, words: list[str], difference: str
) -> None:
    path = tmp_path / "x.mp4"
    form = ["-c:v", "libx264", "-bf", "0", "-g", "12", "-use_editlist", "0", "-movflags", "faststart"]
    ffmpeg("-i", good, *form, path)
    assert read_canonical(path.read_bytes(), gop=12).frames == 75
    ffmpeg("-i", good, *form, *words, path)
    with pytest.raises(Refused, match=difference):
        read_canonical(path.read_bytes(), gop=12)


def test_a_rotated_video_is_stored_upright(good: Path, tmp_path: Path) -> None:
    (tmp_path / "turned.mp4").write_bytes(turned(good.read_bytes()))
    assert (probe(tmp_path / "turned.mp4").width, probe(tmp_path / "turned.mp4").height) == (72, 128)
    clip = store(tmp_path / "turned.mp4")
    assert (clip.stored.width, clip.stored.height) == (64, 114)
    clockwise = np.rot90(frames_of(store(good), [10])[0].astype(int), -1)
    assert np.abs(frames_of(clip, [10])[0] - clockwise).mean() < 4
    with pytest.raises(Refused, match="rotated"):
        read_canonical(turned(clip.data), gop=12)


@needs_ffmpeg
def test_odd_files_are_stored_or_rejected_with_a_reason(good: Path, tmp_path: Path) -> None:
    source = "testsrc2=size=128x72:rate=25:duration=2"
    made: dict[str, list[str | Path]] = {
        "sound.mp4": ["-f", "lavfi", "-i", "sine=duration=1", "-c:a", "aac"],
        "edits.mp4": ["-ss", "1.3", "-i", good, "-c", "copy"],
        "stream.ts": ["-i", good, "-c", "copy"],
        "old.avi": ["-f", "lavfi", "-i", source, "-c:v", "mpeg4", "-bf", "2"],
        "web.webm": ["-f", "lavfi", "-i", source, "-c:v", "libvpx", "-deadline", "realtime"],
        "lace.mp4": ["-f", "lavfi", "-i", source, "-vf", "interlace", "-flags", "+ildct+ilme", "-c:v", "libx264"],
        "one.mp4": ["-f", "lavfi", "-i", source, "-frames:v", "1", "-c:v", "libx264"],
        "slow.mp4": ["-f", "lavfi", "-i", "testsrc2=size=128x72:rate=1:duration=3", "-c:v", "libx264"],
        "vary.mkv": ["-f", "lavfi", "-i", source, "-vf", "select='not(mod(n,3))+gt(n,30)'", "-fps_mode", "vfr"],
        "wide.mp4": ["-f", "lavfi", "-i", source, "-vf", "setsar=2", "-c:v", "libx264"],
        "deep.mp4": ["-f", "lavfi", "-i", source, "-c:v", "libx264", "-pix_fmt", "yuv444p10le"],
        "small.mkv": ["-f", "lavfi", "-i", "testsrc2=size=64x64:rate=25:duration=1", "-c:v", "mpeg2video"],
    }
    for name, words in made.items():
        ffmpeg(*words, *(["-preset", "ultrafast"] if "libx264" in words else []), tmp_path / name)
    data = (tmp_path / "vary.mkv").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(data[: len(data) * 6 // 10])
    ffmpeg("-i", tmp_path / "stream.ts", "-c:v", "mpeg2video", tmp_path / "a.ts")
    ffmpeg("-f", "lavfi", "-i", "testsrc2=size=64x64:rate=25:duration=1", "-c:v", "mpeg2video", tmp_path / "b.ts")
    (tmp_path / "sizes.ts").write_bytes((tmp_path / "a.ts").read_bytes() + (tmp_path / "b.ts").read_bytes())

    found: dict[str, tuple[int, ...] | Reason] = {}
    for path in sorted(tmp_path.iterdir()):
        try:
            stored = store(path).stored
            found[path.name] = (stored.frames, round(stored.fps), stored.width, stored.height)
        except Refused as refusal:
            found[path.name] = refusal.reason
    assert found == {
        "a.ts": (75, 25, 114, 64),
        "b.ts": (25, 25, 64, 64),
        "cut.mkv": Reason.TRUNCATED,
        "deep.mp4": (50, 25, 114, 64),
        "edits.mp4": (42, 25, 114, 64),
        "lace.mp4": (25, 12, 114, 64),
        "old.avi": (50, 25, 114, 64),
        "one.mp4": (1, 25, 114, 64),
        "sizes.ts": Reason.SIZE_CHANGES,
        "slow.mp4": (3, 1, 114, 64),
        "small.mkv": (25, 25, 64, 64),
        "sound.mp4": Reason.NO_VIDEO_STREAM,
        "stream.ts": (75, 25, 114, 64),
        "vary.mkv": (50, 25, 114, 64),
        "web.webm": (50, 25, 114, 64),
        "wide.mp4": (50, 25, 228, 64),
    }
