"""Frames are stored as ffmpeg displays them (orientation, mirroring, dynamic range), and all decoders agree."""

import inspect
import io
import struct
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.filter.graph import Graph
from av.video.stream import VideoStream

from vjepa_data.decoding.backends import Expect, decode
from vjepa_data.decoding.mp4_boxes import IDENTITY
from vjepa_data.decoding.orientation import OddRotation, display_matrix, orientation
from vjepa_data.errors import Unreadable
from vjepa_data.media.canonical import compare
from vjepa_data.media.fetch import FileRef
from vjepa_data.media.probe import probe
from vjepa_data.media.tasks import Examined, ExamineTask, work
from vjepa_data.media.transcode import PictureBox, check, transcode
from vjepa_data.media.video import Reason, Refused
from vjepa_data.spec import Encode, Filter

ONE = 1 << 16

MATRICES: dict[str, tuple[tuple[int, int, int, int], str]] = {
    "upright": ((ONE, 0, 0, ONE), ""),
    "quarter": ((0, ONE, -ONE, 0), "transpose=clock"),
    "half": ((-ONE, 0, 0, -ONE), "hflip,vflip"),
    "three_quarters": ((0, -ONE, ONE, 0), "transpose=cclock"),
    "left_right": ((-ONE, 0, 0, ONE), "hflip"),
    "upside": ((ONE, 0, 0, -ONE), "vflip"),
    "mirrored_quarter": ((0, ONE, ONE, 0), "transpose=cclock_flip"),
    "mirrored_three_quarters": ((0, -ONE, -ONE, 0), "transpose=clock_flip"),
}
"""a, b, c, d of the display matrix (ISO/IEC 14496-12, section 8.3.2), and the filters of ffmpeg's autorotation."""


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An MP4 of six frames, 96x64, without a symmetry."""
    return encode(tmp_path_factory.mktemp("flat") / "x.mp4")


def encode(path: Path, *, codec: str = "libx264", times: list[int] | None = None, **options: str) -> bytes:
    y, x = np.mgrid[:64, :96]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options={"preset": "ultrafast", "threads": "1", **options})
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for number, time in enumerate(times or range(6)):
            picture = np.stack([x * 2, y * 3, np.full_like(x, number * 40)], axis=-1).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = time
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path.read_bytes()


def with_matrix(data: bytes, a: int, b: int, c: int, d: int) -> bytes:
    """Return an MP4 with another display matrix in its track header."""
    old, new = (
        b"".join(n.to_bytes(4, signed=True) for n in (*m[:2], 0, *m[2:], 0, 0, 0, 1 << 30))
        for m in ((ONE, 0, 0, ONE), (a, b, c, d))
    )
    at = data.index(old, data.index(b"tkhd"))
    return data[:at] + new + data[at + 36 :]


def filtered(frame: av.VideoFrame, filters: str) -> np.ndarray:
    graph = Graph()
    chain = [graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base)]
    for step in filter(None, filters.split(",")):
        name, _, options = step.partition("=")
        chain.append(graph.add(name, options or None))
    graph.link_nodes(*chain, graph.add("buffersink")).configure()
    graph.vpush(frame)
    return graph.vpull().to_ndarray(format="rgb24")


@pytest.mark.parametrize("name", MATRICES)
def test_a_display_matrix_is_applied_as_ffmpeg_does(flat: bytes, name: str, tmp_path: Path) -> None:
    matrix, filters = MATRICES[name]
    path = tmp_path / "x.mp4"
    path.write_bytes(with_matrix(flat, *matrix))
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
    expected = filtered(frame, filters)
    assert (orientation(frame).apply(frame.to_ndarray(format="rgb24")) == expected).all()
    info = probe(path)
    assert (info.height, info.width) == expected.shape[:2]
    clip = transcode(path, start_s=None, end_s=None, encode=Encode(short_side_px=64), accept=Filter(), info=info)
    check(clip, gop=12)
    form = Expect(6, clip.stored.width, clip.stored.height)
    assert np.abs(decode(clip.data, [0], backend="decord", expect=form)[0].astype(int) - expected).mean() < 5


class UnnamedSideData:
    """A frame as PyAV gives those of MV-HEVC: it fails to list the side data, which has types without a name."""

    def __init__(self, frame: av.VideoFrame) -> None:
        self.rotation = frame.rotation

    @property
    def side_data(self) -> None:
        raise ValueError("29 is not a valid Type")


@pytest.mark.parametrize("name", ["upright", "quarter", "half", "three_quarters"])
def test_frames_with_unknown_side_data_are_turned(flat: bytes, name: str) -> None:
    with av.open(io.BytesIO(with_matrix(flat, *MATRICES[name][0])), "r") as container:
        frame: Any = next(container.decode(video=0))
    unnamed: Any = UnnamedSideData(frame)
    found = inspect.unwrap(display_matrix)(unnamed)
    assert found == (None if name == "upright" else inspect.unwrap(display_matrix)(frame))


@pytest.mark.parametrize("start_s", [None, 0.08, 0.12])
def test_an_orientation_in_a_message_holds_for_every_part(flat: bytes, start_s: float | None, tmp_path: Path) -> None:
    path = tmp_path / "x.h264"
    with av.open(io.BytesIO(flat), "r") as source:
        words = "h264_mp4toannexb,h264_metadata=display_orientation=insert:rotate=90"
        insert = av.BitStreamFilterContext(words, source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.size]
        path.write_bytes(b"".join(bytes(turned) for packet in packets for turned in insert.filter(packet)))
    info = probe(path)
    assert (info.width, info.height, info.turn) == (64, 96, ("cclock", False, False))
    end_s = None if start_s is None else start_s + 0.08
    clip = transcode(path, start_s=start_s, end_s=end_s, encode=Encode(short_side_px=64), accept=Filter(), info=info)
    assert (clip.stored.width, clip.stored.height) == (64, 96)
    (shown,) = decode(clip.data, [0], backend="pyav", expect=Expect(clip.stored.frames, 64, 96))
    red, green = shown[:, :, 0].astype(int), shown[:, :, 1].astype(int)
    assert red[5, 30] > red[90, 30] + 100  # the right side of the picture is up
    assert green[48, 60] > green[48, 4] + 100


@pytest.mark.parametrize("degrees", [2, 45, 100])
def test_odd_angles_are_refused_by_name(flat: bytes, degrees: int, tmp_path: Path) -> None:
    cos, sin = (round(ONE * f(np.radians(degrees))) for f in (np.cos, np.sin))
    (tmp_path / "x.mp4").write_bytes(with_matrix(flat, cos, sin, -sin, cos))
    with pytest.raises(Refused, match=f"an angle of {degrees} degrees") as caught:
        probe(tmp_path / "x.mp4")
    assert caught.value.reason is Reason.ODD_ROTATION
    with av.open(str(tmp_path / "x.mp4")) as container, pytest.raises(OddRotation):
        orientation(next(container.decode(video=0)))


def test_a_picture_that_is_too_long_to_encode_is_refused(flat: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.mp4").write_bytes(flat)
    part: Any = {"start_s": None, "end_s": None, "box": PictureBox(0, 0, 96, 2)}
    with pytest.raises(Refused, match=r"would be stored as 24576x512, H\.264 allows 16384") as caught:
        transcode(tmp_path / "x.mp4", **part, encode=Encode(short_side_px=512), accept=Filter())
    assert caught.value.reason is Reason.TOO_NARROW


def test_hdr_is_tone_mapped_and_named(tmp_path: Path) -> None:
    """White of an SDR screen, 203 cd/m2, is 0.58 of the PQ signal (ITU-R BT.2408) and must become white."""
    with av.open(str(tmp_path / "x.mp4"), "w") as container:
        options = {"x265-params": "log-level=none:colorprim=bt2020:transfer=smpte2084:colormatrix=bt2020nc"}
        stream = container.add_stream("libx265", rate=10, options={"preset": "ultrafast", **options})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p10le"
        for _ in range(10):
            frame = av.VideoFrame(64, 64, "yuv420p10le")
            for plane, level in zip(frame.planes, (round(64 + 0.58 * 876), 512, 512), strict=True):
                plane.update(np.full(plane.buffer_size // 2, level, np.uint16).tobytes())
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    info = probe(tmp_path / "x.mp4")
    assert info.transfer == "smpte2084"
    clip = transcode(tmp_path / "x.mp4", start_s=None, end_s=None, encode=Encode(short_side_px=64), accept=Filter())
    check(clip, gop=12)
    with av.open(io.BytesIO(clip.data), "r") as container:
        frame = next(container.decode(video=0))
    assert frame.to_ndarray(format="rgb24").mean() > 235


@pytest.mark.parametrize("width", [16, 24, 48, 72, 96])
def test_decord_returns_three_channels_at_any_width(width: int, tmp_path: Path) -> None:
    with av.open(str(tmp_path / "x.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = width, 32, "yuv420p"
        picture = np.random.default_rng(0).integers(0, 256, (4, width // 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        container.mux([*stream.encode(av.VideoFrame.from_ndarray(picture)), *stream.encode()])
    data = (tmp_path / "x.mp4").read_bytes()
    frames = [decode(data, [0], backend=name, expect=Expect(1, width, 32)) for name in ("decord", "pyav")]
    assert (frames[0] == frames[1]).all()


def examine(path: Path) -> Examined:
    found = work(ExamineTask(0, FileRef(str(path)), "mp4", 12, deep=True))
    assert isinstance(found, Examined)
    return found


@pytest.mark.parametrize("name", MATRICES)
def test_decoders_agree_under_every_display_matrix(flat: bytes, name: str, tmp_path: Path) -> None:
    matrix, filters = MATRICES[name]
    data = with_matrix(flat, *matrix)
    (tmp_path / "x.mp4").write_bytes(data)
    found = examine(tmp_path / "x.mp4")
    stored = found.stored
    assert (stored.width, stored.height) == ((64, 96) if "transpose" in filters else (96, 64))
    assert ("it is rotated" in found.flaws) == (name != "upright")
    with av.open(str(tmp_path / "x.mp4")) as container:
        expected = [filtered(frame, filters) for frame in container.decode(video=0)]
    for backend in ("decord", "pyav"):
        frames = decode(data, [0, 3, 5], backend=backend, expect=Expect(6, stored.width, stored.height))
        assert all((frame == expected[number]).all() for frame, number in zip(frames, (0, 3, 5), strict=True))


def test_the_matrix_of_the_movie_counts_too(flat: bytes, tmp_path: Path) -> None:
    """FFmpeg multiplies it with the matrix of the track."""
    at = flat.index(IDENTITY, flat.index(b"mvhd"))
    mirrored = struct.pack(">9i", -ONE, 0, 0, 0, ONE, 0, 0, 0, 1 << 30)
    data = flat[:at] + mirrored + flat[at + len(mirrored) :]
    (tmp_path / "x.mp4").write_bytes(data)
    assert "it is rotated" in examine(tmp_path / "x.mp4").flaws
    upright, *both = (
        decode(x, [0], backend=name, expect=Expect(6, 96, 64))
        for x, name in ((flat, "pyav"), (data, "decord"), (data, "pyav"))
    )
    assert all((frames == upright[:, :, ::-1]).all() for frames in both)


def test_decoders_agree_on_a_varying_rate(tmp_path: Path) -> None:
    data = encode(tmp_path / "x.mp4", times=[0, 10, 11, 12, 40, 41], bf="0")
    frames = [decode(data, [1, 3, 4], backend=name, expect=Expect(6, 96, 64)) for name in ("decord", "pyav")]
    assert (frames[0] == frames[1]).all()
    flaws = examine(tmp_path / "x.mp4").flaws
    assert flaws[0].startswith("the rate is not constant")
    assert "the index is not at the front" in flaws


def test_all_differences_from_the_canonical_form_are_named(flat: bytes) -> None:
    _, flaws = compare(with_matrix(flat, *MATRICES["half"][0]), gop=2)
    assert [flaw.partition(":")[0].partition(" (")[0] for flaw in flaws][:1] == ["it is rotated"]
    assert len(flaws) >= 3


def test_av1_is_admitted_for_pyav(tmp_path: Path) -> None:
    data = encode(tmp_path / "x.mp4", codec="libsvtav1", preset="12")
    found = examine(tmp_path / "x.mp4")
    assert (found.stored.frames, found.stored.width) == (6, 96)
    assert "PyAV does" in found.flaws[0]
    with pytest.raises(Unreadable):
        decode(data, [0], backend="decord", expect=Expect(6, 96, 64))
